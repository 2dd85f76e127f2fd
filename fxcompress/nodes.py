"""The functions behind the nodes that masking and quantization put into a graph (design 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.errors import InputError


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """A parameter or an activation with its masked elements zero; ``mask`` is bool, True = keep, and broadcasts."""
    return tensor * mask


def select_live(tensor: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """The live elements along ``dim``.

    Args:
        tensor: any shape.
        dim: the dimension that shrinks.
        index: 1-D: what is kept of ``dim``. Otherwise one dimension for each of the tensor's, of size 1 where rows
            agree: for every row the columns kept along ``dim``.
        size: dense size of one period of ``dim`` (of the rows, if ``index`` has rows). A dimension into which the
            batch was merged repeats it.
    """
    return (
        tensor.index_select(dim, _tiled(index, tensor.shape[dim], size))
        if index.dim() == 1
        else tensor.gather(dim, _rows(index, tensor, dim))
    )


def restore_live(tensor: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """The inverse of :func:`select_live`: a dense tensor with zeros where nothing is live."""
    shape = list(tensor.shape)
    if index.dim() == 1:
        shape[dim] = tensor.shape[dim] // index.shape[0] * size
        return tensor.new_zeros(shape).index_copy(dim, _tiled(index, shape[dim], size), tensor)
    shape[dim] = size
    return tensor.new_zeros(shape).scatter(dim, _rows(index, tensor, dim), tensor)


def live_index(dead: Tensor, dim: int, kept: int, size: int, rows: tuple[int, ...]) -> Tensor:
    """Where the live elements of a value lie along ``dim``, in order.

    Args:
        dead: of the value's shape: 1 where an element is dead, 0 elsewhere (int64).
        dim: the dimension that shrinks.
        kept: of every ``size`` elements along ``dim`` as many live.
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
    order = (dead * length + places).sort(dim).values.narrow(dim, 0, length * kept // size) % length
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
