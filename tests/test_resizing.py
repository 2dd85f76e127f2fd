"""Resizing to the nearest element, however it is written: values stay on their grid, in simulation and in integers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from quantized_cases import quantizers, values
from torch import Tensor, nn

import fxcompress
from fxcompress.inputs import Inputs
from fxcompress.lower.agreement import GRID, agreement
from fxcompress.lower.features import has_int8_instructions
from fxcompress.lower.movement import moves
from fxcompress.passes import Lower, PTQQuantizer
from fxcompress.quantization.fake_quantize import ROLE
from fxcompress.quantization.sites import operation

X = values(4, 3, 6, 6)


class Resized(nn.Module):
    """Resizes between two convolutions."""

    def __init__(self, resize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.resize(self.first(x).relu()))
        return made


NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "default": lambda x: F.interpolate(x, scale_factor=2.0),
    "keyword": lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest"),
    "exact": lambda x: F.interpolate(x, size=(7, 6), mode="nearest-exact"),
    "module": nn.Upsample(scale_factor=1.5),
    "exact module": nn.Upsample((7, 6), mode="nearest-exact"),
    "nearest module": nn.UpsamplingNearest2d(scale_factor=2),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "keyword": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "module": nn.Upsample(scale_factor=2, mode="bicubic"),
}


def resized(module: fxcompress.TracedModule) -> torch.fx.Node:
    names = ("interpolate", "upsample", "upsamplingnearest2d")
    (found,) = (node for node in module.graph.nodes if operation(module, node) in names)
    assert isinstance(found, torch.fx.Node)
    return found


@pytest.mark.parametrize("resize", NEAREST.values(), ids=NEAREST)
def test_the_nearest_elements_need_no_grid_of_their_own(resize: Callable[[Tensor], Tensor]) -> None:
    simulated = fxcompress.compress(Resized(resize).eval(), [PTQQuantizer()], example_inputs=X)
    node = resized(simulated)
    assert moves(simulated, node)
    assert ROLE in node.all_input_nodes[0].meta
    assert not any(ROLE in user.meta for user in node.users)
    assert sum("activations" in name for name in quantizers(simulated)) == 2
    if not has_int8_instructions():
        return
    lowered = fxcompress.compress(simulated, [Lower()], example_inputs=X)
    assert GRID in resized(lowered).meta
    steps = [item.steps for item in agreement(simulated, lowered, Inputs.parse(X)) if item.steps]
    assert max(steps, default=0) <= 1


@pytest.mark.parametrize("resize", OTHERS.values(), ids=OTHERS)
def test_what_lies_in_between_is_rounded_anew(resize: Callable[[Tensor], Tensor]) -> None:
    simulated = fxcompress.compress(Resized(resize).eval(), [PTQQuantizer()], example_inputs=X)
    node = resized(simulated)
    assert not moves(simulated, node)
    assert [user.meta.get(ROLE) for user in node.users] == ["activation"]
    assert sum("activations" in name for name in quantizers(simulated)) == 3
    if has_int8_instructions():
        lowered = fxcompress.compress(simulated, [Lower()], example_inputs=X)
        with torch.no_grad():
            torch.testing.assert_close(lowered(X), simulated(X), rtol=0, atol=0.05)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_a_mode_by_position(mode: str) -> None:
    """Tracing names it; who edits a graph need not."""
    traced = fxcompress.trace(Resized(lambda x: F.interpolate(x, scale_factor=2.0, mode=mode)).eval(), X)
    node = resized(traced)
    node.args, node.kwargs = (node.all_input_nodes[0], None, 2.0, mode), {}
    traced.recompile()
    simulated = fxcompress.compress(traced, [PTQQuantizer()], example_inputs=X)
    node = resized(simulated)
    assert node.args[3] == mode
    assert moves(simulated, node) is (mode != "bilinear")
    assert any(ROLE in user.meta for user in node.users) is (mode == "bilinear")
