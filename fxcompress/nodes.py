"""The functions behind the nodes that masking and quantization put into a graph (design 6)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import InputError


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """A parameter or an activation with its masked elements zero; ``mask`` is bool, True = keep, and broadcasts."""
    return tensor * mask


def learned_mask(tensor: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
    """:func:`apply_mask` while scores are learned that decide the mask.

    The gradient of the masked tensor goes straight through to the scores, as if the mask were they: dS = dW' * W, also
    where the mask is False; summed where ``scores`` has size 1 and broadcasts.
    """
    masked: Tensor = _LearnedMask.apply(tensor, mask, scores)
    return masked


class _LearnedMask(torch.autograd.Function):
    """Sanh et al. 2020, "Movement Pruning", arXiv 2005.07683, equation 2 and section 4."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(tensor, mask)
        ctx.shape = scores.shape
        return tensor * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        tensor, mask = ctx.saved_tensors
        return gradients[0] * mask, None, (gradients[0] * tensor).sum_to_size(ctx.shape)


def select_live(tensor: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """The live elements along ``dim``.

    Args:
        tensor: any shape.
        dim: the dimension that shrinks.
        index: 1-D: what is kept of ``dim``. Otherwise one dimension for each of the tensor's, of size 1 where rows
            agree: for every row the columns kept along ``dim``.
        size: dense size of one period of ``dim`` (of the rows, if ``index`` has rows). A dimension into which the
            batch was merged repeats it.

    What is selected lies in memory in the order in which the tensor does, as in the dense model: there may be views
    behind it that are written into.
    """
    order = _memory_order(tensor)
    tensor, dim, index = _ordered(tensor, dim, index, order)
    made = (
        tensor.index_select(dim, _tiled(index, tensor.shape[dim], size))
        if index.dim() == 1
        else tensor.gather(dim, _rows(index, tensor, dim))
    )
    return made if order is None else made.permute(_inverse(order))


def restore_live(tensor: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """The inverse of :func:`select_live`: a dense tensor with zeros where nothing is live."""
    order = _memory_order(tensor)
    tensor, dim, index = _ordered(tensor, dim, index, order)
    shape = list(tensor.shape)
    if index.dim() == 1:
        shape[dim] = tensor.shape[dim] // index.shape[0] * size
        made = tensor.new_zeros(shape).index_copy(dim, _tiled(index, shape[dim], size), tensor)
    else:
        shape[dim] = size
        made = tensor.new_zeros(shape).scatter(dim, _rows(index, tensor, dim), tensor)
    return made if order is None else made.permute(_inverse(order))


def live_index(dead: Tensor, dim: int, kept: int, size: int, rows: tuple[int, ...]) -> Tensor:
    """Where the live elements of a value lie along ``dim``, in order.

    Args:
        dead: of the value's shape: 1 where an element is dead, 0 elsewhere (int64).
        dim: the dimension that shrinks.
        kept: of every ``size`` elements along ``dim`` as many live; 0: they are counted, which no exporter can follow.
        size: see ``kept``.
        rows: dimensions along which the answer differs. Along all others an index is dead if everything there is.

    Returns:
        int64: 1-D without ``rows``; with them one dimension for each of the value's, of size 1 where rows agree.
    """
    length = dead.shape[dim]
    others = [d for d in range(dead.dim()) if d != dim and d not in rows]
    if others:
        dead = dead.amin(others, keepdim=True)
    places = torch.arange(length, device=dead.device).reshape([-1 if d == dim else 1 for d in range(dead.dim())])
    # No boolean index: how many live must follow from sizes alone, or no exporter could tell shapes.
    count = length * kept // size if kept else int((dead == 0).sum(dim).max())
    order = (dead * length + places).sort(dim).values.narrow(dim, 0, count) % length
    return order if rows else order.reshape(-1)


def batch_norm_factor(variance: Tensor, gamma: Tensor | None, eps: float, shape: tuple[int, ...]) -> Tensor:
    """By what a BatchNorm multiplies, ``gamma / sqrt(running_var + eps)``, as ``shape``; without gradients."""
    factor = torch.rsqrt(variance.detach() + eps)
    return (factor if gamma is None else factor * gamma.detach()).reshape(shape)


def require_recorded(value: object, name: str, recorded: object) -> None:
    """An input that is no tensor has been recorded as a constant: another value would need another graph.

    Raises:
        InputError: the value is another one than when the model was traced.
    """
    if value != recorded:
        raise InputError(
            f"input {name} is {value!r}; expected {recorded!r}, with which the model was traced: what is no tensor is "
            "a constant of the graph. Trace the model again with the other value."
        )


def scale_size(size: int, numerator: int, denominator: int) -> int:
    """``size * numerator // denominator``: a size that counts the batch and channels at once."""
    return size * numerator // denominator


def _memory_order(tensor: Tensor) -> list[int] | None:
    """Dimensions from the slowest to the fastest; None where that is their order, or elements share their memory."""
    if tensor.is_contiguous() or 0 in tensor.stride():
        return None
    strides = tensor.stride()
    order = [0] * tensor.dim()
    for dim, own in enumerate(strides):  # counted, because a compiler cannot sort by sizes that it does not know
        order[len([1 for i, other in enumerate(strides) if other > own or (other == own and i < dim)])] = dim
    return order


def _ordered(tensor: Tensor, dim: int, index: Tensor, order: list[int] | None) -> tuple[Tensor, int, Tensor]:
    if order is None:
        return tensor, dim, index
    return tensor.permute(order), order.index(dim % tensor.dim()), index.permute(order) if index.dim() > 1 else index


def _inverse(order: list[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


def _tiled(index: Tensor, found: int, size: int) -> Tensor:
    if found == size:
        return index
    starts = torch.arange(0, found, size, device=index.device)
    return (starts[:, None] + index).reshape(-1)


def _rows(index: Tensor, tensor: Tensor, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = index.shape[dim]
    repeats = [
        n // i if d != dim and i not in (1, n) else 1 for d, (n, i) in enumerate(zip(shape, index.shape, strict=True))
    ]
    return index.repeat(repeats).expand(shape)


def rows_of(rows: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """``integers[rows] * scale[rows]``, ``[..., width]``: only the rows that are asked for are multiplied.

    Args:
        rows: integers of any shape.
        integers: int8, ``[count, width]``.
        scale: ``[count]`` or 0-d.
    """
    factor = scale if scale.dim() == 0 else F.embedding(rows, scale[:, None])
    return F.embedding(rows, integers).to(scale.dtype).mul_(factor)
