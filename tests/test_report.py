"""The comparison of two models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import InputError
from fxcompress.report import Change, Report, Total, report


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
    found = report(Net(8), Net(2), torch.randn(4, 3, 6, 6))
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
    found = report(model, model, torch.randn(1, 3, 6, 6))
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
    text = str(report(Net(8), Net(2), torch.randn(1, 3, 6, 6)))
    for part in ("3,496", "874", "25.0%", "conv", "8x3x3x3", "2x3x3x3", "(model)", "BatchNorm2d"):
        assert part in text
    assert str(Report((), (Change("c", "PReLU", None, (), (0, 1)),))).count("(new)") == 1
    assert "(removed)" in str(report(sequence(a=nn.PReLU()), nn.Module()))


def test_html_is_one_file_that_refers_to_no_other(tmp_path: Path) -> None:
    found = report(Net(8), Net(2))
    found.to_html(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.lstrip().startswith("<!DOCTYPE html>")
    for part in ("conv", "8x3x3x3", "2x3x3x3", "params"):
        assert part in html
    for reference in ("src=", "href=", "http", "@import", "url("):
        assert reference not in html


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
