"""The first convolution of a network, which rounds the image that it looks at."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.lower.prepacked import Kernel
from fxcompress.lower.quantized import QuantizedConvolution

#: As many channels as one float32 holds exactly, eight bits each.
IMAGE_CHANNELS = 3


class QuantizedStem(QuantizedConvolution):
    """``post(conv2d(round(x), weight, bias))`` of a float image ``x [batch, 1 to 3, height, width]``; see
    :class:`QuantizedConvolution`.

    A pixel becomes one 32-bit word, ``r + 256 g + 65536 b``: no transposition byte by byte, which takes as long as the
    convolution. The words lie in a border of zero points, so that the kernel needs neither padding nor zero point.
    """

    def pack(self, x: Tensor) -> Kernel:
        top, left = self.geometry.padding
        channels = self.weight.shape[1]
        batch, _, height, width = x.shape
        shape = [batch, 4, height + 2 * top, width + 2 * left]
        kernel = self._convolving(F.pad(self.weight, (0, 0, 0, 0, 0, 4 - channels)), [0, 0], shape)
        scale, zero_point, low, high = self.x_grid
        border = sum(zero_point << 8 * channel for channel in range(channels))

        def stem(image: Tensor, added: Tensor | None = None) -> Tensor:
            steps = torch.mul(image, 1.0 / scale).round_()
            if zero_point:
                steps.add_(zero_point)
            word, *others = steps.clamp_(low, high).unbind(1)
            for place, other in enumerate(others, 1):
                word.add_(other, alpha=256.0**place)
            batch, height, width = word.shape
            words = word.new_full((batch, height + 2 * top, width + 2 * left), border, dtype=torch.int32)
            words[:, top : top + height, left : left + width] = word
            pixels = words.view(torch.uint8).view(*words.shape, 4).permute(0, 3, 1, 2)
            return kernel(pixels) if added is None else kernel(pixels, added)

        return stem


def suits(weight: Tensor, groups: int, shape: tuple[int, ...]) -> bool:
    """Whether a convolution may round its input of a shape itself: an image, and bytes of a word in this order."""
    image = len(shape) == 4 and shape[1] <= IMAGE_CHANNELS and weight.dim() == 4
    return image and groups == 1 and sys.byteorder == "little"
