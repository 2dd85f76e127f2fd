"""A quantizer of your own: scales that are powers of two, so that a shift replaces the multiplication."""

import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import PTQQuantizer, Quantizer


class PowerOfTwoQuantizer(Quantizer):
    def quantize(self, x: Tensor, spec: fxcompress.QuantSpec) -> Tensor:
        largest = x.abs().max().clamp(min=1e-12)
        scale = (largest / spec.quant_max).log2().ceil().exp2()
        return (x / scale).round().clamp(spec.quant_min, spec.quant_max) * scale


def main() -> fxcompress.TracedModule:
    """Quantize the weights of a small network to 4 bits; PTQQuantizer adds what they are multiplied with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)).eval()
    x = torch.randn(2, 3, 8, 8)
    quantized = fxcompress.compress(model, [PowerOfTwoQuantizer(weight_bits=4), PTQQuantizer()], example_inputs=x)
    print(*(line for step in quantized.meta["history"] for line in step.notes), sep="\n")
    return quantized


if __name__ == "__main__":
    main()
