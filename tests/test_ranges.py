"""What ranges are: moving averages, shared ranges, and observers by brute force."""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from quantized_cases import Array, X, module_of, quantizers, small_network, values
from torch import Tensor, nn

from fxcompress import Pass, Task, compress
from fxcompress.errors import InputError
from fxcompress.passes import L1FilterPruner, PTQQuantizer, QATQuantizer
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.fake_quantize import AffineFakeQuantize, fake_quant_nodes
from fxcompress.quantization.observers import MSE, Entropy, MovingAverage, Observer, Percentile
from fxcompress.quantization.spec import QuantSpec, activation_spec, weight_spec


def test_moving_average_begins_with_the_first_batch() -> None:
    made = AffineFakeQuantize(activation_spec(8, MovingAverage(0.9))).train()
    made(torch.tensor([-1.0, 3.0]))
    assert (float(made.low), float(made.high)) == (-1, 3)
    made(torch.tensor([0.0, 5.0]))
    assert (float(made.low), float(made.high)) == pytest.approx((-0.9, 3.2))
    made(torch.tensor([math.nan, 5.0]))
    assert (float(made.low), float(made.high)) == pytest.approx((-0.9, 3.2))
    assert float(made.scale) == pytest.approx(4.1 / 255, rel=1e-5)


class Uneven(nn.Module):
    """A concatenation of values near zero and of values a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.large.weight *= 100

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.small(x), self.large(x)], 1))


@pytest.mark.parametrize(
    "item", [QATQuantizer(), PTQQuantizer(observer="moving_average"), PTQQuantizer()], ids=lambda item: str(item)[:40]
)
def test_a_shared_range_holds_what_all_its_places_see(item: Pass) -> None:
    torch.manual_seed(0)
    model, x = Uneven().eval(), values(8, 3, 6, 6)
    made = compress(model, [item], example_inputs=x)
    with torch.no_grad():
        wanted = model(x)
        assert float((made(x) - wanted).abs().max() / wanted.abs().max()) < 0.03
        made.train()
        for _ in range(100):
            made(x)
        assert float((made.eval()(x) - wanted).abs().max() / wanted.abs().max()) < 0.03


def shared(batches: list[list[list[float]]], momentum: float = 0.9, **options: Any) -> AffineFakeQuantize:
    """What is left of forwards that call one module at several places."""
    made = AffineFakeQuantize(activation_spec(8, MovingAverage(momentum)), calls=2, **options).train()
    for batch in batches:
        for place, seen in enumerate(batch):
            if seen:
                made(torch.tensor(seen), place=place)
    return made


def test_one_step_of_the_average_is_one_forward() -> None:
    forwards: list[list[list[float]]] = [[[-1.0, 0.0], [0.0, 3.0]], [[0.0, 5.0], [-2.0, 0.0]], [[], [-9.0, 0.0]]]
    made = shared(forwards[:1])
    assert (float(made.low), float(made.high), int(made.seen)) == (-1, 3, 1)
    made = shared(forwards[:2])
    assert (float(made.low), float(made.high)) == pytest.approx((-1.1, 3.2))
    assert float(made.scale) == pytest.approx(4.3 / 255, rel=1e-5)
    made = shared(forwards)  # the first place saw nothing the third time
    assert (float(made.low), float(made.high), int(made.seen)) == pytest.approx((-1.1 - 0.79, 3.2 - 0.32, 3))
    made = shared([*forwards[:2], [[math.nan], [0.0, 5.0]]])
    assert (float(made.low), float(made.high)) == pytest.approx((-1.1 + 0.11, 3.2 + 0.18))
    made = shared(forwards, freeze_step=1)
    assert (float(made.low), float(made.high)) == (-1, 3)
    assert float(made.scale) == pytest.approx(4 / 255, rel=1e-5)
    made = shared(forwards[:1], start_step=2)
    x = values(5)
    for rounded in (False, True):
        places = [made(x, place=0), made(x, place=1)]
        assert all(torch.equal(y, x) is not rounded for y in places)


def test_a_batch_of_nan_leaves_what_calibration_found() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    made = compress(model, [QATQuantizer()], example_inputs=X).train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made(X * math.nan)
    changed = [name for name, tensor in made.state_dict().items() if not torch.equal(before[name], tensor)]
    assert all(name.endswith(".seen") for name in changed)
    made(X)
    ranges = [q for name, q in quantizers(made).items() if "activations" in name]
    assert len(ranges) == 2
    assert all(math.isinf(before[f"{n}.low"]) for n, q in quantizers(made).items() if q in ranges)
    assert all(isinstance(q, AffineFakeQuantize) and float(q.low) <= 0 < float(q.high) for q in ranges)


def test_eval_and_freeze_leave_ranges_alone() -> None:
    network = small_network()
    made = compress(network, [QATQuantizer(freeze_step=2, start_step=1)], example_inputs=X)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items() if name.startswith("_quant.")}
    made.eval()(X * 3)
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in before.items())
    made.train()
    frozen: dict[str, Tensor] = {}
    for step in range(4):
        made(values(4, 3, 6, 6, seed=step, scale=1 + step))
        if step == 1:
            frozen = {n: t.clone() for n, t in made.state_dict().items() if n.startswith("_quant.") and "seen" not in n}
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in frozen.items())


def test_rounding_starts_with_start_step() -> None:
    network = small_network()
    made = compress(network, [QATQuantizer(start_step=1)], example_inputs=X).train()
    network = copy.deepcopy(network).train()
    torch.testing.assert_close(made(X), network(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made(X), network(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "entropy", "mse"])
def test_observers(observer: str) -> None:
    network = small_network()
    of_weights = "min_max" if observer == "entropy" else observer  # a handful of values has no histogram
    item = PTQQuantizer(observer=observer, weight_observer=of_weights)
    made = compress(network, [item], example_inputs=X)
    with torch.no_grad():
        wanted, found = network(X), made(X)
    assert float((wanted - found).norm() / wanted.norm()) < 0.05
    assert all(bool((q.grid().scale > 0).all()) for q in quantizers(made).values())  # type: ignore[union-attr]


# ---- observers -------------------------------------------------------------------------------------------------------


def seen(spec: Any, *batches: Tensor) -> tuple[float, float]:
    calibrator = Calibrator("here", spec)
    for batch in batches:
        calibrator.see(batch)
    low, high = calibrator.range()
    return float(low), float(high)


#: A long tail above, nothing below -1.
SKEWED = torch.randn(20_000, generator=torch.Generator().manual_seed(3)).exp() - 1


def test_percentile_leaves_out_half_at_each_end() -> None:
    low, high = seen(activation_spec(8, Percentile(99.0)), SKEWED[:12_000], SKEWED[12_000:])
    wanted = np.percentile(SKEWED.numpy(), [0.5, 99.5])
    width = 2 * 2.0 ** math.ceil(math.log2(float(SKEWED.max()))) / 8192  # of a bin
    assert low == pytest.approx(wanted[0], abs=2 * width)
    assert high == pytest.approx(wanted[1], abs=2 * width)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_the_best_of_all_fractions(bits: int) -> None:
    spec = activation_spec(bits, MSE())
    low, high = seen(spec, SKEWED)
    x = SKEWED.double().numpy()

    def error(fraction: float) -> float:
        scale = (x.max() - min(x.min(), 0)) * fraction / (2**bits - 1)
        zero = np.clip(np.rint(-min(x.min(), 0) * fraction / scale), 0, 2**bits - 1)
        return float((((np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale - x) ** 2).mean())

    mine = high / x.max()
    assert low == pytest.approx(mine * x.min(), rel=1e-3)
    assert error(mine) <= 1.01 * min(error(step / 100) for step in range(1, 101))


def kullback_leibler(counts: Array, edges: Array, low: float, high: float, levels: int) -> float:
    """Migacz 2017, with loops."""
    inside = [i for i, center in enumerate((edges[1:] + edges[:-1]) / 2) if low <= center <= high]
    if len(inside) < levels:
        return math.inf
    p = counts[inside].astype(float)
    p[0] += counts[: inside[0]].sum()
    p[-1] += counts[inside[-1] + 1 :].sum()
    q = np.zeros(len(inside))
    for level in range(levels):
        mine = [i for i in range(len(inside)) if i * levels // len(inside) == level]
        full = [i for i in mine if counts[inside[i]] > 0]
        for i in full:
            q[i] = counts[[inside[j] for j in mine]].sum() / len(full)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * math.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_entropy_is_the_best_of_all_fractions(role: str) -> None:
    spec = weight_spec(4, axis=None, observer=Entropy()) if role == "weight" else activation_spec(4, Entropy())
    x = SKEWED.numpy()
    low, high = seen(spec, SKEWED)
    reach = 2.0 ** math.ceil(math.log2(np.abs(x).max()))
    counts, edges = np.histogram(x, 8192, (-reach, reach))
    levels = spec.quant_max - spec.quant_min
    mine = kullback_leibler(counts, edges, low, high, levels)
    fractions = [step / 100 for step in (5, 10, 20, 30, 50, 75, 100)]
    others = [kullback_leibler(counts, edges, x.min() * f, x.max() * f, levels) for f in fractions]
    assert math.isfinite(mine)
    assert mine <= min(others) * 1.001 + 1e-9
    assert high < 0.9 * x.max()  # the tail is not worth its levels


def test_entropy_on_weights_per_channel() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3000, 4)).eval()
    with torch.no_grad():
        (weight,) = (tensor for name, tensor in layer.named_parameters() if name.endswith("weight"))
        weight.copy_(values(4, 3000, seed=6) ** 3)
        weight[3] = 0.5  # one value
    made = compress(layer, [PTQQuantizer(4, weight_observer="entropy")], example_inputs=values(2, 3000))
    grid = module_of(made, "0.weight").grid()
    assert grid is not None
    largest = layer.get_parameter("0.weight").detach().abs().amax(1) / 7
    assert bool((grid.scale[:3] < 0.9 * largest[:3]).all())
    torch.testing.assert_close(grid.scale[3], largest[3])


@pytest.mark.parametrize(
    "observer", [MovingAverage(0.9), Percentile(), Entropy(), MSE()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
@pytest.mark.parametrize("bits", [2, 8])
def test_constants_have_a_range(observer: Any, value: float, bits: int) -> None:
    spec = activation_spec(bits, observer)
    low, high = seen(spec, torch.full((30,), value), torch.full((2,), value))
    grid = spec.grid(torch.tensor(low), torch.tensor(high))
    step = float(grid.scale)
    assert math.isfinite(step)
    assert step > 0
    made = (np.clip(np.rint(value / step) + int(grid.zero_point), 0, 2**bits - 1) - int(grid.zero_point)) * step
    assert made == pytest.approx(value, abs=step / 2 + 1e-6)


@dataclass(frozen=True)
class Deviations(Observer):
    """As many standard deviations around the mean."""

    reads: ClassVar[Any] = "values"

    many: float = 2.0

    def search(
        self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec
    ) -> tuple[Tensor, Tensor]:
        share = counts / counts.sum(1, keepdim=True)
        mean = (values * share).sum(1)
        away = self.many * ((values - mean[:, None]).square() * share).sum(1).sqrt()
        return torch.maximum(mean - away, low), torch.minimum(mean + away, high)


class Last(Observer):
    """The extremes of the last batch."""

    def follow(self, extremes: Tensor, batch: Tensor) -> Tensor:
        return batch


def test_an_observer_of_ones_own() -> None:
    layer, batches = nn.Conv2d(3, 4, 3), [values(2, 3, 8, 8, seed=seed) * (seed + 1) for seed in range(3)]
    task = Task(batches=batches)
    made = compress(
        layer,
        [PTQQuantizer(observer=Deviations(), weight_observer=Deviations(1.0))],
        example_inputs=batches[0],
        task=task,
    )
    grids = {item.spec.role: item.grid() for _, item in fake_quant_nodes(made)}
    x, weight = torch.cat([item.reshape(-1) for item in batches]), layer.weight.detach().flatten(1)
    bin_width = 2 * 2.0 ** math.ceil(math.log2(float(x.abs().max()))) / 8192
    low, high = float(x.mean() - 2 * x.std()), float(x.mean() + 2 * x.std())
    assert float(grids["activation"].scale) == pytest.approx((high - low) / 255, abs=2 * bin_width / 255)
    mean, away = weight.mean(1), weight.std(1, correction=0)
    largest = torch.maximum((mean - away).abs(), (mean + away).abs())
    torch.testing.assert_close(grids["weight"].scale, largest / 127, rtol=1e-4, atol=0)

    last = compress(layer, [PTQQuantizer(observer=Last())], example_inputs=batches[0], task=Task(batches=batches[::-1]))
    (grid,) = (item.grid() for _, item in fake_quant_nodes(last) if item.spec.role == "activation")
    assert float(grid.scale) == pytest.approx(float(batches[0].max() - batches[0].min()) / 255)


def test_nothing_is_searched_in_a_pruned_channel() -> None:
    passes = [L1FilterPruner(0.5), PTQQuantizer(weight_observer=Deviations())]
    made = compress(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), passes, example_inputs=values(2, 3, 8, 8))
    (grid, _) = (item.grid() for _, item in fake_quant_nodes(made) if item.spec.role == "weight")
    assert int((grid.scale == 1).sum()) == 2


class Lost(Observer):
    """Loses its range on the way."""

    def follow(self, extremes: Tensor, batch: Tensor) -> Tensor:
        assert bool((extremes[0] <= extremes[1]).all())
        return extremes * math.nan


@pytest.mark.parametrize(
    "option, observer",
    [("observer", Deviations(math.nan)), ("weight_observer", Deviations(math.nan)), ("observer", Lost())],
    ids=str,
)
def test_a_range_that_is_not_finite(option: str, observer: Observer) -> None:
    item, x = PTQQuantizer(**{option: observer}), values(2, 3, 8, 8)
    with pytest.raises(InputError, match=rf"^{re.escape(repr(observer))} found a range that is not finite at "):
        compress(nn.Conv2d(3, 4, 3), [item], example_inputs=x, task=Task(batches=[x, x]))


def test_what_follows_extremes_goes_on_in_training() -> None:
    made = AffineFakeQuantize(activation_spec(8, Last())).train()
    for size in (1.0, 10.0, 3.0):
        made(torch.tensor([-size, size]))
        assert (float(made.low), float(made.high)) == (-size, size)
    assert not any(item.running for item in (Percentile(), Entropy(), MSE(), Deviations()))


def test_observers_that_nobody_would_call() -> None:
    with pytest.raises(TypeError, match="Wrong has a search, which nothing calls: its reads is 'extremes'"):

        class Wrong(Observer):
            def search(self, *args: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"Other.reads is 'hist'; expected one of extremes, values, histogram"):

        class Other(Observer):
            reads: ClassVar[Any] = "hist"


class Hidden(Observer):
    """Its option is no field: two of them would be equal."""

    def __init__(self, k: int) -> None:
        self.__dict__["k"] = k


def test_options_of_observers_are_fields() -> None:
    with pytest.raises(InputError, match="observer is a Hidden with k beside its fields; expected a frozen dataclass"):
        PTQQuantizer(observer=Hidden(3))


@pytest.mark.parametrize("option", ["observer", "weight_observer"])
@pytest.mark.parametrize("found", [["mse"], MSE, None, "average"], ids=str)
def test_what_is_no_observer(option: str, found: Any) -> None:
    with pytest.raises(InputError, match=f"^{option} is {re.escape(repr(found))}; expected one of 'min_max'.*Observer"):
        PTQQuantizer(**{option: found})


@pytest.mark.parametrize("candidates", [2.5, 50.0, True, "50", None, 1, 10_001])
def test_candidates_are_a_number_of_fractions(candidates: Any) -> None:
    with pytest.raises(InputError, match=f"candidates is {candidates!r}; expected an integer"):
        MSE(candidates)
