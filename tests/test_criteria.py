"""Channel criteria against hand-computed cases and against NumPy on activations and gradients found by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from criterion_cases import Residual, case, cross_entropy, dead_channels
from nets import Net
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import InputError, PassError, Task, TrainingError
from fxcompress.passes import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    ChannelPruner,
    FoldBatchNorm,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    Layer,
    Speedup,
    TaylorFOPruner,
)

Array = npt.NDArray[np.float64]


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out.square().mean()


# ---- by hand ---------------------------------------------------------------------------------------------------------


def two_layers() -> Net:
    """Three hidden units: x, 2x - 3 and -x behind a ReLU, read with weights 1, 2, 10."""
    net = Net(lambda n, x: n.b(F.relu(n.a(x))), a=nn.Linear(1, 3), b=nn.Linear(3, 1))
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
        net.a.bias.copy_(torch.tensor([0.0, -3.0, 0.0]))
        net.b.weight.copy_(torch.tensor([[1.0, 2.0, 10.0]]))
        net.b.bias.zero_()
    return net


#: Units: 1 2 3 4, 0 1 3 5, 0 0 0 0 for the first four; the last sample gives 0, 0 and 6.
BATCHES = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [-6.0]])]


def order_of(net: nn.Module, pruner: Callable[[float], ChannelPruner], task: Task, x: Tensor, width: int) -> list[int]:
    """Channels of layer a in the order in which they go."""
    order: list[int] = []
    for count in range(1, width):
        masked = fxcompress.compress(net, [pruner((count + 0.5) / width)], example_inputs=x, task=task)
        order += sorted(dead_channels(masked, "a.weight") - set(order))
    return [*order, *(set(range(width)) - set(order))]


def test_by_hand() -> None:
    """Not zero: 4/5, 3/5, 1/5. Means: 10/5, 9/5, 6/5 (the mean of the batches' means would be 2.08, 1.58, 1).

    Of the loss ``mean(out)``: dL/da_i = w_i * mean(x where unit i is on), times a_i: unit 0 has 1.5 and 7/3; unit 1
    2 * (x = 2 alone: 1) * 2 = 4 and 2 * 7/3 * 2 = 28/3; unit 2 has 0 and 10 * (-6/3) * -1 = 20.
    """
    task = Task(batches=BATCHES, loss=lambda model, batch: model(batch).mean())
    net, x = two_layers(), BATCHES[0]
    assert order_of(net, ActivationAPoZRankFilterPruner, task, x, 3) == [2, 1, 0]
    assert order_of(net, ActivationMeanRankFilterPruner, task, x, 3) == [2, 1, 0]
    assert order_of(net, TaylorFOPruner, task, x, 3) == [0, 1, 2]
    assert order_of(net, lambda s: TaylorFOPruner(s, batches=1), task, x, 3) == [2, 0, 1]
    assert order_of(net, L1FilterPruner, task, x, 3) == [0, 2, 1]  # ties by index
    assert order_of(net, L2FilterPruner, task, x, 3) == [0, 2, 1]
    assert order_of(net, FPGMPruner, task, x, 3) == [0, 1, 2]  # distances 1+2, 1+3, 2+3


@pytest.mark.parametrize(
    "pruner, expected",
    [
        (ActivationAPoZRankFilterPruner, [4 / 5, 3 / 5, 1 / 5]),
        (ActivationMeanRankFilterPruner, [10 / 5, 9 / 5, 6 / 5]),
        (TaylorFOPruner, [(1.5**2 + (7 / 3) ** 2) / 2, (4**2 + (28 / 3) ** 2) / 2, 20**2 / 2]),
    ],
)
def test_scores_by_hand(pruner: type[ChannelPruner], expected: list[float]) -> None:
    found: list[Array] = []

    @dataclass(frozen=True)
    class Spy(pruner):  # type: ignore[misc, valid-type]
        def _combined(self, group: Any, parts: Any) -> Any:
            found.extend(parts)
            return super()._combined(group, parts)

    task = Task(batches=BATCHES, loss=lambda model, batch: model(batch).mean())
    spy = Spy(0.4, include="a")  # pyright: ignore[reportAbstractUsage] - the class that it extends is not
    fxcompress.compress(two_layers(), [spy], example_inputs=BATCHES[0], task=task)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_a_slice_and_its_elements() -> None:
    """Unit 0: g * w = (3, -3), unit 1: (1, 1). The sums squared are 0 and 4, the squares add up to 18 and 2."""
    net = Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(2, 2), b=nn.Linear(2, 1))
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([[3.0, -3.0], [1.0, 1.0]]))
        net.b.weight.fill_(1.0)
    x = torch.ones(1, 2)
    task = Task(batches=[x], loss=lambda model, batch: model(batch).sum())
    by_slice = fxcompress.compress(net, [TaylorFOPruner(0.5)], example_inputs=x, task=task)
    by_element = fxcompress.compress(net, [TaylorFOPruner(0.5, per="element")], example_inputs=x, task=task)
    assert dead_channels(by_slice, "a.weight") == {0}
    assert dead_channels(by_element, "a.weight") == {1}


# ---- NumPy -----------------------------------------------------------------------------------------------------------


def numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


#: The groups of the CNN: their layers, each with the dimension of its weight that counts the channels.
CNN = {"stem": {"stem": 0, "conv2": 0}, "conv1": {"conv1": 0}, "up": {"up": 1, "depthwise": 0}, "fc1": {"fc1": 0}}


def cnn_activations(model: Residual, x: Tensor) -> dict[str, Array]:
    """The forward once more, with what is behind each layer's own activation function; channels first."""
    a = F.relu(model.norm0(model.stem(x)))
    b = F.relu(model.norm1(model.conv1(a)))
    c = model.norm2(model.conv2(b))  # in front of the residual sum: it has none of its own
    d = F.relu(model.up(F.relu(a + c)))
    e = model.depthwise(d).clamp(0, 6)
    f = F.relu(model.fc1(e.mean((2, 3))))
    found = {"stem": a, "conv1": b, "conv2": c, "up": d, "depthwise": e, "fc1": f}
    return {name: numpy(value).swapaxes(0, 1).reshape(value.shape[1], -1) for name, value in found.items()}


def of_activation(statistic: Callable[[Array], Array]) -> Callable[..., dict[str, Array]]:
    def scores(model: Any, task: Task) -> dict[str, Array]:
        found = [cnn_activations(model, x) for x, _ in task.read()]
        return {name: statistic(np.concatenate([f[name] for f in found], 1)) for name in found[0]}

    return scores


def of_weight(statistic: Callable[[Array], Array]) -> Callable[..., dict[str, Array]]:
    def scores(model: Any, task: Task) -> dict[str, Array]:
        dims = {layer: dim for layers in CNN.values() for layer, dim in layers.items()}
        weights = {name: np.moveaxis(numpy(model.get_submodule(name).weight), dim, 0) for name, dim in dims.items()}
        return {name: statistic(weight.reshape(len(weight), -1)) for name, weight in weights.items()}

    return scores


def of_gradient(statistic: Callable[[Array], Array]) -> Callable[..., dict[str, Array]]:
    def scores(model: Any, task: Task) -> dict[str, Array]:
        made: dict[str, Array] = {}
        for batch in task.read():
            model.zero_grad()
            cross_entropy(model, batch).backward()
            for layers in CNN.values():
                for name, dim in layers.items():
                    weight = model.get_submodule(name).weight
                    product = np.moveaxis(numpy(weight.grad) * numpy(weight), dim, 0)
                    made[name] = made.get(name, 0) + statistic(product.reshape(len(product), -1))
        model.zero_grad()
        return made

    return scores


def distances(slices: Array) -> Array:
    return np.array([sum(np.sqrt(((a - b) ** 2).sum()) for b in slices) for a in slices])


ORACLES: dict[str, tuple[Callable[..., ChannelPruner], Callable[..., dict[str, Array]]]] = {
    "l1": (L1FilterPruner, of_weight(lambda w: np.abs(w).sum(1))),
    "l2": (L2FilterPruner, of_weight(lambda w: np.sqrt((w**2).sum(1)))),
    "fpgm": (FPGMPruner, of_weight(distances)),
    "apoz": (ActivationAPoZRankFilterPruner, of_activation(lambda a: 1 - (a == 0).mean(1))),
    "mean": (ActivationMeanRankFilterPruner, of_activation(lambda a: a.mean(1))),
    "taylor": (TaylorFOPruner, of_gradient(lambda gw: gw.sum(1) ** 2)),
    "taylor, elements": (lambda s, **o: TaylorFOPruner(s, per="element", **o), of_gradient(lambda gw: (gw**2).sum(1))),
}
REDUCE: dict[str, Callable[..., Array]] = {
    "sum": lambda parts: np.sum(parts, 0),
    "mean": lambda parts: np.mean(parts, 0),
    "max": lambda parts: np.max(parts, 0),
}


@pytest.mark.parametrize("name, reduce", [*((name, "sum") for name in ORACLES), ("apoz", "mean"), ("taylor", "max")])
def test_ranking_of_every_group(name: str, reduce: Literal["sum", "mean", "max"]) -> None:
    pruner, oracle = ORACLES[name]
    model, x, task = case("cnn", torch.float64)
    scores = oracle(model, task)
    for sparsity in (0.15, 0.4, 0.8):
        masked = fxcompress.compress(model, [pruner(sparsity, reduce=reduce)], example_inputs=x, task=task)
        for layers in CNN.values():
            total = REDUCE[reduce]([scores[layer] for layer in layers])
            expected = set(np.argsort(total, kind="stable")[: int(len(total) * sparsity)].tolist())
            for layer, dim in layers.items():
                assert dead_channels(masked, f"{layer}.weight", dim) == expected, (layer, total)


@pytest.mark.parametrize(
    "name, norm_by",
    [*((name, "layer") for name in ORACLES), ("l1", "none"), ("l2", "size"), ("taylor", "none"), ("mean", "size")],
)
def test_global_ranking(name: str, norm_by: Literal["none", "size", "layer"]) -> None:
    pruner, oracle = ORACLES[name]
    model, x, task = case("cnn", torch.float64)
    scores = oracle(model, task)
    for layer in scores:
        weight = model.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        size = weight.numel() / len(scores[layer])
        divisor = {"none": 1.0, "size": size, "layer": np.abs(scores[layer]).mean()}[norm_by]
        scores[layer] = scores[layer] / divisor
    totals = [np.sum([scores[layer] for layer in layers], 0) for layers in CNN.values()]
    for sparsity, cap in ((0.3, None), (0.6, None), (0.6, 0.7)):
        made = pruner(sparsity, scope="global", norm_by=norm_by, max_sparsity_per_group=cap)
        masked = fxcompress.compress(model, [made], example_inputs=x, task=task)
        limits = [len(t) - 1 if cap is None else min(len(t) - 1, int(len(t) * cap)) for t in totals]
        ranked = sorted((t[i], g, i) for g, t in enumerate(totals) for i in np.argsort(t, kind="stable")[: limits[g]])
        gone = ranked[: int(sum(map(len, totals)) * sparsity)]
        assert len(gone) == int(41 * sparsity)
        for g, layers in enumerate(CNN.values()):
            for layer, dim in layers.items():
                expected = {int(i) for _, group, i in gone if group == g}
                assert dead_channels(masked, f"{layer}.weight", dim) == expected


@pytest.mark.parametrize("name", ["vit", "gqa"])
def test_activations_of_attention(name: str) -> None:
    """The hidden channels of feed-forward parts, by forward hooks: the last dimension is the channel."""
    model, x, task = case(name, torch.float64 if name == "vit" else torch.float32)
    seen: dict[str, list[Tensor]] = {}
    layers = {
        "vit": {"layers.layers.1.linear1": F.gelu},
        "gqa": {"gates.1": F.silu, "ups.1": lambda value: value},
    }[name]
    hooks = [
        model.get_submodule(layer).register_forward_hook(
            lambda module, args, out, layer=layer: seen.setdefault(layer, []).append(layers[layer](out).flatten(0, -2))
        )
        for layer in layers
    ]
    for batch, _ in task.read():
        model(batch)  # with gradients: without, a transformer layer takes a path around its own layers
    for hook in hooks:
        hook.remove()
    mean = sum(torch.cat(parts).double().mean(0) for parts in seen.values())
    assert isinstance(mean, Tensor)
    masked = fxcompress.compress(model, [ActivationMeanRankFilterPruner(0.35)], example_inputs=x, task=task)
    expected = set(mean.argsort()[: int(len(mean) * 0.35)].tolist())
    for layer in layers:
        assert dead_channels(masked, f"{layer}.weight") == expected


# ---- what a layer's own activation is --------------------------------------------------------------------------------


def test_every_kind_of_layer_shows_its_channels() -> None:
    """Embedding, recurrent layers of two levels and two directions, a layer that is called twice."""

    def step(n: Any, tokens: Tensor) -> Any:
        x, _ = n.rnn(n.embed(tokens))
        x = torch.tanh(n.twice(F.elu(n.twice(x))))
        return n.head(x)

    net = Net(
        step, embed=nn.Embedding(9, 6), rnn=nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True),
        twice=nn.Linear(10, 10), head=nn.Linear(10, 2),
    )  # fmt: skip
    x = torch.randint(0, 9, (3, 4))
    seen: dict[str, list[tuple[int, ...]]] = {}

    class Spy(ChannelPruner):
        reads = "activation"

        def score(self, layer: Layer) -> Tensor:
            seen.setdefault(layer.name, []).append(tuple(layer.activation.shape))
            return layer.activation.mean(1)

    masked = fxcompress.compress(net, [Spy(0.4)], example_inputs=x, task=Task(batches=[x[:2]]))
    assert set(seen) == {"embed", "rnn", "twice"}
    assert seen["embed"] == [(6, 8)]
    assert sorted(seen["rnn"]) == [(20, 2)] * 4 + [(20, 8)] * 4  # the lower layer shows in its last states alone
    assert seen["twice"] == [(5, 8)] * 4  # two calls; it is coupled with itself, so with either direction
    assert dead_channels(masked, "embed.weight", 1) == set(
        net.embed(x[:2]).flatten(0, 1).mean(0).topk(2, largest=False).indices.tolist()
    )


def test_queries_keys_and_values_of_one_weight_show_where_each_is_used() -> None:
    """A memory other than the queries' input: the weight is cut up before it is used."""
    net = Net(
        lambda n, x: n.head(n.attention(n.embed(x), n.memory(x), n.memory(x))[0]),
        embed=nn.Linear(3, 6), memory=nn.Linear(3, 6), attention=nn.MultiheadAttention(6, 2, batch_first=True),
        head=nn.Linear(6, 2),
    )  # fmt: skip
    x = torch.randn(4, 5, 3)
    pruner = ActivationMeanRankFilterPruner(0.4, include="attention", exclude="attention.out_proj")
    masked = fxcompress.compress(net, [pruner], example_inputs=x, task=Task(batches=[x]))
    weight, bias = net.attention.in_proj_weight, net.attention.in_proj_bias
    inputs = (net.embed(x), net.memory(x), net.memory(x))
    parts = zip(inputs, weight.chunk(3), bias.chunk(3), strict=True)
    q, k, v = (F.linear(y, w, b).flatten(0, 1).mean(0).reshape(2, 3) for y, w, b in parts)
    lowest_qk, lowest_v = ((q + k).argmin(1), v.argmin(1))  # one of three in each head
    expected = {3 * head + int(i) + start for start in (0, 6) for head, i in enumerate(lowest_qk)}
    expected |= {3 * head + int(i) + 12 for head, i in enumerate(lowest_v)}
    assert dead_channels(masked, "attention.in_proj_weight") == expected


def test_outputs_of_a_grouped_transposed_convolution_show_their_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    x = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shift = torch.tensor([2.0, -2.0, 0.0, -1.0, 3.0, 1.0])  # of each group of three one goes: the smallest
        model[1].bias.copy_(shift)
        model[1].weight.mul_(0.1)
    item = ActivationMeanRankFilterPruner(0.34, include=["1"])
    small = fxcompress.compress(model.eval(), [item, Speedup()], example_inputs=x, task=Task(batches=[x]))
    assert torch.equal(small.get_submodule("1").bias, shift[[0, 2, 4, 5]])


def test_folding_a_batch_norm_changes_no_activation() -> None:
    model, x, task = case("cnn", torch.float64)
    pruner = ActivationMeanRankFilterPruner(0.4)
    plain = fxcompress.compress(model, [pruner], example_inputs=x, task=task)
    folded = fxcompress.compress(model, [FoldBatchNorm(), pruner], example_inputs=x, task=task)
    found = fxcompress.masks(folded)
    for name, mask in fxcompress.masks(plain).items():
        if name.endswith("weight") and mask.dim() > 1:
            assert torch.equal(found[name], mask)


class Positive(ChannelPruner):
    reads = "activation"

    def score(self, layer: Layer) -> Tensor:
        assert bool((layer.activation >= 0).all())
        return layer.activation.amax(1)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Hardsigmoid(), nn.Softplus(), F.relu6, torch.exp, Tensor.relu_,
     lambda x: F.dropout(x, 0.5, False).square(), lambda x: x.double().relu().float()],
    ids=lambda f: getattr(f, "__name__", type(f).__name__),
)  # fmt: skip
def test_activations_are_found_however_they_are_written(activation: Any) -> None:
    net = Net(lambda n, x: n.b(activation(n.drop(n.norm(n.a(x))))), a=nn.Conv2d(2, 4, 1), norm=nn.BatchNorm2d(4),
              drop=nn.Dropout(), b=nn.Conv2d(4, 2, 1))  # fmt: skip
    x = torch.randn(3, 2, 4, 4)
    masked = fxcompress.compress(net, [Positive(0.5)], example_inputs=x, task=Task(batches=[x]))
    assert len(dead_channels(masked, "a.weight")) == 2


# ---- masked models, traces left behind -------------------------------------------------------------------------------


class Live(ChannelPruner):
    """Sees what a masked model computes."""

    reads: ClassVar[Any] = "gradient"

    def score(self, layer: Layer) -> Tensor:
        if layer.name == "fc1":
            assert bool((layer.gradient[layer.weight == 0] == 0).all())
        return (layer.gradient * layer.weight).flatten(1).sum(1).abs()


def test_a_masked_model_is_what_is_looked_at() -> None:
    """Scores of the rest are those of the masked model, which the removed model has too."""
    model, x, task = case("cnn", torch.float64)
    masked = fxcompress.compress(model, [L1FilterPruner(0.4)], example_inputs=x)
    small = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    for pruner in (TaylorFOPruner(0.7), ActivationMeanRankFilterPruner(0.7), Live(0.7)):
        more = fxcompress.compress(masked, [pruner], example_inputs=x, task=task)
        left = sorted(set(range(11)) - dead_channels(masked, "conv1.weight"))
        gone = {left.index(i) for i in dead_channels(more, "conv1.weight") - dead_channels(masked, "conv1.weight")}
        assert len(left) == 7
        assert len(gone) == int(11 * 0.7) - 4
        direct = fxcompress.compress(small, [type(pruner)(3.5 / 7, include="conv1")], example_inputs=x, task=task)
        assert dead_channels(direct, "conv1.weight") == gone


def test_nothing_is_left_behind() -> None:
    model, x, task = case("cnn")
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    for pruner in (TaylorFOPruner(0.3), ActivationMeanRankFilterPruner(0.3)):
        masked = fxcompress.compress(model, [pruner], example_inputs=x, task=task)
        assert all(p.grad is None and p.requires_grad for p in (*model.parameters(), *masked.parameters()))
        for name, tensor in state.items():
            assert torch.equal(masked.state_dict()[name], tensor), name
            assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(torch.get_rng_state(), random)
        assert masked.training
        assert not hasattr(masked, "_watchers")


def test_batches_are_seen_in_eval_mode() -> None:
    def watched(model: nn.Module, batch: Any) -> Tensor:
        assert not model.training
        assert not any(part.training for part in model.modules())
        return cross_entropy(model, batch)

    model, x, task = case("cnn")
    task = Task(batches=task.batches, loss=watched)
    for pruner in (TaylorFOPruner(0.3), ActivationMeanRankFilterPruner(0.3)):
        fxcompress.compress(model.train(), [pruner], example_inputs=x, task=task)


def test_frozen_parameters_have_gradients_all_the_same() -> None:
    model, x, task = case("cnn", torch.float64)
    expected = fxcompress.masks(fxcompress.compress(model, [TaylorFOPruner(0.4)], example_inputs=x, task=task))
    model.requires_grad_(False)
    found = fxcompress.masks(fxcompress.compress(model, [TaylorFOPruner(0.4)], example_inputs=x, task=task))
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pruner, task, message",
    [
        (TaylorFOPruner(0.5), None, r"batches is missing, which TaylorFOPruner needs.*loss is missing"),
        (TaylorFOPruner(0.5), Task(batches=BATCHES), r"loss is missing, which TaylorFOPruner needs"),
        (ActivationMeanRankFilterPruner(0.5), Task(loss=mean_square), r"batches is missing"),
        (ActivationAPoZRankFilterPruner(0.5, batches=3), Task(batches=BATCHES), r"gave 2 batches; expected 3"),
        (TaylorFOPruner(0.5, batches=3), Task(batches=BATCHES, loss=mean_square), r"gave 2 batches; expected 3"),
        (
            TaylorFOPruner(0.5),
            Task(batches=BATCHES, loss=lambda model, x: model(x).detach().sum()),
            r"has no gradient, which TaylorFOPruner needs",
        ),
    ],
)
def test_a_task_that_does_not_do(pruner: ChannelPruner, task: Task | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxcompress.compress(two_layers(), [pruner], example_inputs=BATCHES[0], task=task)


def test_what_is_missing_is_said_before_anything_runs() -> None:
    ran = []

    @fxcompress.graph_pass
    def first(module: Any) -> None:
        ran.append(module)

    with pytest.raises(InputError, match="loss is missing"):
        fxcompress.compress(
            two_layers(), [first, TaylorFOPruner(0.5)], example_inputs=BATCHES[0], task=Task(batches=BATCHES)
        )
    assert not ran


def test_numbers_that_are_none() -> None:
    bad = [*BATCHES, torch.full((2, 1), torch.nan)]
    with pytest.raises(TrainingError, match=r"activation of a holds NaN or infinite values at batch 3 of Activation"):
        fxcompress.compress(
            two_layers(), [ActivationMeanRankFilterPruner(0.5)], example_inputs=bad[0], task=Task(batches=bad)
        )
    with pytest.raises(TrainingError, match=r"the loss is nan at batch 3 of TaylorFOPruner"):
        fxcompress.compress(
            two_layers(), [TaylorFOPruner(0.5)], example_inputs=bad[0], task=Task(batches=bad, loss=mean_square)
        )
    root = Task(batches=[torch.ones(1, 1)], loss=lambda model, x: (model(x) * 0).sqrt().sum())
    with pytest.raises(TrainingError, match=r"gradient of a holds NaN or infinite values at batch 1"):
        fxcompress.compress(two_layers(), [TaylorFOPruner(0.5)], example_inputs=bad[0], task=root)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TaylorFOPruner(0.5, per="row"), "per is 'row'"),  # type: ignore[arg-type]
        (lambda: TaylorFOPruner(0.5, batches=0), "batches is 0"),
        (lambda: L1FilterPruner(0.5, batches=2), "L1FilterPruner looks at weights alone"),
        (lambda: L1FilterPruner(0.5, norm_by="mean"), "norm_by is 'mean'"),  # type: ignore[arg-type]
        (lambda: FPGMPruner(0.5, max_sparsity_per_group=1.0), r"max_sparsity_per_group is 1.0; expected a fraction"),
    ],
)
def test_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_criterion_that_forgot_to_say_what_it_reads() -> None:
    class Forgetful(ChannelPruner):
        def score(self, layer: Layer) -> Tensor:
            return layer.gradient.flatten(1).sum(1)

    with pytest.raises(PassError, match=r'layer.gradient was not measured. Write reads = "gradient"'):
        fxcompress.compress(two_layers(), [Forgetful(0.5)], example_inputs=BATCHES[0])
