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
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "convolution": (0, 1)}
#: Operators whose (first) result has the shape and the dtype of their first argument.
_SHAPE_KEEPING = frozenset("relu hardtanh hardswish hardsigmoid sigmoid silu gelu elu leaky_relu tanh mish".split())
_BATCH_NORMS = frozenset("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training".split())
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
    if name in _PRODUCTS:
        left, right = (args[i] for i in _PRODUCTS[name])
        return None if inplace or not _is_free(left, right, of) else _ones(left, _product_shape(name, args))
    first = args[0] if args else None
    if name == "cat":
        return None if inplace or not all(map(_stands_in, args[0])) else _ones(args[0][0], _joined_shape(*args))
    if not isinstance(first, Tensor) or not _stands_in(first):
        return None
    if inplace:
        return first if pointwise else None
    if name in _SHAPE_KEEPING:
        return first.detach()
    if name in _BATCH_NORMS:
        return first.detach(), _NOTHING, _NOTHING
    if name in _BINARY and isinstance(args[1], Tensor) and args[1].dtype == first.dtype:
        return _ones(first, torch.broadcast_shapes(first.shape, args[1].shape))
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


def _product_shape(name: str, args: Sequence[Any]) -> list[int]:
    if name == "convolution":
        return _convolved_shape(*args[:9])
    left, right = (args[i] for i in _PRODUCTS[name])
    return [*left.shape[:-1], right.shape[-1]]


def _convolved_shape(
    x: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
    transposed: bool,
    output_paddings: Sequence[int],
    groups: int,
) -> list[int]:
    shape = [x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0]]
    for i, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True)):
        stride, padding, dilation = (sizes[i % len(sizes)] for sizes in (strides, paddings, dilations))
        reach = dilation * (kernel - 1)
        if transposed:
            shape.append((size - 1) * stride - 2 * padding + reach + output_paddings[i % len(output_paddings)] + 1)
        else:
            shape.append((size + 2 * padding - reach - 1) // stride + 1)
    return shape
