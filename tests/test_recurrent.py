"""Recurrent layers: which channels they have, and that what is masked, removed and zeroed by hand compute the same."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from nets import Net, members, rows_of
from removal import relative_gap
from scores import InOrder
from torch import Tensor, nn

import fxcompress
from fxcompress import TracedModule, compress, count, masks
from fxcompress.errors import InputError, TraceError
from fxcompress.passes import FoldBatchNorm, L1FilterPruner, LevelPruner, RandomFilterPruner, Speedup
from fxcompress.recurrent import gates_of, operator_of

D = torch.float64
BATCH = torch.randn(2, 7, 3, dtype=D)
OTHERS = (torch.randn(5, 4, 3, dtype=D), torch.randn(1, 11, 3, dtype=D))


def pruned(net: nn.Module, x: Any, others: Sequence[Any] = (), pruner: Any = None) -> tuple[TracedModule, TracedModule]:
    """Masked and removed (verified by `compress`): equal, and equal to a copy zeroed by hand, on other inputs too."""
    net = net.double()
    masked = compress(net, [pruner or RandomFilterPruner(0.5, seed=3)], example_inputs=x)
    removed = compress(masked, [Speedup()], example_inputs=x)
    assert set(removed.state_dict()) == set(net.state_dict())
    zeroed, kept = copy.deepcopy(net), masks(masked)
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            mask = kept.get(name, torch.ones_like(parameter, dtype=torch.bool))
            assert torch.equal(removed.get_parameter(name).reshape(-1), parameter[mask])
            parameter *= mask
        for given in (x, *others):
            args = given if isinstance(given, tuple) else (given,)
            wanted = removed(*args)
            assert relative_gap(wanted, masked(*args)) <= 1e-9
            assert relative_gap(wanted, zeroed(*args)) <= 1e-9
    for layer in removed.modules():
        if operator_of(layer):
            check_attributes(layer)
    return masked, removed


def check_attributes(layer: Any) -> None:
    """A layer of the same kind, made anew with its attributes, has its parameters."""
    taken = ("batch_first", "num_layers", "bidirectional") if isinstance(layer, nn.RNNBase) else ()
    taken += ("proj_size",) if isinstance(layer, nn.LSTM) else ()
    options = {name: getattr(layer, name) for name in taken}
    kind: Any = type(layer)
    twin = kind(layer.input_size, layer.hidden_size, bias=layer.bias, **options)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}
    if isinstance(layer, nn.RNNBase):
        assert [id(w) for w in layer._flat_weights] == [id(p) for p in layer.parameters()]


def classifier(layer: nn.Module, features: int, **more: Any) -> Net:
    """A linear layer, a recurrent one, and two linear ones on its output."""
    return Net(
        lambda n, x: n.out(torch.tanh(n.mid(n.rnn(n.enter(x))[0]))),
        enter=nn.Linear(3, 5),
        rnn=layer,
        mid=nn.Linear(features, 5),
        out=nn.Linear(5, 2),
        **more,
    )


# ---- every kind of layer ---------------------------------------------------------------------------------------------

LAYERS = {
    # removable: 5 features that enter + units of every layer and direction (+ projections) + 5 of `mid`
    "lstm": (nn.LSTM(5, 7, batch_first=True), 7, 5 + 7 + 5),
    "lstm, bidirectional": (nn.LSTM(5, 7, batch_first=True, bidirectional=True), 14, 5 + 2 * 7 + 5),
    "lstm, two layers": (nn.LSTM(5, 6, 2, batch_first=True, dropout=0.4), 6, 5 + 2 * 6 + 5),
    "lstm, three layers, both": (nn.LSTM(5, 4, 3, batch_first=True, bidirectional=True), 8, 5 + 6 * 4 + 5),
    "lstm, steps first": (nn.LSTM(5, 7, 2), 7, 5 + 2 * 7 + 5),
    "lstm, no bias": (nn.LSTM(5, 7, batch_first=True, bias=False), 7, 5 + 7 + 5),
    "lstm, projected": (nn.LSTM(5, 9, 2, batch_first=True, proj_size=4), 4, 5 + 2 * (9 + 4) + 5),
    "lstm, projected, both": (
        nn.LSTM(5, 9, batch_first=True, bidirectional=True, proj_size=4),
        8,
        5 + 2 * (9 + 4) + 5,
    ),
    "gru": (nn.GRU(5, 7, batch_first=True), 7, 5 + 7 + 5),
    "gru, two layers, both": (nn.GRU(5, 6, 2, batch_first=True, bidirectional=True), 12, 5 + 4 * 6 + 5),
    "gru, no bias": (nn.GRU(5, 7, bias=False), 7, 5 + 7 + 5),
    "rnn": (nn.RNN(5, 7, batch_first=True), 7, 5 + 7 + 5),
    "rnn, relu, both": (nn.RNN(5, 7, 2, nonlinearity="relu", bidirectional=True), 14, 5 + 4 * 7 + 5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_units_of_every_layer_go(name: str) -> None:
    layer, features, removable = LAYERS[name]
    net = classifier(copy.deepcopy(layer), features).double()
    assert fxcompress.channel_groups(net, BATCH).removable == removable
    _, removed = pruned(net, BATCH, OTHERS)
    found: Any = removed.get_submodule("rnn")
    assert type(found) is type(layer)
    half = {4: 2, 6: 3, 7: 4, 9: 5}
    assert (found.input_size, found.hidden_size) == (3, half[layer.hidden_size])  # type: ignore[index]
    assert found.proj_size == (2 if layer.proj_size else 0)


def test_the_slices_of_a_unit() -> None:
    """Gate g of unit u is row g * 7 + u; criteria see the rows of every gate, of both weights."""
    groups = fxcompress.channel_groups(classifier(nn.LSTM(5, 7), 7).double(), BATCH)
    group = groups["rnn"]
    assert set(group.members) == members(
        "rnn.weight_ih_l0 rnn.weight_hh_l0 rnn.weight_hh_l0:1 rnn.bias_ih_l0 rnn.bias_hh_l0 mid.weight:1"
    )
    for weight in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        assert rows_of(group, weight) == [[u, 7 + u, 14 + u, 21 + u] for u in range(7)]
    assert set(groups["enter"].members) == members("enter.weight enter.bias rnn.weight_ih_l0:1")
    assert groups.graph.has_edge("enter", "rnn")


def test_a_unit_is_scored_by_all_its_rows() -> None:
    net = classifier(nn.GRU(5, 4), 4)
    with torch.no_grad():
        for parameter in (net.rnn.weight_ih_l0, net.rnn.weight_hh_l0):
            parameter.fill_(0.1)
        net.rnn.weight_ih_l0[4 + 2] = 0.0  # one gate of unit 2
        net.rnn.weight_hh_l0[8 + 3] = 0.05  # one of unit 3
    masked = compress(net.double(), [L1FilterPruner(0.5, include="rnn")], example_inputs=BATCH)
    kept = masks(masked)["rnn.bias_ih_l0"].reshape(3, 4)
    assert kept.tolist() == [[True, True, False, False]] * 3


def test_directions_and_layers_keep_equally_many() -> None:
    """A module has one hidden size: where the scores of its parts disagree, channels come back.

    Half of 24 units: 5 of the first part, whose scores are the lowest, and of the others 3, 2 and 2.
    """
    net = classifier(nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True), 12)
    with torch.no_grad():
        for name, weight in net.rnn.named_parameters():
            if name.startswith("weight"):
                size = (1e-3 if name.endswith("l0") else 1.0) * (1e-6 if "hh" in name else 1.0)
                weight.copy_((size * torch.arange(1.0, 7) / weight.shape[1]).repeat(4)[:, None].expand_as(weight))
    masked, removed = pruned(net, BATCH, OTHERS, L1FilterPruner(0.5, include="rnn", scope="global"))
    assert removed.get_submodule("rnn").hidden_size == 4  # type: ignore[comparison-overlap]
    alive = [mask.reshape(4, 6)[0].tolist() for name, mask in masks(masked).items() if "rnn.bias_ih" in name]
    assert alive == [[False, False, True, True, True, True]] * 4


def test_units_that_are_an_output_hold_the_other_layers() -> None:
    net = Net(lambda n, x: n.rnn(n.enter(x))[0], enter=nn.Linear(3, 5), rnn=nn.LSTM(5, 6, 2)).double()
    groups = fxcompress.channel_groups(net, BATCH)
    assert {group.name: group.removable for group in groups} == {"enter": True, "rnn": False, "rnn[1]": False}
    assert "output of the model" in groups["rnn[1]"].reason
    pruned(net, BATCH, OTHERS)
    last = Net(lambda n, x: n.rnn(n.enter(x))[1], enter=nn.Linear(3, 5), rnn=nn.LSTM(5, 6, 2)).double()
    assert fxcompress.channel_groups(last, BATCH).removable == 5


def test_more_memories_than_projections_stay() -> None:
    """Halves of 6 and 5 would be 3 each, which torch would take for a layer without projections."""
    _, removed = pruned(classifier(nn.LSTM(5, 6, batch_first=True, proj_size=5), 5), BATCH, OTHERS)
    found: Any = removed.get_submodule("rnn")
    assert (found.hidden_size, found.proj_size) == (4, 3)


def test_a_single_unit_or_projection_stays() -> None:
    net = classifier(nn.GRU(5, 1, bidirectional=True), 2).double()
    assert fxcompress.channel_groups(net, BATCH).removable == 5 + 5
    pruned(net, BATCH)
    net = classifier(nn.LSTM(5, 4, proj_size=1), 1).double()
    assert fxcompress.channel_groups(net, BATCH).removable == 5 + 5
    pruned(net, BATCH)


# ---- what is read of a layer -----------------------------------------------------------------------------------------


def test_states_and_parts_of_the_output() -> None:
    """Both states of both directions, the last step, and the two directions added."""

    def step(n: Net, x: Tensor) -> Tensor:
        output, (hidden, memory) = n.rnn(n.enter(x))
        mixed = output[..., :6] + output[..., 6:]
        states = torch.cat((hidden.transpose(0, 1).reshape(x.size(0), -1), memory[-1]), 1)
        return n.out(mixed[:, -1]) + n.mix(states)

    net = Net(
        step, enter=nn.Linear(3, 5), rnn=nn.LSTM(5, 6, batch_first=True, bidirectional=True),
        out=nn.Linear(6, 4), mix=nn.Linear(18, 4),
    ).double()  # fmt: skip
    assert fxcompress.channel_groups(net, BATCH).removable == 5 + 6  # units of both directions are added: tied
    pruned(net, BATCH, OTHERS)


def test_directions_seen_as_a_dimension() -> None:
    def step(n: Net, x: Tensor) -> Tensor:
        output = n.rnn(n.enter(x))[0]
        return n.out(output.view(x.size(0), x.size(1), 2, 6)[:, :, 1]) + n.out2(output)

    net = Net(
        step, enter=nn.Linear(3, 5), rnn=nn.GRU(5, 6, batch_first=True, bidirectional=True),
        out=nn.Linear(6, 4), out2=nn.Linear(12, 4),
    ).double()  # fmt: skip
    assert fxcompress.channel_groups(net, BATCH).removable == 5 + 12
    pruned(net, BATCH, OTHERS)


def test_without_a_batch() -> None:
    x = torch.randn(6, 3, dtype=D)
    net = classifier(nn.LSTM(5, 6, 2, bidirectional=True), 12)
    pruned(net, x, [torch.randn(9, 3, dtype=D)])


def test_a_statistic_over_units_runs_over_the_live_ones() -> None:
    net = Net(
        lambda n, x: n.out(n.norm(n.rnn(n.enter(x))[0])),
        enter=nn.Linear(3, 5), rnn=nn.LSTM(5, 8, batch_first=True), norm=nn.LayerNorm(8), out=nn.Linear(8, 2),
    ).double()  # fmt: skip
    masked = compress(net, [InOrder(0.5)], example_inputs=BATCH)
    removed = compress(masked, [Speedup()], example_inputs=BATCH)
    assert removed.get_submodule("rnn").hidden_size == 4  # type: ignore[comparison-overlap]
    with torch.no_grad():
        for x in OTHERS:
            assert relative_gap(masked(x), removed(x)) <= 1e-9


# ---- initial states --------------------------------------------------------------------------------------------------


def with_state(kind: type[nn.Module], make: Any, rows: int = 1, **more: Any) -> Net:
    def step(n: Net, x: Tensor) -> Tensor:
        state = make(n, x)
        sequence, _ = n.rnn(n.enter(x), (state, 0.5 * state) if kind is nn.LSTM else state)
        return n.out(sequence)

    return Net(step, enter=nn.Linear(3, 5), rnn=kind(5, 6, rows, batch_first=True), out=nn.Linear(6, 2), **more)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_initial_states(kind: type[nn.Module]) -> None:
    made = with_state(kind, lambda n, x: torch.zeros(2, x.size(0), 6, dtype=x.dtype), 2)
    learned = with_state(kind, lambda n, x: n.start.repeat(1, x.size(0), 1), 2, start=nn.Parameter(torch.ones(2, 1, 6)))
    computed = with_state(
        kind, lambda n, x: torch.sigmoid(n.first(x.mean(1))).unsqueeze(0), first=nn.Linear(3, 6)
    )  # sigmoid(0) is no zero, which a dead unit may hold: nobody reads it
    for net in (made, learned, computed):
        net.double()
        assert fxcompress.channel_groups(net, BATCH).removable == 5 + 6  # units with one state are tied over the layers
        pruned(net, BATCH, OTHERS)
    assert "first.weight" in {name for name, _ in fxcompress.channel_groups(computed, BATCH)["rnn"].members}


def test_a_state_that_is_an_input_keeps_its_units() -> None:
    net = Net(
        lambda n, x, h: n.out(n.rnn(n.enter(x), h)[0]), enter=nn.Linear(3, 5), rnn=nn.GRU(5, 6), out=nn.Linear(6, 2)
    )
    x = (torch.randn(4, 2, 3, dtype=D), torch.randn(1, 2, 6, dtype=D))
    groups = fxcompress.channel_groups(net.double(), x)
    assert groups.removable == 5
    assert "initial state has no channels" in groups["rnn"].reason
    pruned(net, x, [(torch.randn(3, 4, 3, dtype=D), torch.randn(1, 4, 6, dtype=D))])


# ---- cells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell(5, 6), nn.GRUCell(5, 6), nn.RNNCell(5, 6), nn.RNNCell(5, 6, bias=False, nonlinearity="relu")]
)
@pytest.mark.parametrize("started", [False, True])
def test_cells(cell: nn.Module, started: bool) -> None:
    lstm = isinstance(cell, nn.LSTMCell)

    def step(n: Net, x: Tensor) -> Tensor:
        first = x.new_zeros(x.size(0), 6) if started else None
        state = (first, first) if started and lstm else first
        made = []
        for item in n.enter(x).unbind(1):
            state = n.rnn(item, state)
            made.append(state[0] if lstm else state)
        return n.out(torch.stack(made, 1))

    net = Net(step, enter=nn.Linear(3, 5), rnn=copy.deepcopy(cell), out=nn.Linear(6, 2)).double()
    assert fxcompress.channel_groups(net, BATCH).removable == 5 + 6
    _, removed = pruned(net, BATCH, [torch.randn(4, 7, 3, dtype=D)])
    found: Any = removed.get_submodule("rnn")
    assert (type(found), found.input_size, found.hidden_size) == (type(cell), 3, 3)


def test_a_cell_without_a_batch() -> None:
    net = Net(
        lambda n, x: n.out(n.rnn(n.enter(x), (n.start, n.start))[0]),
        enter=nn.Linear(3, 5), rnn=nn.LSTMCell(5, 6), start=nn.Parameter(torch.ones(6)), out=nn.Linear(6, 2),
    )  # fmt: skip
    pruned(net, torch.randn(3, dtype=D))


# ---- what has no rule ------------------------------------------------------------------------------------------------


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


def test_a_packed_sequence_stays_in_the_submodule_that_packs_it() -> None:
    net = Net(
        lambda n, x, lengths: n.out(n.mid(n.packs(n.enter(x), lengths))),
        enter=nn.Linear(3, 5), packs=Packs(), mid=nn.Linear(6, 4), out=nn.Linear(4, 2),
    )  # fmt: skip
    x = (torch.randn(2, 7, 3, dtype=D), torch.tensor([4, 7]))
    with pytest.warns(UserWarning, match=r"packs stays as it is: pack_padded_sequence\(\) reads the values"):
        groups = fxcompress.channel_groups(net.double(), x)
    assert {group.name for group in groups if group.removable} == {"mid"}


def test_a_model_that_packs_itself_is_told_to_move_it() -> None:
    with pytest.raises(
        TraceError, match=r"pack_padded_sequence\(\) reads the values .* Move that line into a submodule"
    ):
        fxcompress.trace(Packs(), (torch.randn(2, 7, 5), torch.tensor([4, 7])))


def test_a_packed_sequence_that_is_an_input_is_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(3, 5)])
    net = Net(lambda n, x: n.rnn(x)[1][0], rnn=nn.LSTM(5, 6))
    with pytest.raises(InputError, match=r"example_inputs hold a PackedSequence.*let a submodule pack them"):
        fxcompress.trace(net, (packed,))


def test_functional_calls() -> None:
    """Weights that are parameters lose channels wherever they are; computed ones, and packed data, keep theirs."""

    def step(n: Net, x: Tensor) -> Tensor:
        x = n.enter(x)
        state = x.new_zeros(1, x.size(0), 6)
        weights = [n.scale * n.ih if n.scale is not None else n.ih, n.hh]
        return n.out(torch.gru(x, state, weights, False, 1, 0.0, False, False, True)[0])

    def net(scale: Tensor | None) -> Net:
        return Net(
            step, enter=nn.Linear(3, 5), ih=nn.Parameter(torch.ones(18, 5)), hh=nn.Parameter(torch.ones(18, 6)),
            out=nn.Linear(6, 2), scale=None if scale is None else nn.Parameter(scale),
        ).double()  # fmt: skip

    assert fxcompress.channel_groups(net(None), BATCH).removable == 5 + 6
    pruned(net(None), BATCH, OTHERS)
    assert fxcompress.channel_groups(net(torch.ones(18, 1)), BATCH).removable == 0

    def packed(n: Net, x: Tensor, sizes: Tensor) -> Tensor:
        data = n.enter(x)
        weights = [n.rnn.weight_ih_l0, n.rnn.weight_hh_l0, n.rnn.bias_ih_l0, n.rnn.bias_hh_l0]
        return n.out(torch.gru(data, sizes, data.new_zeros(1, 2, 6), weights, True, 1, 0.0, False, False)[0])

    packing = Net(packed, enter=nn.Linear(3, 5), rnn=nn.GRU(5, 6), out=nn.Linear(6, 2)).double()
    x = (torch.randn(5, 3, dtype=D), torch.tensor([2, 2, 1]))
    groups = fxcompress.channel_groups(packing, x)
    assert groups.removable == 0
    assert "gru of a PackedSequence" in groups["enter"].reason


# ---- an ordinary module ----------------------------------------------------------------------------------------------


def test_a_masked_network_trains_copies_and_pickles() -> None:
    x = BATCH.float()
    net = classifier(nn.LSTM(5, 6, 2, batch_first=True, dropout=0.5, bidirectional=True), 12).train()
    masked = compress(net, [RandomFilterPruner(0.5, seed=1)], example_inputs=x)
    kept = masks(masked)
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in masked.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        masked(x).square().mean().backward()
        optimizer.step()
    for name, parameter in masked.named_parameters():
        assert parameter.grad is not None
        assert not parameter.grad[~kept[name]].any() if name in kept else parameter.grad.any()
        assert not torch.equal(parameter, before[name])
    torch.manual_seed(0)
    assert not torch.equal(masked(x), masked(x)), "dropout between layers is off in train mode"
    masked.eval()
    assert torch.equal(masked(x), masked(x))
    removed = compress(masked, [Speedup()], example_inputs=x)
    for twin in (copy.deepcopy(masked), pickle.loads(pickle.dumps(masked)), copy.deepcopy(removed)):
        assert relative_gap(masked(x), twin(x)) <= 1e-5
        assert relative_gap(masked.double()(BATCH), twin.double()(BATCH)) <= 1e-9
        masked.float()
    again = removed.train()(x)
    again.mean().backward()
    weight = removed.get_parameter("rnn.weight_hh_l1_reverse")
    assert weight.grad is not None
    assert weight.grad.any()


def test_masks_of_single_weights() -> None:
    net = classifier(nn.LSTM(5, 6, batch_first=True), 6).double()
    masked = compress(net, [LevelPruner(0.5, include="rnn")], example_inputs=BATCH)
    assert set(masks(masked)) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    removed = compress(masked, [Speedup()], example_inputs=BATCH)
    rnn: Any = removed.get_submodule("rnn")
    assert [id(w) for w in rnn._flat_weights] == [id(p) for p in rnn.parameters()]
    assert int((rnn.weight_ih_l0 == 0).sum()) == 60
    with torch.no_grad():
        assert relative_gap(masked(OTHERS[0]), removed(OTHERS[0])) <= 1e-9


def test_folding_in_front_and_behind() -> None:
    net = Net(
        lambda n, x: n.out(n.rnn(n.bn(n.conv(x.transpose(1, 2))).relu().transpose(1, 2))[0]),
        conv=nn.Conv1d(3, 6, 3, padding=1), bn=nn.BatchNorm1d(6),
        rnn=nn.GRU(6, 6, batch_first=True), out=nn.Linear(6, 2),
    ).double()  # fmt: skip
    steps = [L1FilterPruner(0.5), FoldBatchNorm(), Speedup()]
    small = compress(net, steps, example_inputs=BATCH)
    masked = compress(net, steps[:1], example_inputs=BATCH)
    with torch.no_grad():
        assert relative_gap(masked(OTHERS[0]), small(OTHERS[0])) <= 1e-9
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in small.modules())


# ---- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_costs_are_polynomials(dtype: torch.dtype) -> None:
    net = classifier(nn.LSTM(5, 9, batch_first=True, proj_size=4), 4).to(dtype)
    x = BATCH.to(dtype)
    masked = compress(net, [RandomFilterPruner(0.5)], example_inputs=x)
    cost = count(masked, x)
    # 7 steps: enter 3 x 5, gates 4 * 9 x (5 + 4), projection 4 x 9, mid 4 x 5, out 5 x 2
    assert cost.macs == 7 * (15 + 36 * 9 + 36 + 20 + 10)
    # 3 features, 5 memories, 2 projections, 3 of mid
    assert cost.after.macs == 7 * (9 + 20 * (3 + 2) + 10 + 6 + 6)  # type: ignore[union-attr]
    assert cost.symbolic.evaluate().macs == cost.macs
    assert cost.symbolic.evaluate(cost.symbolic.current) == (cost.after.macs, cost.after.params, cost.after.bytes)  # type: ignore[union-attr]


# ---- weights that are zero -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("projected", [False, True])
def test_units_whose_weights_are_zero_go(kind: type[nn.Module], projected: bool) -> None:
    if projected and kind is not nn.LSTM:
        return
    more = {"proj_size": 4} if projected else {}
    layer: Any = kind(5, 6, 2, batch_first=True, bidirectional=True, **more)
    net = classifier(layer, 8 if projected else 12).double()
    gates = gates_of(operator_of(layer) or "")
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "_hr_" not in name:
                parameter.view(gates, 6, *parameter.shape[1:])[:, [1, 4] if "reverse" in name else [0, 3]] = 0
        for weight in (layer.weight_ih_l0, layer.weight_ih_l0_reverse):
            weight[:, 2] = 0
    small = compress(net, [Speedup()], example_inputs=BATCH)
    found: Any = small.get_submodule("rnn")
    assert (found.input_size, found.hidden_size) == (4, 4 if not projected else 5)  # more than 4 projections
    with torch.no_grad():
        assert relative_gap(net(OTHERS[0]), small(OTHERS[0])) <= 1e-9


def test_units_that_are_not_zero_stay() -> None:
    """With a bias, with a state to start from, or read by other units only."""

    def unchanged(net: Net) -> None:
        small = compress(net.double(), [Speedup()], example_inputs=BATCH)
        assert small.get_submodule("rnn").hidden_size == 6  # type: ignore[comparison-overlap]
        with torch.no_grad():
            assert relative_gap(net(BATCH), small(BATCH)) <= 1e-12

    biased = classifier(nn.GRU(5, 6, batch_first=True), 6)
    start = nn.Parameter(torch.ones(1, 1, 6))
    started = with_state(nn.LSTM, lambda n, x: n.start.expand(-1, x.size(0), -1).contiguous(), start=start)
    inner = classifier(nn.RNN(5, 6, batch_first=True), 6)
    with torch.no_grad():
        for net in (biased, started):
            for weight in (net.rnn.weight_ih_l0, net.rnn.weight_hh_l0):
                weight.view(-1, 6, weight.shape[1])[:, 2] = 0
        for bias in (started.rnn.bias_ih_l0, started.rnn.bias_hh_l0):
            bias.view(-1, 6)[:, 2] = 0
        inner.mid.weight[:, 2] = 0
    for net in (biased, started, inner):
        unchanged(net)
    with torch.no_grad():
        inner.rnn.weight_hh_l0[:, 2] = 0  # now nobody reads it
    small = compress(inner, [Speedup()], example_inputs=BATCH)
    assert small.get_submodule("rnn").hidden_size == 5  # type: ignore[comparison-overlap]
