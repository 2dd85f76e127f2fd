"""Low-bit weights, activations and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.context import Context
from fxcompress.module import TracedModule
from fxcompress.passes.quantizer import Quantizer
from fxcompress.quantization.bits import Bits, require_bits
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.fake_quantize import AffineFakeQuantize, FakeQuantize, round_through
from fxcompress.quantization.gradients import GradientQuantize
from fxcompress.quantization.insert import Slot
from fxcompress.quantization.sites import find_sites
from fxcompress.quantization.spec import QuantSpec, activation_spec
from fxcompress.rewrite import rewriting


@dataclass(frozen=True)
class DoReFaQuantizer(Quantizer):
    """Trains with k-bit weights, activations in [0, 1] and, if asked, k-bit gradients (Zhou et al. 2016, arXiv
    1606.06160).

    With ``quantize_k(x) = round(x (2^k - 1)) / (2^k - 1)``: weights ``2 quantize_k(tanh(w) / (2 max abs(tanh w)) + 1/2)
    - 1`` (equation 9), of one bit ``sign(w) mean abs(w)`` (equation 7); activations ``quantize_k(clamp(x, 0, 1))``
    (equations 10 and 11); gradients as in :class:`GradientQuantize` (equation 12). BatchNorm stays float behind the
    layer. Of a masked weight, zeros stay zeros and count in no mean.

    Args:
        weight_bits, activation_bits: 1 to 8.
        gradient_bits: of the gradient that arrives at each layer, 2 to 8; None for float.
        first_last: float by default, as in the paper (section 2.7).

    See :class:`Quantizer` for the other options.
    """

    weight_bits: Bits = 4
    activation_bits: Bits | None = 4
    first_last: Literal["same", "float"] | int = "float"
    gradient_bits: int | None = None

    needs_inputs: ClassVar[bool] = True
    least_bits: ClassVar[int] = 1
    own_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_bits is not None:
            require_bits("gradient_bits", self.gradient_bits)

    def weight_spec(self, bits: int) -> QuantSpec:
        """One scale for the tensor."""
        return QuantSpec(bits, "weight", signed=True, symmetric=True)

    def activation_spec(self, bits: int) -> QuantSpec:
        """Integers from 0."""
        return activation_spec(bits, None, symmetric=True)

    def quantize(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """A weight, differentiable but for the rounding."""
        step = self.step(x, spec)
        if spec.bits == 1:
            return _sign_through(x) * step
        levels = (1 << spec.bits) - 1
        squashed = torch.tanh(x)
        unit = squashed / (2 * squashed.abs().max().clamp(min=torch.finfo(x.dtype).tiny)) + 0.5
        return 2 * round_through(unit * levels) / levels - 1

    def step(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """Half the distance of neighbours, of which zero lies in the middle; for one bit, the magnitude."""
        if spec.bits == 1:
            size = x.detach().abs()  # what stands for a kept zero (keep_zeros) counts as little as zero
            return size.sum() / (size > torch.finfo(x.dtype).tiny).sum().clamp(min=1)
        return torch.ones_like(x[:0].sum()).detach() / ((1 << spec.bits) - 1)

    def make(self, slot: Slot, seen: Calibrator) -> FakeQuantize:
        """For activations the grid over [0, 1]."""
        if slot.layer:
            return super().make(slot, seen)
        made = AffineFakeQuantize(seen.spec, calls=slot.calls)
        made.set_range(torch.zeros(()), torch.ones(()))
        return made

    def finish(self, module: TracedModule, context: Context, seen: dict[str, Calibrator]) -> None:
        """Round what comes back into each quantized layer."""
        if self.gradient_bits is None:
            return
        with rewriting(module, self.name) as rewriter:
            for site in find_sites(module):
                name = f"_quant.gradients.{site.node.name}"
                if site.quantized and not rewriter.has_module(name):
                    rewriter.put_module(name, GradientQuantize(self.gradient_bits))
                    node = rewriter.insert_after(site.node, "call_module", name, (site.node,))
                    rewriter.replace(site.node, node)


def _sign_through(x: Tensor) -> Tensor:
    """The sign, with that of 0 as +1, and gradient 1."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype) + (x - x.detach())
