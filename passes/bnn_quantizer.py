"""Binary weights and activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.module import TracedModule, submodule
from fxcompress.passes.quantizer import Quantizer
from fxcompress.quantization.bits import Bits
from fxcompress.quantization.fake_quantize import ROLE, along
from fxcompress.quantization.observers import rows
from fxcompress.quantization.sites import find_sites, operation
from fxcompress.quantization.spec import QuantSpec
from fxcompress.rewrite import rewriting

#: The sign of their result is that of what they read, or lost.
_RECTIFIERS = frozenset("relu relu6 hardswish gelu silu mish".split())


@dataclass(frozen=True)
class BNNQuantizer(Quantizer):
    """Trains with weights and activations of -1 and +1: ``sign(x)`` with ``sign(0) = +1`` (Courbariaux et al. 2016,
    arXiv 1602.02830, equation 1), gradient 1 where ``abs(x) <= 1`` and 0 elsewhere (equation 4). The weights behind the
    signs are clipped to [-1, 1] after each step (algorithm 1); with a loop of your own, call :func:`clip_weights`.

    What a quantized layer reads is the sign of what was computed, and that is the non-linearity: a ReLU right before it
    is passed by, because no negative value would be left, and a GELU or the like, whose gradient would be lost there.
    BatchNorm stays float behind the layer. Masked weights stay zero.

    Args:
        magnitude: of weights: ``"one"``, or ``"mean"`` for ``sign(w) mean abs(w)`` with the mean over what makes an
            output channel (XNOR-Net: Rastegari et al. 2016, arXiv 1603.05279, equation 6; gradients of both factors).
            Behind a BatchNorm it makes no difference. Without one, as in transformers, ones multiply what a layer gives
            by the root of its width and more, which saturates attention's softmax: take the mean there.
        first_last: float by default: the first layer reads real inputs (section 1.4), the last gives scores.

    See :class:`Quantizer` for the other options; bits are always 1.
    """

    weight_bits: Bits = field(default=1, init=False)
    activation_bits: Bits | None = field(default=1, init=False)
    first_last: Literal["same", "float"] | int = "float"
    magnitude: Literal["one", "mean"] = "one"

    needs_inputs: ClassVar[bool] = True
    least_bits: ClassVar[int] = 1
    own_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitude not in ("one", "mean"):
            raise InputError(f"magnitude is {self.magnitude!r}; expected 'one' or 'mean'.")

    def weight_spec(self, bits: int) -> QuantSpec:
        """One bit."""
        axis = 0 if self.magnitude == "mean" else None
        return QuantSpec(1, "weight", signed=True, symmetric=True, axis=axis)

    def activation_spec(self, bits: int) -> QuantSpec:
        """One bit."""
        return QuantSpec(1, "activation", signed=True, symmetric=True)

    def quantize(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """The sign, times the magnitude."""
        sign: Tensor = _Sign.apply(x)
        if self.magnitude == "one" or spec.role == "activation":
            return sign
        return sign * along(_mean_magnitude(x, spec.axis), x, spec.axis)

    def step(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """The magnitude: one, or ``[channels]`` (0-d where channels lie along no dimension)."""
        if self.magnitude == "one" or spec.role == "activation":
            return torch.ones((), dtype=x.dtype, device=x.device)
        return _mean_magnitude(x.detach(), spec.axis)

    def finish(self, module: TracedModule, context: Context, seen: dict[str, Any]) -> None:
        """Let signs read what the non-linearity before them read."""
        with rewriting(module, self.name) as rewriter:
            for node in module.graph.nodes:
                source = node.args[0] if node.meta.get(ROLE) == "activation" else None
                if isinstance(source, fx.Node) and operation(module, source) in _RECTIFIERS:
                    before = source.args[0]
                    assert isinstance(before, fx.Node)
                    source.prepend(node)  # a ReLU in place would leave nothing to read
                    rewriter.read(node, source, before)
        clip_weights(module)

    def train(self, module: TracedModule, context: Context) -> None:
        """Train, and clip after each step."""
        context.train(module, epochs=self.epochs, after_step=lambda step: clip_weights(module), title=self.name)


def _mean_magnitude(x: Tensor, axis: int | None) -> Tensor:
    """``mean abs(x)`` per index of a dimension, over what is not masked."""
    size = rows(x, axis).abs()  # what stands for a kept zero (keep_zeros) counts as little as zero
    mean = size.sum(1) / (size > torch.finfo(x.dtype).tiny).sum(1).clamp(min=1)
    return mean if axis is not None else mean.squeeze(0)


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
