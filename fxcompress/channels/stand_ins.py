"""Results that are not computed: labels follow shapes, and what a weight was multiplied with has no value that matters.

A stand-in is one number, expanded to the shape of the result: it takes neither time nor memory, and is told by where
it is stored. Products with weights start them and what is done element by element to them keeps them. Everything else
is computed, on ones where it meets a stand-in; a value that decides a shape or an index never comes from one, since
what depends on the input is frozen there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.labels import Labels

#: Where the two factors of a product are among the arguments.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "convolution": (0, 1)}
#: Operators whose (first) result has the shape and the dtype of their first argument.
SHAPE_KEEPING = frozenset("relu hardtanh hardswish hardsigmoid sigmoid silu gelu elu leaky_relu tanh mish".split())
BATCH_NORMS = frozenset("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training".split())
_NOTHING = torch.empty(0)
_BINARY = frozenset("add sub mul".split())


def stand_in(
    name: str, args: Sequence[Any], of: Callable[[Tensor], Labels], *, inplace: bool, pointwise: bool
) -> Any | None:
    """What stands in for the result of an operator; None where it has to be computed.

    Args:
        name: the operator's, without an in-place underscore.
        args: its positional arguments.
        of: the labels of a tensor.
        inplace: it writes into its first argument.
        pointwise: it works element by element.
    """
    if name in PRODUCTS:
        left, right = (args[i] for i in PRODUCTS[name])
        shape = None if inplace or not _is_free(left, right, of) else product_shape(name, args)
        return None if shape is None else _ones(left, shape)
    first = args[0] if args else None
    if name == "cat":
        return None if inplace or not all(map(_stands_in, args[0])) else _ones(args[0][0], _joined_shape(*args))
    if not isinstance(first, Tensor) or not _stands_in(first):
        return None
    if inplace:
        return first if pointwise else None
    if name in SHAPE_KEEPING:
        return first.detach()
    if name in BATCH_NORMS and fits_norm(args):
        return first.detach(), _NOTHING, _NOTHING
    if name in _BINARY and isinstance(args[1], Tensor) and args[1].dtype == first.dtype:
        shapes = first.shape, args[1].shape
        return _ones(first, shapes[0] if shapes[0] == shapes[1] else torch.broadcast_shapes(*shapes))
    return None


def _is_free(left: Tensor, right: Tensor, of: Callable[[Tensor], Labels]) -> bool:
    """Whether nobody can depend on the values of a product: one side stands in, or is a weight and the other no
    constant."""
    if _stands_in(left) or _stands_in(right):
        return True
    a, b = of(left), of(right)
    return (a.direct or b.direct) and not (a.const and b.const)


def _stands_in(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.data_ptr() == _one(tensor.dtype, tensor.device).data_ptr()


def _ones(like: Tensor, shape: Sequence[int]) -> Tensor:
    return _one(like.dtype, like.device).expand(shape)


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def _joined_shape(tensors: Sequence[Tensor], dim: int = 0) -> list[int]:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return shape


def product_shape(name: str, args: Sequence[Any]) -> list[int] | None:
    """The shape of the product that an operator of :data:`PRODUCTS` makes of these arguments.

    None where they do not fit together in an obvious way: the operator itself will say what is wrong.
    """
    operands = [argument for argument in args if isinstance(argument, Tensor)]
    if len({(operand.dtype, operand.device) for operand in operands}) > 1:
        return None
    if name == "convolution":
        return _convolved_shape(*args[:9])
    left, right = (args[i] for i in PRODUCTS[name])
    if left.dim() != right.dim() or left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        return None
    shape = [*left.shape[:-1], right.shape[-1]]
    added = operands[0] if len(operands) > 2 else None
    return shape if added is None or _broadcasts(added.shape, shape) else None


def _broadcasts(small: Sequence[int], large: Sequence[int]) -> bool:
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)


def _convolved_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
    transposed: bool,
    output_paddings: Sequence[int],
    groups: int,
) -> list[int] | None:
    channels, out = weight.shape[1] * groups, weight.shape[0]
    if transposed:
        channels, out = out, channels
    if x.dim() != weight.dim() or x.shape[1] != channels or (bias is not None and bias.shape != (out,)):
        return None
    shape = [x.shape[0], out]
    for i, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True)):
        stride, padding, dilation = (sizes[i % len(sizes)] for sizes in (strides, paddings, dilations))
        reach = dilation * (kernel - 1)
        if transposed:
            shape.append((size - 1) * stride - 2 * padding + reach + output_paddings[i % len(output_paddings)] + 1)
        else:
            shape.append((size + 2 * padding - reach - 1) // stride + 1)
    return shape if min(shape[2:], default=1) > 0 else None


def fits_norm(args: Sequence[Any]) -> bool:
    """Whether the tensors that a BatchNorm is given have its input's channels, dtype and device."""
    x, *rest = (argument for argument in args if isinstance(argument, Tensor))
    return x.dim() > 1 and all((t.shape, t.dtype, t.device) == (x.shape[1:2], x.dtype, x.device) for t in rest)
