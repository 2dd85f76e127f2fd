"""Layers whose weights are packed for a kernel of onednn, once, when they first run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class PostOp:
    """What a kernel applies to its result before it writes it, in onednn's terms."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


NOTHING = PostOp()


class Prepacked(nn.Module, ABC):
    """A layer with plain weights as buffers, and a kernel that holds them packed.

    Packed weights are opaque: neither pickle nor ``state_dict`` can hold them, so they are made when the layer first
    runs, for the shape that it then meets, and are left out of copies. Loading a ``state_dict`` and moving to another
    dtype make them anew; a write into a buffer by other means is not noticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kernel: Kernel | None = None

    @abstractmethod
    def pack(self, x: Tensor) -> Kernel:
        """The kernel, with everything that does not depend on activations bound, for inputs like ``x``."""

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """The layer applied to ``x``."""
        kernel = self._kernel
        if kernel is None:  # two threads may both pack: the same weights, twice
            kernel = self._kernel = self.pack(x)
        return kernel(x, *others)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._kernel = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kernel = None
        super()._load_from_state_dict(*args, **kwargs)


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale


@dataclass(frozen=True)
class Geometry:
    """Where a convolution looks: two values each (height, width); one for 1-d."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def lists(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as kernels take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


class FloatConvolution(Prepacked):
    """``post(conv2d(x, weight, bias))``, or ``post(conv2d(x, weight, bias) + other)``; channels last.

    Args:
        weight: ``[out, in / groups, height, width]``, float32 or bfloat16.
        bias: ``[out]`` or None.
        geometry: of the convolution.
        post: applied last.
        scale: what an int8 weight is multiplied with before it is packed; broadcasts to it.
    """

    weight: Tensor
    bias: Tensor | None
    weight_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        post: PostOp,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("weight_scale", scale)
        self.geometry, self.post = geometry, post

    def pack(self, x: Tensor) -> Kernel:
        stride, padding, dilation, groups = self.geometry.lists
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            _scaled(self.weight, self.weight_scale), padding, stride, dilation, groups, list(x.shape)
        )
        where = (packed, self.bias, padding, stride, dilation, groups)
        unary = torch.ops.mkldnn._convolution_pointwise.default
        binary = torch.ops.mkldnn._convolution_pointwise.binary
        name, scalars, algorithm = self.post.name, list(self.post.scalars), self.post.algorithm
        last, after = torch.channels_last, None if name == "none" else name

        def kernel(x: Tensor, other: Tensor | None = None) -> Tensor:
            x = x.contiguous(memory_format=last)
            if other is None:
                result: Tensor = unary(x, *where, name, scalars, algorithm)
            else:
                other = other.contiguous(memory_format=last)
                result = binary(x, other, *where, "add", 1.0, after, scalars, algorithm)
            return result

        return kernel

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.geometry}, {self.post.name}"


class FloatBatchNorm(Prepacked):
    """BatchNorm in eval mode as one multiplication and addition, then a ReLU if asked for, in place.

    ``addcmul`` takes half as long as torch's own BatchNorm, which is not vectorized over channels that lie last.

    Args:
        norm: what it is made of; its statistics and affine map are kept under their names.
        relu: a ReLU follows.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, *, relu: bool) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(norm, name)
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.eps, self.relu = norm.eps, relu

    def pack(self, x: Tensor) -> Kernel:
        factor = (self.running_var.double() + self.eps).rsqrt()
        factor = factor if self.weight is None else factor * self.weight
        shift = -self.running_mean * factor
        shift = shift if self.bias is None else shift + self.bias
        shape = [-1] + [1] * (x.dim() - 2)
        scale, offset = factor.to(x.dtype).view(shape), shift.to(x.dtype).view(shape)
        if self.relu:
            return lambda x: torch.addcmul(offset, x, scale).relu_()
        return lambda x: torch.addcmul(offset, x, scale)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}, relu={self.relu}"


class FloatLinear(Prepacked):
    """``post(x @ weight.T + bias)``.

    Args:
        weight: ``[out, in]``, float32 or bfloat16.
        bias: ``[out]`` or None.
        post: applied last.
        scale: as for :class:`FloatConvolution`.
    """

    weight: Tensor
    bias: Tensor | None
    weight_scale: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, post: PostOp, scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("weight_scale", scale)
        self.post = post

    def pack(self, x: Tensor) -> Kernel:
        rows = math.prod(x.shape[:-1])
        bias, name, scalars, algorithm = self.bias, self.post.name, list(self.post.scalars), self.post.algorithm
        weight = _scaled(self.weight, self.weight_scale)
        if name == "none" and torch.backends.mkl.is_available() and weight.dtype == torch.float32:
            packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            plain = torch.ops.mkl._mkl_linear.default  # for another number of rows it takes the plain weight
            return lambda x: plain(x, packed, weight, bias, rows)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        unary = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: unary(x, packed, bias, name, scalars, algorithm)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.post.name}"
