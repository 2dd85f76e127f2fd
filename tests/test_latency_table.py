"""Budgets of latency, with a clock of our own: time is work, and what it costs to start an operator."""

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import Net
from test_budget import NETS, build, conv, priced
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from fxcompress import Budget, InputError, latency_table
from fxcompress.latency_table import in_turns, measure, removed
from fxcompress.passes import L1FilterPruner, Speedup
from fxcompress.timings import Timings


class Work:
    """A stopwatch that shows a second for every 10^9 FLOPs, and how often it was asked."""

    def __init__(self, start: float = 1e-6) -> None:
        self.start, self.calls = start, 0

    def __call__(self, call: Callable[[], object], least: float) -> float:
        self.calls += 1
        with FlopCounterMode(display=False) as counter:
            call()
        return self.start + counter.get_total_flops() * 1e-9


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Work:
    made = Work()
    monkeypatch.setattr(latency_table, "stopwatch", made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


@pytest.mark.parametrize("name", ["residual", "grouped", "joined"])
def test_predictions_are_those_of_the_clock(name: str) -> None:
    """Where time is work the table is all but exact, also for widths that it has not seen."""
    net, x = NETS[name]
    module, context, prices = priced(net, x)
    groups, inputs = context.groups(module), context.inputs
    assert inputs is not None
    watch = Work(0.0)
    table = measure(module, groups, inputs, prices, timings=Timings(":memory:"), watch=watch)
    assert table.error < 0.05, str(table)
    assert table.scale == pytest.approx(1, abs=0.02)
    random = np.random.default_rng(5)
    for kept in random.integers(np.maximum(prices.units // 3, 1), prices.units + 1, (4, len(prices.units))):
        _, seconds = in_turns([module, removed(module, groups, prices, kept)], inputs, watch)
        assert float(table.figure.value(kept[None].astype(np.float64))[0]) == pytest.approx(seconds, rel=0.1)


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    net, x = NETS["residual"]
    module, context, prices = priced(net, x)
    groups, inputs, watch = context.groups(module), context.inputs, Work()
    assert inputs is not None
    first = measure(module, groups, inputs, prices, timings=Timings(tmp_path / "deep" / "t.sqlite"), watch=watch)
    calls = watch.calls
    again = Timings(tmp_path / "deep" / "t.sqlite")
    assert len(again) > 20
    second = measure(module, groups, inputs, prices, timings=again, watch=watch)
    assert str(second) == str(first)
    assert (second.figure.linear == first.figure.linear).all()
    assert watch.calls - calls == 30  # six whole models, five times: they are measured every time
    known = len(again)
    measure(module, groups, inputs.map(lambda t: t[..., :-1]), prices, timings=again, watch=watch)
    assert len(again) > 1.5 * known  # another size is another entry


def test_another_number_of_threads_is_another_entry(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert Timings(tmp_path / "t").seconds("conv", lambda: 1.0) == 1.0
        assert Timings(tmp_path / "t").seconds("conv", lambda: 2.0) == 1.0
        torch.set_num_threads(threads + 1)
        assert Timings(tmp_path / "t").seconds("conv", lambda: 3.0) == 3.0
    finally:
        torch.set_num_threads(threads)


def test_a_table_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no database at all" * 100)
    with pytest.raises(InputError, match=r"the table of latencies '.*broken' cannot be used: .*\. Delete it"):
        Timings(tmp_path / "broken")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be used"):
        Timings(tmp_path / "file" / "below")
    file = sqlite3.connect(tmp_path / "other")
    file.execute("CREATE TABLE timings (name TEXT)")
    file.close()
    with pytest.raises(InputError, match="cannot be used"):
        Timings(tmp_path / "other")


def plain(net: Net, x: Tensor) -> Tensor:
    return net.four(net.three(net.two(net.one(x).relu()).relu()).relu()).mean((2, 3))


def network(name: str) -> tuple[nn.Module, Tensor]:
    if name != "plain":
        return build(name)
    widths = {"one": conv(3, 40, 3), "two": conv(40, 50, 3), "three": conv(50, 60, 3), "four": conv(60, 5)}
    return Net(plain, **widths), torch.randn(2, 3, 12, 12)


@pytest.mark.parametrize("ratio", [0.7, 0.5])
@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in ("resnet18", "mobilenet_v2"))]
)
def test_a_latency_budget_is_met(work: Work, name: str, ratio: float) -> None:
    model, x = network(name)
    small = fxcompress.compress(
        model, [L1FilterPruner(budget=Budget(latency=ratio)), Speedup()], example_inputs=x, verify=False
    )
    before, after = work(lambda: model(x), 0), work(lambda: small(x), 0)
    assert after / before == pytest.approx(ratio, rel=0.1)
    notes = " ".join(note for step in small.meta["history"] for note in step.notes)
    assert "its predictions for 2 models of other widths are off by" in notes
    assert "latency measured: " in notes


def test_a_prediction_that_is_wrong_is_corrected(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says that half of the time cannot be saved: what is measured decides."""
    model, x = network("plain")
    made = latency_table.measure

    def wrong(*args: object, **options: object) -> latency_table.LatencyTable:
        table = made(*args, **options)  # type: ignore[arg-type]
        flat = replace(table.figure.scaled(0.5), constant=table.dense * 0.5)
        return replace(table, figure=flat)

    monkeypatch.setattr("fxcompress.passes.allowance.measure", wrong)
    passes = [L1FilterPruner(budget=Budget(latency=0.75)), Speedup()]
    small = fxcompress.compress(model, passes, example_inputs=x, verify=False)
    before, after = work(lambda: model(x), 0), work(lambda: small(x), 0)
    assert after / before == pytest.approx(0.75, rel=0.1)
    measured = [note for step in small.meta["history"] for note in step.notes if note.startswith("latency measured")]
    assert len(measured) > 1


def test_latency_and_macs_together(work: Work) -> None:
    net, x = NETS["residual"]
    assert isinstance(net, Net)
    budget = Budget(latency=0.8, macs=0.5)
    small = fxcompress.compress(net, [L1FilterPruner(budget=budget), Speedup()], example_inputs=x)
    assert fxcompress.count(small, x).macs <= 0.5 * fxcompress.count(net, x).macs
