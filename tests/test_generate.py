"""Laws of the generated networks that the other property tests stand on."""

import copy
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.generate import MAX_OPS, VARIANTS, Op, Spec, inputs, motifs, network, networks
from fxcompress.motifs import MOTIFS


def run(model: nn.Module, *args: Tensor) -> tuple[Tensor, ...]:
    result = model(*args)
    return result if isinstance(result, tuple) else (result,)


def check_runs(spec: Spec, batches: tuple[int, ...]) -> None:
    model = network(spec)
    for batch in batches:
        (x,) = inputs(spec, batch)
        before = x.clone()
        for training in (True, False):
            for y in run(model.train(training), x):
                assert y.shape[0] == batch
                assert y.dtype == torch.float32
                assert y.isfinite().all()
        assert torch.equal(x, before), "the network writes into its input"
    loss = torch.stack([y.square().mean() for y in run(model.train(), *inputs(spec))]).sum()
    if loss.requires_grad:
        torch.autograd.backward(loss)
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unreached


@given(networks(), st.integers(0, 2**MAX_OPS - 1), st.integers(1, 5))
def test_every_sublist_is_a_network(spec: Spec, keep: int, batch: int) -> None:
    ops = tuple(op for i, op in enumerate(spec.ops) if keep >> i & 1)
    check_runs(spec, (batch,))
    check_runs(Spec(ops, spec.seed, spec.channels, spec.size), (batch,))


@pytest.mark.parametrize("kind", MOTIFS)
def test_every_form_runs_on_every_shape(kind: str) -> None:
    for variant in range(VARIANTS):
        for channels, size in ((1, (2, 2)), (3, (6, 7)), (4, (3, 8))):
            check_runs(Spec((Op(kind, 3 + variant % 4, variant, tap="full"),), 1, channels, size), (1, 3))


@given(networks())
def test_the_same_spec_gives_the_same_network(spec: Spec) -> None:
    state = torch.get_rng_state()
    one, two = network(spec), network(copy.deepcopy(spec))
    assert torch.equal(state, torch.get_rng_state()), "building moved the global generator"
    assert str(one) == str(two)
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    for a, b in zip(run(one, *inputs(spec)), run(two, *inputs(spec)), strict=True):
        assert torch.equal(a, b)


@given(networks())
def test_rows_of_a_batch_do_not_mix(spec: Spec) -> None:
    model, (x,) = network(spec).eval(), inputs(spec, 3)
    with torch.no_grad():
        whole = run(model, x)
        for i in range(3):
            for a, b in zip(whole, run(model, x[i : i + 1]), strict=True):
                assert (a[i : i + 1] - b).abs().max() <= 1e-5 * max(1.0, a.abs().max().item())


@given(networks())
def test_copies_are_equal_and_own_their_weights(spec: Spec) -> None:
    model = network(spec).eval()
    before = run(model, *inputs(spec))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(before, run(twin, *inputs(spec)), strict=True):
            assert torch.equal(a, b)
        for p in twin.parameters():
            p.data.fill_(float("nan"))
    for a, b in zip(before, run(model, *inputs(spec)), strict=True):
        assert torch.equal(a, b)


def test_every_motif_is_drawn() -> None:
    """At least a third as often as if all were drawn equally often, not counting where it decodes to nothing."""
    seen: Counter[str] = Counter()
    draws: list[Spec] = []

    @settings(
        max_examples=300,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(networks())
    def draw(spec: Spec) -> None:
        draws.append(spec)
        seen.update(motifs(spec))

    draw()
    assert 270 <= len(set(draws)) <= 300
    assert all(1 <= len(spec.ops) <= MAX_OPS for spec in draws)
    assert {op.tap for spec in draws for op in spec.ops} == {"none", "full", "mean"}
    fair = sum(len(spec.ops) for spec in draws) / len(MOTIFS)
    rare = {kind: seen[kind] for kind in MOTIFS if seen[kind] < fair / 3}
    assert not rare


@given(networks(kinds=("residual", "concat"), max_ops=3))
def test_kinds_and_length_can_be_chosen(spec: Spec) -> None:
    assert 1 <= len(spec.ops) <= 3
    assert motifs(spec) <= {"residual", "concat"}


def test_inputs_are_drawn_apart_from_the_weights() -> None:
    spec = Spec((), 5, 4, (6, 6))
    same_seed = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(inputs(spec)[0], same_seed)
    assert torch.equal(inputs(spec)[0], inputs(spec)[0])


def test_what_does_not_apply_is_not_counted() -> None:
    spec = Spec((Op("slice_channels"), Op("activation")), channels=1)
    assert motifs(spec) == {"activation"}


def test_outputs() -> None:
    body = (Op("conv_bn_relu", 5, tap="full"), Op("pool", tap="mean"))
    assert [tuple(y.shape) for y in run(network(Spec(body)), *inputs(Spec(body)))] == [
        (2, 5, 6, 7),
        (2, 5),
        (2, 5, 3, 4),
    ]
    headed = Spec((Op("head"), Op("conv_bn_relu", 4), Op("head", variant=2)))
    assert [tuple(y.shape) for y in run(network(headed), *inputs(headed))] == [(2, 5), (2, 5)]
    assert isinstance(network(Spec(())).eval()(*inputs(Spec(()))), Tensor)


def test_names_and_values() -> None:
    model = network(Spec((Op("residual", 6), Op("tied_weights"), Op("shared_conv", variant=2))))
    assert [name for name, _ in model.named_children()][:5] == ["conv0", "norm0", "conv1", "norm1", "conv2"]
    assert model.get_submodule("conv2").weight is model.get_submodule("conv3").weight
    assert model.get_submodule("alias0") is model.get_submodule("conv4")
    norm = model.get_submodule("norm0")
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    assert norm.running_mean.abs().min() > 0
    assert 0.5 <= norm.running_var.min() < norm.running_var.max() <= 2
    assert 0.5 <= norm.weight.abs().min() < norm.weight.abs().max() <= 1.5
    assert norm.num_batches_tracked == 0
    assert norm.bias.abs().min() > 0


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Op("convolve"),
        lambda: Op("residual", width=0),
        lambda: Op("residual", variant=-1),
        lambda: Spec((), channels=0),
        lambda: Spec((), size=(1, 4)),
        lambda: Spec((), seed=-1),
    ],
)
def test_a_spec_that_cannot_be_decoded_is_refused(bad: object) -> None:
    assert callable(bad)
    with pytest.raises(ValueError, match="expected"):
        bad()


def test_specs_print_as_they_are_written() -> None:
    spec = Spec((Op("residual", 5, 2, "mean"),), 7, 4, (6, 9))
    assert eval(repr(spec)) == spec
    assert hash(spec) == hash(copy.deepcopy(spec))


def test_hypothesis_is_needed_by_the_strategy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, fxcompress.generate; sys.exit('hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match="pip install hypothesis"):
        networks()
