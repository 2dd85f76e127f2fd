"""What the comparison of a lowered graph with its simulation sees."""

import math

import torch
from torch import Tensor, nn

from fxcompress import trace
from fxcompress.inputs import Inputs
from fxcompress.lower.agreement import agreement


class Mean(nn.Module):
    def __init__(self, keepdim: bool, factor: float) -> None:
        super().__init__()
        self.keepdim, self.factor = keepdim, factor

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean((2, 3), keepdim=self.keepdim) + 1) * self.factor


def test_another_shape_and_another_result_are_disagreements() -> None:
    inputs = Inputs.parse(torch.randn(2, 3, 4, 4))
    right, *others = (
        trace(Mean(*options), inputs) for options in ((True, 2.0), (True, 2.0), (False, 2.0), (True, 3.0))
    )
    same, flat, larger = ({item.name: item.difference for item in agreement(right, item, inputs)} for item in others)
    assert same == {"mean": 0, "add": 0, "mul": 0, "output": 0}
    assert flat["mean"] == math.inf
    assert math.isclose(larger["mul"], 0.5, rel_tol=1e-6)
    assert larger["mean"] == larger["add"] == 0
