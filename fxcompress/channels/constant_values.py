"""What each class of ATen operator does to constants, and what a contraction sees of those that enter it.

A tensor's constants are a float64 tensor of as many dimensions, of size 1 along every dimension in which they do not
vary, NaN where an element is unknown; None stands for a tensor of which nothing is known. Parameters and buffers are
their own constants, in their own dtype. Everything holds at any batch size and resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels import contractions, reductions, rules
from fxcompress.channels.labels import aligned, view_factor
from fxcompress.channels.rules import Call, Rule

Known = Tensor | None
Of = Callable[[Tensor], Known]
#: Products of constants with more multiplications than this are not looked at.
_LARGE = 2**28


def compact(constants: Tensor) -> Known:
    """Constants with size 1 where they do not vary; None where nothing is known."""
    for dim, size in enumerate(constants.shape):
        if size > 1:
            first = constants.narrow(dim, 0, 1)
            both = torch.isnan(constants) & torch.isnan(first)
            if constants.stride(dim) == 0 or bool(((constants == first) | both).all()):
                constants = first
    return None if bool(torch.isnan(constants).all()) else constants


def _full(tensor: Tensor, of: Of) -> Tensor:
    """A tensor's constants, all unknown where there are none."""
    known = of(tensor)
    return torch.full((1,) * tensor.dim(), torch.nan, dtype=torch.float64) if known is None else known


def _varies(constants: Tensor, dims: Sequence[int]) -> bool:
    return any(constants.shape[dim] > 1 for dim in dims)


# ---- pointwise -----------------------------------------------------------------------------------------------------


def pointwise(call: Call, of: Of, inplace: bool) -> Any:
    """The operator itself, unknown wherever an operand is; a product with an exact zero is zero."""
    tensors = call.tensors
    given = [_full(tensor, of) for tensor in tensors]
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    ndim = results[0].dim()
    unknown = torch.zeros((1,) * ndim, dtype=torch.bool)
    zero = torch.zeros((1,) * ndim, dtype=torch.bool)
    for constants in given:
        unknown = unknown | torch.isnan(constants)
        zero = zero | (constants == 0)
    operands = {id(tensor): _typed(constants, tensor.dtype) for tensor, constants in zip(tensors, given, strict=True)}
    for tensor in tensors:  # not every kernel broadcasts
        operands[id(tensor)] = operands[id(tensor)].expand(unknown.shape)
    if inplace:
        operands[id(tensors[0])] = operands[id(tensors[0])].clone()
    arguments = {name: _put(value, operands) for name, value in call.arguments.items()}
    if isinstance(arguments.get("dtype"), torch.dtype) and arguments["dtype"].is_floating_point:
        arguments["dtype"] = torch.float64  # a cast would round what is folded in double
    (_, first), *rest = arguments.items()
    try:
        found = call.func(first, **dict(rest))
    except (RuntimeError, TypeError, NotImplementedError):
        return None  # not every kernel takes float64, or mixes it with what the model's own dtype was
    made = []
    for tensor in found if isinstance(found, (tuple, list)) else [found]:
        value = torch.where(unknown, torch.nan, tensor.double())
        if call.name == "mul":
            value = torch.where(zero, 0.0, value)
        made.append(compact(aligned(value, ndim)))
    return made


def _typed(constants: Tensor, dtype: torch.dtype) -> Tensor:
    """Constants as an operand of a given dtype; floating ones are computed in float64."""
    if dtype.is_floating_point:
        return constants.double()
    return torch.nan_to_num(constants).to(dtype) if constants.is_floating_point() else constants


def _put(value: Any, operands: dict[int, Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_put(item, operands) for item in value]
    return operands[id(value)] if isinstance(value, Tensor) else value


# ---- movement ------------------------------------------------------------------------------------------------------


def _same(call: Call, of: Of) -> Known:
    return of(call.arguments["self"])


def _view(call: Call, of: Of) -> Known:
    source = call.arguments["self"]
    return view_factor(_full(source, of), tuple(source.shape), tuple(call.result.shape))


def _expand(call: Call, of: Of) -> Known:
    return aligned(_full(call.arguments["self"], of), call.result.dim())


def _movement(call: Call, of: Of) -> Any:
    (_, source), *rest = call.arguments.items()
    moved = call.func(_full(source, of).expand(source.shape), **dict(rest))
    parts = moved if isinstance(moved, (tuple, list)) else [moved]
    return list(parts) if call.const else [compact(part) for part in parts]


def _cat(call: Call, of: Of) -> Known:
    pieces = [tensor for tensor in call.arguments["tensors"] if tensor.dim() > 1 or tensor.numel()]
    dim = call.arguments.get("dim", 0) % call.result.dim()
    given = [_full(piece, of) for piece in pieces]
    wide = [max(constants.shape[d] for constants in given) for d in range(call.result.dim())]
    sizes = [[*wide[:dim], piece.shape[dim], *wide[dim + 1 :]] for piece in pieces]
    return compact(torch.cat([c.double().expand(size) for c, size in zip(given, sizes, strict=True)], dim))


def _stack(call: Call, of: Of) -> Known:
    dim = call.arguments.get("dim", 0) % call.result.dim()
    given = torch.broadcast_tensors(*(_full(tensor, of).double() for tensor in call.arguments["tensors"]))
    return compact(torch.stack(given, dim))


def _index(call: Call, of: Of) -> Known:
    source = call.arguments["self"]
    given = call.arguments["indices"] if call.name == "index" else [call.arguments["index"]]
    if any(item is not None and not call.of(item).const for item in given):
        return None
    known = _full(source, of).expand(source.shape)
    if call.name == "index":
        return compact(torch.ops.aten.index.Tensor(known, given))
    return compact(known.index_select(call.arguments["dim"], given[0]))


def _embedding(call: Call, of: Of) -> Known:
    """A column of equal entries is known whatever row is read."""
    table = of(call.arguments["weight"])
    if table is None:
        return None
    column = torch.where((table == table[:1]).all(0), table[0].double(), torch.nan)
    return compact(aligned(column, call.result.dim()))


# ---- norms, pooling, statistics --------------------------------------------------------------------------------------


def _batch_norm(call: Call, of: Of) -> Any:
    """BatchNorm with fixed statistics: pointwise; a channel whose weight is zero holds its bias."""
    arguments = call.arguments
    state = [arguments.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    if arguments.get("training") or state[0] is None or state[1] is None:
        return None
    ndim = call.result[0].dim()
    shape = [1, -1] + [1] * (ndim - 2)
    defaults = (0.0, 1.0, 1.0, 0.0)
    mean, variance, weight, bias = (
        torch.tensor([default], dtype=torch.float64).reshape([1] * ndim)
        if tensor is None
        else _full(tensor, of).double().reshape(shape)
        for tensor, default in zip(state, defaults, strict=True)
    )
    scale = weight * torch.rsqrt(variance + arguments["eps"])
    centred = _full(arguments["input"], of) - mean
    made = torch.where(scale == 0, bias, centred * scale + bias)
    return [compact(made)]


def _spatial(call: Call, of: Of) -> Any:
    """Pooling and interpolation keep what is the same at every position; padding that counts leaves only zeros."""
    source = call.tensors[0]
    known = _full(source, of)
    positions = reductions.positions_of(call.name, source.dim())
    if _varies(known, positions):
        return None
    arguments = call.arguments
    counted = call.name.startswith("avg_pool") and arguments.get("count_include_pad", True)
    padded = any(_listed(arguments.get("padding", 0)))
    if (counted and padded) or arguments.get("divisor_override") or call.name.startswith("grid_sampler"):
        known = torch.where(known == 0, 0.0, torch.nan)
    return [compact(known.double())]


#: Statistics that give back a number of which all elements are equal.
_MEANS = frozenset("mean amax amin max min median nanmedian".split())
_SUMS = frozenset("sum nansum norm linalg_vector_norm".split())


def _reduction(call: Call, of: Of) -> Any:
    """Means and extrema over what does not vary; sums of zeros."""
    source = call.tensors[0]
    known = _full(source, of).double()
    dims = sorted(reductions.reduced_dims(call, source.dim()))
    if _varies(known, dims) and call.name not in _SUMS:
        return None
    if call.name in _SUMS:
        known = torch.where((known == 0).all(dim=dims, keepdim=True) if dims else known == 0, 0.0, torch.nan)
    elif call.name not in _MEANS:
        return None
    first = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
    return [compact(known if first.dim() == source.dim() else known.squeeze(dims))]


def _glu(call: Call, of: Of) -> Known:
    source = call.arguments["self"]
    return compact(call.func(_full(source, of).double().expand(source.shape), call.arguments.get("dim", -1)))


def factory(call: Call) -> Known:
    """A tensor made of one number."""
    kind = call.name.removeprefix("new_").removesuffix("_like")
    numbers = {"zeros": 0.0, "ones": 1.0, "full": call.arguments.get("fill_value")}
    number = numbers.get(kind)
    if not isinstance(number, (int, float)):
        return None
    return torch.full((1,) * call.result.dim(), float(number), dtype=torch.float64)


def zero_along(known: Known, shape: Sequence[int], dims: Sequence[int]) -> np.ndarray[Any, Any]:
    """For every index along ``dims`` whether all of a tensor's elements there are exact zeros."""
    zero = torch.zeros((1,) * len(shape), dtype=torch.bool) if known is None else known == 0
    others = [dim for dim in range(len(shape)) if dim not in dims]
    zero = zero.all(dim=others, keepdim=True) if others else zero
    return zero.expand([size if dim in dims else 1 for dim, size in enumerate(shape)]).reshape(-1).numpy()


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


#: What only moves elements: sizes among its arguments are no values.
MOVEMENT: dict[Rule, Callable[[Call, Of], Any]] = {
    rules.same: _same,
    rules.view: _view,
    rules.expand: _expand,
    rules.movement: _movement,
    rules.pixel_shuffle: _movement,
    rules.permutation: _movement,
    rules.cat: _cat,
    rules.stack: _stack,
    rules.pad: lambda call, of: _movement(call, of),
    rules.index: _index,
    reductions.embedding: _embedding,
}
#: By the class of operator that :mod:`fxcompress.channels.operators` gives it; a class that is missing leaves nothing.
VALUES: dict[Rule, Callable[[Call, Of], Any]] = {
    **MOVEMENT,
    reductions.batch_norm: _batch_norm,
    reductions.spatial: _spatial,
    reductions.reduction: _reduction,
    reductions.extremum: _reduction,
    reductions.glu: _glu,
}


# ---- contractions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A convolution as its constants see it.

    Attributes:
        inputs: float64 ``[in]``: the constant of every input channel, NaN where there is none.
        used: bool ``[groups, out / groups, in / groups]``: some tap of the weight is not zero. None: unknown weight.
        taps: float64, the same shape: the sum over the kernel (of a transposed one, its mean over the stride).
        varies: not every position sees the whole kernel, so that a constant does not stay one.
    """

    inputs: Tensor
    used: Tensor | None
    taps: Tensor | None
    varies: bool

    @classmethod
    def of(cls, call: Call, x: Known, weight: Known) -> Window:
        """Read a call of ``convolution``."""
        arguments = call.arguments
        groups, transposed = arguments["groups"], arguments["transposed"]
        size = arguments["input"].shape[1]
        inputs = _per_channel(x, size)
        varies = any(arguments["padding"])
        if weight is None or (transposed and groups > 1):
            return cls(inputs, None, None, True)
        kernel = weight.reshape(*weight.shape[:2], -1)
        taps = kernel.sum(-1, dtype=torch.float64)
        used = (kernel != 0).any(-1)
        if transposed:
            apart = math.prod(arguments["stride"])
            varies = varies or kernel.shape[-1] > 1 or apart > 1 or any(arguments["output_padding"])
            taps, used = taps.t() / apart, used.t()
        shape = (groups, -1, size // groups)
        return cls(inputs, used.reshape(shape), taps.reshape(shape), varies)

    def result(self, bias: Known, inexact: bool) -> tuple[Known, Tensor]:
        """The output's constants ``[out]``, and the constant that kept each from being one (NaN where none did)."""
        if self.used is None or self.taps is None:
            return None, torch.empty(0)
        entering = self.inputs.reshape(self.used.shape[0], 1, -1)
        unknown = (self.used & torch.isnan(entering)).any(-1)
        uneven = (self.used & (entering != 0)).any(-1) & self.varies
        made = (self.taps * torch.nan_to_num(entering)).sum(-1).reshape(-1) + (0.0 if bias is None else bias.double())
        worst = torch.where(self.used, torch.nan_to_num(entering), 0.0)
        worst = worst.gather(-1, worst.abs().argmax(-1, keepdim=True)).reshape(-1)
        stopped = torch.where((uneven & ~unknown).reshape(-1), worst, torch.nan)
        return torch.where((unknown if inexact else unknown | uneven).reshape(-1), torch.nan, made), stopped

    def verdicts(self, known: int, harmless: int, stays: int) -> np.ndarray[Any, Any]:
        """For every input channel: ``harmless``, ``known`` where it holds a constant, or ``stays``."""
        used = torch.ones(1, 1, 1, dtype=torch.bool) if self.used is None else self.used
        read = used.any(1).expand(used.shape[0], -1).reshape(-1) & (self.inputs != 0)
        constant = torch.isfinite(self.inputs) & torch.tensor(self.used is not None)
        return np.where(~read.numpy(), harmless, np.where(constant.numpy(), known, stays))


def _per_channel(known: Known, size: int) -> Tensor:
    """One constant for each index of dimension 1, NaN where it is not the same everywhere else."""
    if known is None:
        return torch.full((size,), torch.nan, dtype=torch.float64)
    rows = known.double().movedim(1, 0).reshape(known.shape[1], -1)
    same = (rows == rows[:, :1]).all(1)
    return torch.where(same, rows[:, 0], torch.nan).expand(size)


@dataclass(frozen=True)
class Product:
    """A matrix product as its constants see it: ``left [b, m, k]`` times ``right [b, k, n]``, only k at full size."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor, of: Of) -> Product:
        """Read two operands."""
        a, b = _full(left, of), _full(right, of)
        a = a.reshape((1,) * (3 - a.dim()) + tuple(a.shape))
        b = b.reshape((1, *b.shape, 1) if b.dim() == 1 else (1,) * (3 - b.dim()) + tuple(b.shape))
        size = left.shape[-1]
        return cls(a.expand(-1, -1, size), b.expand(-1, size, -1))

    def result(self, call: Call, of: Of) -> Known:
        """The constants of the product; an unknown element does not matter where it meets a zero."""
        made = self._one_row() if self.left.shape[:2] == (1, 1) and self.right.shape[0] == 1 else self._rows()
        if made is None:
            return None
        ndim = call.result.dim()
        first, second, added = contractions.operands_of(call)
        vectors = call.arguments[first].dim() == 1, call.arguments[second].dim() == 1
        made = made.squeeze(-1) if vectors[1] else made
        made = made.reshape(made.shape[made.dim() - ndim :]) if made.dim() > ndim else made
        if added:
            if {"alpha", "beta"} & call.arguments.keys():
                return None
            made = made + aligned(_full(call.arguments["self"], of).double(), ndim)
        return compact(made)

    def _one_row(self) -> Tensor:
        row, right = self.left[0, 0].double(), self.right[0]
        unknown = torch.isnan(row)
        bad = (right[unknown] != 0).any(0) | torch.isnan(right[~unknown & (row != 0)]).any(0)
        chosen = ~unknown & (row != 0)
        made = row[chosen] @ torch.nan_to_num(right[chosen].double())
        return torch.where(bad, torch.nan, made).reshape(1, 1, -1)

    def _rows(self) -> Tensor | None:
        if self.left.numel() * self.right.shape[-1] > _LARGE:
            return None
        left, right = self.left.double(), self.right.double()
        lost = torch.isnan(left).double() @ (right != 0).double() + (left != 0).double() @ torch.isnan(right).double()
        return torch.where(lost > 0, torch.nan, torch.nan_to_num(left) @ torch.nan_to_num(right))

    def columns(self) -> np.ndarray[Any, Any]:
        """For every k the constant that all rows of ``left`` hold, NaN where there is none."""
        rows = self.left.double().reshape(-1, self.left.shape[-1])
        return torch.where((rows == rows[:1]).all(0), rows[0], torch.nan).numpy()

    def harmless(self, factor: Tensor, of_left: bool) -> np.ndarray[Any, Any]:
        """For every element of a factor of one operand whether its products are exact zeros, in the factor's shape."""
        shape = tuple(factor.shape)
        if len(shape) == 1 and not of_left:
            shape = (1, *shape, 1)
        shape = (1,) * (3 - len(shape)) + shape
        left, right = self.left == 0, self.right == 0
        if of_left:
            right = right.all(2, keepdim=True).transpose(1, 2)
        else:
            left = left.all(1, keepdim=True).transpose(1, 2)
        zero = _fit(left, shape) | _fit(right, shape)
        return zero.reshape(factor.shape).numpy()


def _fit(zero: Tensor, shape: Sequence[int]) -> Tensor:
    """All of what lies along dimensions of size 1 of ``shape``, expanded to it."""
    dims = [dim for dim, size in enumerate(shape) if size == 1]
    return (zero.all(dim=dims, keepdim=True) if dims else zero).expand(shape)
