"""Learned step size quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxcompress.passes.kernel_quantizer import KernelQuantizer
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.fake_quantize import FakeQuantize, LearnedFakeQuantize
from fxcompress.quantization.insert import Slot
from fxcompress.quantization.spec import QuantSpec


@dataclass(frozen=True)
class LSQQuantizer(KernelQuantizer):
    """Learns the step ``s`` of ``s * round(clamp(x / s, -Q_n, Q_p))`` with the weights (LSQ: Esser et al. 2020, arXiv
    1902.08153).

    Gradient of ``s`` (equation 3): ``round(x/s) - x/s`` inside, ``-Q_n`` or ``Q_p`` outside, times
    ``1 / sqrt(numel * Q_p)`` (section 2.2). ``s`` starts at ``2 * mean abs(x) / sqrt(Q_p)``, for activations of what
    calibration sees. Weights: ``Q_n = 2^(b-1)`` (of 8 bits 127), ``Q_p = 2^(b-1) - 1``; activations: ``0`` and
    ``2^b - 1`` where they are never negative, ``2^(b-1)`` and ``2^(b-1) - 1`` otherwise. The steps are parameters,
    ``_quant.<place>.scale``.

    Args:
        per_channel: a step for every output channel of a weight; the paper has one for the tensor.
        learn_offset: LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576): activations are affine, and their offset is learned
            too, starting at their smallest value.

    See :class:`KernelQuantizer` and :class:`Quantizer` for the other options.
    """

    per_channel: bool = False
    learn_offset: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()

    def weight_spec(self, bits: int) -> QuantSpec:
        """Signed and symmetric; of 8 bits without -128, whose negative is needed where BatchNorm's factor is."""
        axis = 0 if self.per_channel else None
        return QuantSpec(bits, "weight", signed=True, symmetric=True, narrow=bits == 8, axis=axis, learned=True)

    def activation_spec(self, bits: int) -> QuantSpec:
        """Unsigned; what is negative decides in :meth:`make`."""
        return QuantSpec(bits, "activation", signed=False, symmetric=not self.learn_offset, learned=True)

    def make(self, slot: Slot, seen: Calibrator) -> FakeQuantize:
        """Steps from the mean magnitude, or with an offset from the range."""
        spec = seen.fitting()
        low, high = seen.range()
        if not spec.symmetric:
            scale, _ = spec.grid(low, high)
            return LearnedFakeQuantize(spec, scale, low, calls=slot.calls)
        scale = 2 * seen.magnitude / math.sqrt(spec.quant_max)
        return LearnedFakeQuantize(spec, scale.masked_fill(scale == 0, 1.0), calls=slot.calls)
