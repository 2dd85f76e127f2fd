"""Weights to 8 bits, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxcompress.passes.quantizer import Quantizer
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.fake_quantize import AffineFakeQuantize, FakeQuantize
from fxcompress.quantization.insert import Slot


@dataclass(frozen=True)
class NaiveQuantizer(Quantizer):
    """Rounds weights to ``scale * round(w / scale)`` with ``scale = max abs(w) / 127``, symmetric per tensor.

    With other ``weight_bits``, 127 is ``2^(bits-1) - 1``. Activations stay float unless ``activation_bits`` is given:
    then they get the range that calibration sees. See :class:`Quantizer` for the other options.
    """

    versioned: ClassVar[bool] = True

    def make(self, slot: Slot, seen: Calibrator) -> FakeQuantize:
        """A grid over the extremes."""
        made = AffineFakeQuantize(seen.spec, slot.channels, calls=slot.calls)
        made.set_range(*seen.range())
        return made
