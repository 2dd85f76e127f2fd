"""The comparison of two models."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Clock
from torch import Tensor, nn

import fxcompress
from fxcompress import Step, compress, count, latency
from fxcompress.errors import InputError
from fxcompress.latency import Latency, merged
from fxcompress.passes import L1FilterPruner, Speedup
from fxcompress.report import Change, Report, Total, report
from fxcompress.search.history import SearchHistory
from fxcompress.search.trial import Proposal, Trial


class Net(nn.Module):
    """conv, norm without parameters, linear; a class token in the model itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) + self.token[:, None, None]
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_totals_and_changed_layers() -> None:
    found = report(Net(8), Net(2), torch.randn(4, 3, 6, 6), latency=False)
    # width w: token w, conv 27 w, head 5 w + 5; the norm's buffers are 2 w floats and one int64
    assert found.totals == (
        Total("params", 8 + 216 + 45, 2 + 54 + 15),
        Total("bytes", 4 * (8 + 216 + 45 + 16) + 8, 4 * (2 + 54 + 15 + 4) + 8),
        Total("macs", 27 * 8 * 16 + 8 * 5, 27 * 2 * 16 + 2 * 5),
    )
    assert found.rows == (
        Change("", "Net", (8,), (2,), (8, 2)),
        Change("conv", "Conv2d", (8, 3, 3, 3), (2, 3, 3, 3), (216, 54)),
        Change("norm", "BatchNorm2d", (8,), (2,), (0, 0)),
        Change("head", "Linear", (5, 8), (5, 2), (45, 15)),
    )


def test_without_inputs_there_are_no_macs() -> None:
    assert [total.name for total in report(Net(8), Net(2)).totals] == ["params", "bytes"]


def test_a_model_and_itself() -> None:
    model = Net(8)
    found = report(model, model, torch.randn(1, 3, 6, 6), latency=False)
    assert found.rows == ()
    assert all(total.before == total.after for total in found.totals)
    assert "No layer changed its shape." in str(found)
    assert "100.0%" in str(found)


def test_values_are_no_change_of_shape() -> None:
    masked = Net(8)
    nn.init.zeros_(masked.conv.weight)
    masked.register_module("_masks", nn.Module())
    masked.get_submodule("_masks").register_buffer("conv", torch.ones(8, dtype=torch.bool))
    found = report(Net(8), masked)
    assert found.rows == ()
    assert found.totals[0].before == found.totals[0].after
    assert found.totals[1].after == found.totals[1].before + 8  # a bool is a byte


def sequence(**layers: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


@pytest.mark.parametrize(
    "after, expected",
    [
        (lambda: sequence(a=nn.Linear(2, 3)), Change("b", "Linear", (4, 3), None, (16, 0))),
        (
            lambda: sequence(a=nn.Linear(2, 3), b=nn.Linear(3, 4), c=nn.PReLU()),
            Change("c", "PReLU", None, (1,), (0, 1)),
        ),
        (
            lambda: sequence(a=nn.Linear(2, 3, bias=False), b=nn.Linear(3, 4)),
            Change("a", "Linear", (3, 2), (3, 2), (9, 6)),
        ),
        (
            lambda: sequence(a=nn.Linear(2, 3), b=nn.Conv1d(3, 4, 1)),
            Change("b", "Conv1d", (4, 3), (4, 3, 1), (16, 16)),
        ),
    ],
    ids=["removed", "new", "bias dropped", "another class"],
)
def test_a_layer_that_is_not_the_same(after: Callable[[], nn.Module], expected: Change) -> None:
    assert report(sequence(a=nn.Linear(2, 3), b=nn.Linear(3, 4)), after()).rows == (expected,)


def test_layers_without_tensors_are_not_listed() -> None:
    assert report(sequence(a=nn.ReLU(), b=nn.Dropout()), sequence(b=nn.Identity())).rows == ()


def test_the_text_shows_every_figure() -> None:
    text = str(report(Net(8), Net(2), torch.randn(1, 3, 6, 6), latency=False))
    for part in ("3,496", "874", "25.0%", "conv", "8x3x3x3", "2x3x3x3", "(model)", "BatchNorm2d"):
        assert part in text
    assert str(Report((), (Change("c", "PReLU", None, (), (0, 1)),))).count("(new)") == 1
    assert "(removed)" in str(report(sequence(a=nn.PReLU()), nn.Module()))


def trials() -> tuple[Trial, ...]:
    """Five trials, the third of which failed."""
    scores = (0.5, 0.7, None, 0.6, 0.9)
    return tuple(
        Trial(i, Proposal((i + 1,), cost={"macs": 0.3 + i / 20}), "failed" if score is None else "done", score, 1.0, "")
        for i, score in enumerate(scores)
    )


@dataclass(frozen=True)
class Line:
    """A curve of a sensitivity."""

    name: str
    kind: str
    measured: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Lines:
    """A sensitivity."""

    dense: float
    curves: tuple[Line, ...]


def full_report(clock: Clock) -> Report:
    """A report that has every section."""
    before, after, x = Net(8), Net(2), torch.randn(1, 3, 6, 6)
    search = SearchHistory("Annealing<b>", trials(), 4, ("conv",), (8,), 0.95, {"macs": 0.5})
    made = fxcompress.trace(after, x)
    made.meta["history"] = (Step("Annealing<b>", "", True, 1.0, ("a note & more",), None, (search,)),)
    curves = Lines(
        0.95,
        (
            *(Line(f"group{i}", "sparsity", ((0.2, 0.9 - i / 50), (0.8, 0.5))) for i in range(12)),
            Line("conv", "bits", ((8.0, 0.9), (2.0, 0.4))),
            Line("failed", "bits", ()),
        ),
    )
    found = report(before, made, x, latency=False, sensitivity=curves, groups=fxcompress.channel_groups(before, x))
    times = tuple(fxcompress.Latency(seconds, 0.001, 1, 1, 10, (seconds,) * 10) for seconds in (0.2, 0.1))
    return replace(found, latency=(times[0], times[1]))


class Page(HTMLParser):
    """What a page shows, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[str] = []
        self.headings: list[str] = []
        self.references: set[str] = set()
        self.plots: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.references |= {value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")}
        self.references |= {url for _, value in attrs for url in re.findall(r"url\(([^)]*)\)", value or "")}
        self.ids |= {given["id"] or ""} if "id" in given else set()
        if tag == "svg":
            self.plots.append(given.get("aria-label") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown.append(data.strip())
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_html_is_one_file_that_refers_to_no_other(tmp_path: Path, clock: Clock) -> None:
    full_report(clock).to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert not page.open
    inside = {reference.removeprefix("#") for reference in page.references if reference.startswith("#")}
    assert page.references - {f"#{name}" for name in inside} == {"data:,"}  # an icon, or the browser asks for one
    assert inside <= page.ids
    for word in ("http", "<script", "@import", "javascript:"):
        assert word not in text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_page_has_every_section(tmp_path: Path, clock: Clock) -> None:
    full_report(clock).to_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.headings == [
        "Latency", "Widths", "Search: Annealing<b>", "Sensitivity", "Channel groups", "Layers", "Notes",
    ]  # fmt: skip
    assert page.plots == [
        "Latency before and after", "Widths before and after", "History of Annealing<b>",
        "Score against cost of Annealing<b>", "Score against sparsity", "Score against bits of the weight",
        "Channel groups",
    ]  # fmt: skip
    for part in ("25.0%", "2.00×", "3,496 → 874", "2 of 8", "8x3x3x3", "2x3x3x3", "group3", "a note & more", "budget"):
        assert any(part in shown for shown in page.shown), part
    assert "5 trials, 1 of them failed." in page.shown


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    report(Net(8), Net(2)).to_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.headings == ["Widths", "Layers"]
    report(Net(8), Net(8)).to_html(tmp_path / "report.html")
    assert not Page((tmp_path / "report.html").read_text(encoding="utf-8")).headings


@pytest.mark.parametrize("name, what", [("matplotlib.figure", "plots"), ("jinja2", "HTML")])
def test_what_the_page_needs_is_named(name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"{what} .*cannot be imported .*pip install 'fxcompress\[plot\]'"):
        report(Net(8), Net(2)).to_html(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_names_are_not_markup(tmp_path: Path) -> None:
    name = "[bold]<b>"
    found = report(sequence(**{name: nn.Linear(2, 2)}), nn.Module())
    assert name in str(found)
    found.to_html(str(tmp_path / "report.html"))
    assert "[bold]&lt;b&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_neither_model_is_changed() -> None:
    before, after = Net(8).train(), Net(2).train()
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in (before, after)]
    report(before, after, torch.randn(2, 3, 6, 6))
    for model, state in zip((before, after), states, strict=True):
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_is_no_model() -> None:
    wrong: Any = torch.randn
    with pytest.raises(InputError, match=r"after is a builtin.*; expected a torch\.nn\.Module"):
        report(Net(2), wrong)


# ---- time --------------------------------------------------------------------------------------------------------


class Sleeps(nn.Module):
    """A forward pass that takes so many seconds."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        super().__init__()
        self.seconds, self.clock = seconds, clock

    def forward(self, x: Tensor) -> Tensor:
        self.clock.sleep(self.seconds)
        return x


def test_a_model_that_got_slower_is_called_so(clock: Clock) -> None:
    found = report(Sleeps(0.002, clock), Sleeps(0.006, clock), torch.randn(3, 2))
    assert found.slower
    assert not found.faster
    assert found.latency is not None
    before, after = found.latency
    assert [each.median for each in found.latency] == pytest.approx([0.002, 0.006])
    text = str(found)
    assert f"SLOWER: it takes {after.median / before.median:.2f} times as long as before" in text
    assert f"medians of {before.runs} and {after.runs} runs, batch 3, 1 thread)" in text
    for each in (before, after):
        assert f"{each.median * 1e3:.3f} ms" in text
        assert f"{each.iqr * 1e3:.3f} ms" in text
    assert "masked" not in text


def test_a_model_that_got_faster_and_one_that_did_not_change(clock: Clock) -> None:
    faster = report(Sleeps(0.006, clock), Sleeps(0.002, clock), torch.randn(3, 2))
    assert faster.faster
    assert " times as fast (medians of" in str(faster)
    assert "SLOWER" not in str(faster)
    measured = Latency(0.010, 0.002, 1, 1, 40, (0.010,) * 40)
    slightly = Latency(0.0105, 0.002, 1, 1, 40, (0.0105,) * 40)  # notches: 0.5 ms on either side
    same = Report((), (), (measured, slightly))
    assert (same.slower, same.faster) == (False, False)
    assert "No difference in time that the measurements could tell" in str(same)
    clearly = Latency(0.0115, 0.002, 1, 1, 40, (0.0115,) * 40)
    assert Report((), (), (measured, clearly)).slower
    assert Report((), (), (clearly, measured)).faster


def test_both_models_are_measured_in_turns(clock: Clock) -> None:
    order: list[str] = []

    class Noted(Sleeps):
        def forward(self, x: Tensor) -> Tensor:
            order.append(str(self.seconds))
            return super().forward(x)

    report(Noted(0.004, clock), Noted(0.005, clock), torch.randn(1, 2))
    turns = [name for name, last in zip(order, [None, *order], strict=False) if name != last]
    assert turns == ["0.004", "0.005"] * (len(turns) // 2)
    assert len(turns) >= 6


def test_measurements_that_belong_together(clock: Clock) -> None:
    parts = [Latency(0.2, 0.1, 1, 4, 3, (0.1, 0.2, 0.3)), Latency(0.5, 0.0, 1, 4, 2, (0.4, 0.5))]
    found = merged(parts)
    assert (found.median, found.threads, found.batch, found.runs) == (0.3, 1, 4, 5)
    assert found.iqr == pytest.approx(0.2)
    one = latency(Sleeps(0.001, clock), torch.zeros(2, 2), threads=1, min_run_time=0.02)
    assert merged([one]).median == pytest.approx(one.median)
    assert merged([one]).iqr == pytest.approx(one.iqr)


def test_time_is_not_measured_without_inputs_or_on_no_device() -> None:
    assert report(Net(8), Net(2)).latency is None
    assert report(Net(8).to("meta"), Net(2).to("meta"), torch.randn(1, 3, 6, 6, device="meta")).latency is None


# ---- masked models -----------------------------------------------------------------------------------------------


def test_a_masked_model_is_shown_with_both_figures() -> None:
    model, x = Net(8).eval(), torch.randn(2, 3, 6, 6)
    masked = compress(model, [L1FilterPruner(0.5)], example_inputs=x)
    removed = compress(masked, [Speedup()], example_inputs=x)
    dense, after = count(model, x), count(removed, x)
    found = report(model, masked, x, latency=False)
    assert found.totals == tuple(
        Total(name, getattr(dense, name), getattr(dense, name), getattr(after, name))
        for name in ("params", "bytes", "macs")
    )
    text = str(found)
    assert "after Speedup" in text
    assert f"{after.macs:,}" in text
    assert report(masked, removed, x, latency=False).totals == tuple(
        Total(name, getattr(dense, name), getattr(after, name)) for name in ("params", "bytes", "macs")
    )
    assert report(model, masked).totals[1] == Total("bytes", dense.bytes, dense.bytes)
    assert "after Speedup" not in str(report(model, removed, x, latency=False))


def test_a_masked_model_that_is_slower_is_told_why() -> None:
    totals = (Total("params", 8, 8, 4),)
    slow = Report(totals, (), (Latency(0.1, 0.0, 1, 1, 9, (0.1,) * 9), Latency(0.2, 0.0, 1, 1, 9, (0.2,) * 9)))
    assert "masks cost time" in str(slow)


def test_an_operator_without_a_rule_is_named_with_what_stays_for_it() -> None:
    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(7, 13), nn.Linear(13, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.linalg.qr(self.a(x))[0])))

    model, x = Factored(), torch.randn(2, 15, 7)
    small = compress(model, [L1FilterPruner(0.5), Speedup()], example_inputs=x)
    assert [small.get_submodule(name).out_features for name in "abc"] == [13, 5, 4]
    found = report(model, small, x, latency=False)
    line = "L1FilterPruner: 13 channels of a stay: nothing is known about aten::linalg_qr (linalg_qr)"
    assert line in found.notes
    assert line in str(found)
    assert line in report(model, small).notes
