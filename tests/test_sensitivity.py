"""Sensitivity: what is measured is what really removing channels, or really rounding weights, gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_cases import TASK, X, distance, failing, network, score
from test_searching_pruners import Encoder
from torch import nn

import fxcompress
from fxcompress import InputError, SelectionError, Sensitivity, Task
from fxcompress.masking import Masking
from fxcompress.passes import L1FilterPruner, Speedup
from fxcompress.search.widths import norms


def measured(**options: object) -> Sensitivity:
    given = {"sparsities": (0.3, 0.6), "bits": (4, 2), **options}
    return fxcompress.sensitivity(network(), TASK, example_inputs=X[:2], **given)  # type: ignore[arg-type]


def test_a_coupled_layer_is_measured_as_its_removal_is() -> None:
    found = measured(bits=())
    assert {curve.name: curve.layers for curve in found.groups}["stem"] == ("stem", "conv2")
    for curve in found.groups:
        for sparsity, value in curve.measured:
            wanted = dict.fromkeys(curve.layers, sparsity)
            small = fxcompress.compress(network(), [L1FilterPruner(wanted), Speedup()], example_inputs=X[:2])
            assert small.get_parameter(f"{curve.name}.weight").shape[0] == curve.units - int(curve.units * sparsity)
            assert score(small) == pytest.approx(value, abs=1e-6)


def test_statistics_over_live_channels() -> None:
    """Norms over a masked width: mask nodes are laid, and the score is that of the removed model."""
    torch.manual_seed(2)
    model, x = Encoder().eval().double(), torch.randn(6, 5, 9).double()
    with torch.no_grad():
        wanted = model(x)
    task = Task(score=lambda model: -float((model(x) - wanted).square().mean()))
    found = fxcompress.sensitivity(model, task, example_inputs=x[:2], sparsities=[0.5], bits=())
    assert len(found.groups) > 4
    for curve in found.groups:
        (point,) = curve.measured
        pruner = L1FilterPruner(dict.fromkeys(curve.layers, 0.5))
        parts = [group for group in fxcompress.channel_groups(model, x[:2]) if set(group.layers) & set(curve.layers)]
        if len(parts) > 1:
            continue  # a layer of several groups has one sparsity for all of them
        small = fxcompress.compress(model, [pruner, Speedup()], example_inputs=x[:2])
        assert task.measure(small) == pytest.approx(point[1], rel=1e-9)


def test_a_layers_bits_are_those_of_a_quantizer() -> None:
    found = measured(sparsities=())
    assert [curve.name for curve in found.layers] == ["stem", "conv1", "conv2", "last", "head"]
    for curve in found.layers:
        assert [point.value for point in curve.points] == [4, 2]
        scores = [value for _, value in curve.measured]
        assert scores[0] > scores[1]


def test_the_ranking_is_that_of_l1_norms() -> None:
    model = network()
    traced = fxcompress.trace(model, X[:2])
    groups = [group for group in fxcompress.channel_groups(model, X[:2]) if group.removable]
    found = dict(zip([group.name for group in groups], norms(groups, traced, Masking()), strict=True))
    layers = [model.get_parameter(f"{name}.weight").detach().abs().flatten(1).sum(1) for name in ("stem", "conv2")]
    assert torch.from_numpy(found["stem"]) == pytest.approx((layers[0] + layers[1]).double(), rel=1e-5)


def test_an_early_stop_leaves_out_what_is_worse_still() -> None:
    whole = measured(sparsities=(0.3, 0.6, 0.9), bits=())
    limit = sorted(curve.measured[1][1] for curve in whole.groups)[0] + 1e-6
    found = measured(sparsities=(0.3, 0.6, 0.9), bits=(), drop=float(whole.dense - limit) / whole.dense)
    for curve, full in zip(found.groups, whole.groups, strict=True):
        stops = [index for index, (_, value) in enumerate(full.measured) if value < limit]
        assert curve.points == full.points[: stops[0] + 1 if stops else None]
    assert sum(len(curve.points) for curve in found.groups) < sum(len(curve.points) for curve in whole.groups)


def test_what_a_drop_allows() -> None:
    found = measured(bits=())
    curve = max(found.groups, key=lambda curve: found.dense - curve.measured[1][1])
    (low, high), (x0, x1) = ([v for _, v in curve.measured], [s for s, _ in curve.measured])
    middle = (low + high) / 2
    drop = (found.dense - middle) / found.dense
    assert curve.allowed(found.dense, drop) == pytest.approx((x0 + x1) / 2)
    assert curve.allowed(found.dense, 10.0) == x1


def test_drops_of_a_score_that_is_0_are_fractions_of_how_far_it_falls() -> None:
    options: dict[str, object] = {"example_inputs": X[:2], "sparsities": (0.3, 0.6, 0.9), "bits": (8, 2)}
    task = replace(TASK, score=distance)
    whole = fxcompress.sensitivity(network(), task, **options)  # type: ignore[arg-type]
    assert whole.dense == pytest.approx(0, abs=1e-6)
    lowest = min(row.score for row in whole.table if row.score is not None)
    assert max(row.drop for row in whole.table if row.drop is not None) == pytest.approx(1)
    assert whole.scale == pytest.approx(-lowest, abs=1e-6)
    found = fxcompress.sensitivity(network(), task, drop=0.1, **options)  # type: ignore[arg-type]
    counts = [len(curve.points) for curve in found.curves]
    assert max(counts) > 1
    assert sum(counts) < len(whole.table)


def test_layers_are_chosen_as_by_other_passes() -> None:
    found = measured(exclude="conv2")
    assert [curve.name for curve in found.groups] == ["conv1", "last"]  # the stem shares its channels with it
    assert [curve.name for curve in found.layers] == ["stem", "conv1", "last", "head"]
    found = measured(include=[nn.Linear, "last"])
    assert [curve.name for curve in found.curves] == ["last", "last", "head"]
    whole = {(row.name, row.kind, row.value): row.score for row in measured().table}
    assert {row.score == whole[row.name, row.kind, row.value] for row in found.table} == {True}
    with pytest.raises(SelectionError, match="include='lost' matches none"):
        measured(include="lost")


def test_rows_text_and_plot(tmp_path: Path) -> None:
    found = measured()
    rows = found.table
    assert len(rows) == 3 * 2 + 5 * 2
    for row in rows:
        assert row.score is not None
        assert row.drop == pytest.approx((found.dense - row.score) / found.dense)
    text = str(found)
    assert all(curve.name in text for curve in found.curves)
    assert "2 bits" in text
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.count("<svg") == 1


def test_a_failing_trial_leaves_a_gap() -> None:
    found = fxcompress.sensitivity(network(), replace(TASK, score=failing), example_inputs=X[:2], bits=())
    failed = [row for row in found.table if row.score is None]
    assert failed
    assert len(failed) < len(found.table)
    assert "failed" in str(found)


def test_a_masked_module_is_measured_from_where_it_is() -> None:
    masked = fxcompress.compress(network(), [L1FilterPruner({"conv1": 0.5})], example_inputs=X[:2])
    found = fxcompress.sensitivity(masked, TASK, example_inputs=X[:2], sparsities=(0.3, 0.6), bits=())
    assert found.dense == pytest.approx(score(masked), abs=1e-6)
    (curve,) = [curve for curve in found.groups if curve.name == "conv1"]
    assert curve.measured[0][1] == pytest.approx(found.dense)  # as many have gone already
    assert curve.measured[1][1] < found.dense


def test_a_journal_is_gone_on_from(tmp_path: Path) -> None:
    calls = [0]

    class Stopping:
        limit = 4

        def __call__(self, model: nn.Module) -> float:
            calls[0] += 1
            if calls[0] == self.limit:
                raise SystemExit
            return score(model)

        def __repr__(self) -> str:
            return "Stopping"

    path, stopping = tmp_path / "journal", Stopping()
    task, options = Task(score=stopping), {"example_inputs": X[:2], "sparsities": (0.3, 0.6), "bits": (4, 2)}
    with pytest.raises(SystemExit):
        fxcompress.sensitivity(network(), task, checkpoint=path, **options)  # type: ignore[arg-type]
    assert calls == [4]
    stopping.limit = 0
    found = fxcompress.sensitivity(network(), task, checkpoint=path, **options)  # type: ignore[arg-type]
    assert found == measured()
    assert calls == [4 + 17 - 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": Task()}, "score is missing"),
        ({"task": None}, "task is a NoneType"),
        ({"sparsities": (0.5, 1.0)}, r"sparsities holds 1\.0"),
        ({"bits": (9,)}, "bits holds 9"),
        ({"drop": -1.0}, r"drop is -1\.0"),
        ({"example_inputs": None}, "example_inputs is missing"),
    ],
)
def test_unusable_arguments(options: dict[str, object], message: str) -> None:
    given = {"task": TASK, "example_inputs": X[:2], **options}
    with pytest.raises(InputError, match=message):
        fxcompress.sensitivity(network(), **given)  # type: ignore[arg-type]
