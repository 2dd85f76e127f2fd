"""Quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcompress.errors import InputError
from fxcompress.passes.kernel_quantizer import KernelQuantizer
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.fake_quantize import AffineFakeQuantize, FakeQuantize
from fxcompress.quantization.insert import Slot
from fxcompress.quantization.observers import MovingAverage
from fxcompress.quantization.spec import QuantSpec, activation_spec, weight_spec
from fxcompress.task import require_count


@dataclass(frozen=True)
class QATQuantizer(KernelQuantizer):
    """Trains with rounding in the forward and straight-through gradients (Jacob et al. 2018, arXiv 1712.05877).

    Activations: ``scale * (clamp(round(x / scale) + zero_point, 0, 2^bits - 1) - zero_point)`` with a range that holds
    0, the exponential moving average of each batch's extremes (section 3.1). Weights: symmetric, from their current
    extremes, on the grid of the weight that BatchNorm is folded into with its running statistics; BatchNorm itself goes
    on with those of the batch (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2).

    Args:
        per_channel: a scale for every output channel of a weight, or one for the tensor.
        momentum: of the moving average.
        start_step: forwards in train mode before rounding begins; ranges are watched from the first.
        freeze_step: forwards in train mode after which ranges no longer change; None for never.
        symmetric: activations have zero point 0, with signed integers where calibration sees negative values:
            a coarser grid for what is mostly positive (SiLU), and faster in OpenVINO.

    See :class:`KernelQuantizer` and :class:`Quantizer` for the other options.
    """

    per_channel: bool = True
    momentum: float = 0.99
    start_step: int = 0
    freeze_step: int | None = None
    symmetric: bool = False

    folds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        MovingAverage(self.momentum)
        require_count("start_step", self.start_step, least=0)
        if self.freeze_step is not None:
            require_count("freeze_step", self.freeze_step, least=1)
            if self.freeze_step < self.start_step:
                raise InputError(
                    f"freeze_step is {self.freeze_step} and start_step is {self.start_step}; expected ranges to be "
                    "frozen after rounding began."
                )

    def weight_spec(self, bits: int) -> QuantSpec:
        """Symmetric, per output channel by default."""
        return weight_spec(bits, axis=0 if self.per_channel else None)

    def activation_spec(self, bits: int) -> QuantSpec:
        """Per tensor, affine by default, with a moving average."""
        return activation_spec(bits, MovingAverage(self.momentum), symmetric=self.symmetric)

    def make(self, slot: Slot, seen: Calibrator) -> FakeQuantize:
        """A grid that begins with what calibration saw; the first batch of training sets it anew."""
        made = AffineFakeQuantize(
            seen.fitting(), slot.channels, calls=slot.calls, start_step=self.start_step, freeze_step=self.freeze_step
        )
        made.set_range(*seen.range())
        return made
