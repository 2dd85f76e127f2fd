"""Binary weights and activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from fxcompress.context import Context
from fxcompress.module import TracedModule, submodule
from fxcompress.passes.quantizer import Quantizer
from fxcompress.quantization.bits import Bits
from fxcompress.quantization.insert import ROLE
from fxcompress.quantization.sites import find_sites, operation
from fxcompress.quantization.spec import QuantSpec
from fxcompress.rewrite import rewriting


@dataclass(frozen=True)
class BNNQuantizer(Quantizer):
    """Trains with weights and activations of -1 and +1: ``sign(x)`` with ``sign(0) = +1`` (Courbariaux et al. 2016,
    arXiv 1602.02830, equation 1), gradient 1 where ``abs(x) <= 1`` and 0 elsewhere (equation 4). The weights behind the
    signs are clipped to [-1, 1] after each step (algorithm 1); with a loop of your own, call :func:`clip_weights`.

    What a quantized layer reads is the sign of what was computed: a ReLU right before it is passed by, because no
    negative value would be left. BatchNorm stays float behind the layer. Masked weights stay zero.

    Args:
        first_last: float by default: the first layer reads real inputs (section 1.4), the last gives scores.

    See :class:`Quantizer` for the other options; bits are always 1.
    """

    weight_bits: Bits = field(default=1, init=False)
    activation_bits: Bits | None = field(default=1, init=False)
    first_last: Literal["same", "float"] | int = "float"

    needs_inputs: ClassVar[bool] = True
    least_bits: ClassVar[int] = 1
    own_gradient: ClassVar[bool] = True

    def weight_spec(self, bits: int) -> QuantSpec:
        """One bit."""
        return QuantSpec(1, "weight", signed=True, symmetric=True)

    def activation_spec(self, bits: int) -> QuantSpec:
        """One bit."""
        return QuantSpec(1, "activation", signed=True, symmetric=True)

    def quantize(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """The sign."""
        result: Tensor = _Sign.apply(x)
        return result

    def step(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """One."""
        return torch.ones((), dtype=x.dtype, device=x.device)

    def finish(self, module: TracedModule, context: Context, seen: dict[str, Any]) -> None:
        """Let signs read what a ReLU read."""
        with rewriting(module, self.name) as rewriter:
            for node in module.graph.nodes:
                source = node.args[0] if node.meta.get(ROLE) == "activation" else None
                if isinstance(source, fx.Node) and operation(module, source) in ("relu", "relu6"):
                    before = source.args[0]
                    assert isinstance(before, fx.Node)
                    source.prepend(node)  # a ReLU in place would leave nothing to read
                    rewriter.read(node, source, before)
        clip_weights(module)

    def train(self, module: TracedModule, context: Context) -> None:
        """Train, and clip after each step."""
        context.train(module, epochs=self.epochs, after_step=lambda step: clip_weights(module), title=self.name)


class _Sign(torch.autograd.Function):
    """-1 below 0, else +1; gradient where ``abs(x) <= 1``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)  # not x, which a ReLU in place may be about to change
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside


def clip_weights(module: TracedModule) -> None:
    """Clip the weights behind binary ones to [-1, 1], in place."""
    with torch.no_grad():
        for weight in _binary(module):
            weight.clamp_(-1, 1)


def _binary(module: TracedModule) -> Iterator[nn.Parameter]:
    names = [site.weight for site in find_sites(module) if site.quantized]
    for name in names:
        rule = getattr(submodule(module, f"_quant.{name}"), "rule", None)
        if isinstance(rule, BNNQuantizer):
            yield module.get_parameter(name)
