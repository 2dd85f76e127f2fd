"""Which nodes give values of their inputs, so that integers stay integers."""

from __future__ import annotations

from torch import fx

from fxcompress.module import TracedModule
from fxcompress.quantization.edges import JOINS
from fxcompress.quantization.sites import operation, repeats

#: Only move elements, whatever these are.
_MOVES = frozenset(
    """view reshape flatten unflatten permute transpose swapaxes swapdims movedim t contiguous squeeze unsqueeze expand
    expandas repeat repeatinterleave tile chunk split unsafechunk tensorsplit unbind getitem select narrow indexselect
    flip roll pixelshuffle pixelunshuffle channelshuffle clone dropout dropout1d dropout2d dropout3d identity
    viewas reshapeas""".split()
)


def tensor_sources(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes whose elements a join or a movement rearranges, or None."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("tensors"))
    if isinstance(first, fx.Node):
        return (first,)
    if isinstance(first, (tuple, list)) and first and all(isinstance(item, fx.Node) for item in first):
        return tuple(item for item in first if isinstance(item, fx.Node))
    return None


def moves(module: TracedModule, node: fx.Node) -> bool:
    """Whether every element of a node's result is one of its first argument's, moved."""
    name = operation(module, node)
    if node.meta.get("mutates"):
        return False
    if name == "dropout" and node.op != "call_module":
        return False
    return name in _MOVES or repeats(module, node)


def overwritten(module: TracedModule, node: fx.Node) -> bool:
    """Whether somebody writes into a node's value, or a view of it, that others read: values off its grid."""
    views, readers, written = [node], 0, False
    for view in views:
        for user in view.users:
            if user.meta.get("mutates") and user.args and user.args[0] is view:
                written = True
            if moves(module, user):
                views.append(user)
            elif not asks_size(user):
                readers += 1
    return written and readers > 1


def asks_size(node: fx.Node) -> bool:
    """Whether a node asks for a shape only."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "ndimension")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def joins(module: TracedModule, node: fx.Node) -> bool:
    """Whether a node puts tensors side by side."""
    return operation(module, node) in JOINS
