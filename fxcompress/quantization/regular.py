"""Whether values lie on a regular grid, and on which."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.quantization.observers import rows

#: Symmetric integers of 8 bits.
_LARGEST = 127
#: In steps: how far from a multiple a value in float may be; and a remainder while the step is only roughly known, of
#: which one that counts is at least 1/127.
_SLACK, _ROUGHLY = 1e-3, 1 / 256


def common_step(values: Tensor, axis: int | None) -> Tensor | None:
    """The largest step of which all values are multiples, up to 127 of them: 0-d, or ``[channels]`` along ``axis``.

    Euclid's algorithm: from the largest value on, the step becomes the smallest remainder until there is none; a
    remainder is at most half a step. 1 where all values are zero, None if there is no such step.
    """
    sizes = rows(values, axis).double().abs()
    largest = sizes.amax(1)
    step = torch.where(largest > 0, largest, 1.0)
    for _ in range(_LARGEST.bit_length()):
        rest = (sizes - (sizes / step[:, None]).round() * step[:, None]).abs()
        rest = torch.where(rest > _ROUGHLY * step[:, None], rest, torch.inf).amin(1)
        step = torch.where(torch.isfinite(rest), rest, step)
    count = (largest / step).round()
    step = torch.where(count > 0, largest / count, step)  # of the largest value, rounding counts least
    steps = sizes / step[:, None]
    if not bool((count <= _LARGEST).all() and ((steps - steps.round()).abs() < _SLACK).all()):
        return None
    return (step if axis is not None else step[0]).to(values.dtype)
