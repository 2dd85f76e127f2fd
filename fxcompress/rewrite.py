"""The one mutator of traced models: every edit goes through here, is counted, and leaves its provenance."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from fxcompress.errors import GraphError
from fxcompress.module import TracedModule, modules_of, owner, submodule
from fxcompress.recorder import mutates

Value = Any


class Rewriter:
    """Edits one module's graph and state.

    Args:
        module: what is edited, in place.
        author: name of the pass; nodes that it makes or changes carry it in ``meta["by"]``.

    Attributes:
        edits: how many edits were made; 0 means that the module is as it was.
    """

    def __init__(self, module: TracedModule, author: str) -> None:
        self.module = module
        self.author = author
        self.edits = 0
        self._index: dict[int, tuple[weakref.ref[Tensor], list[tuple[Any, Any]]]] = {}

    @property
    def graph(self) -> fx.Graph:
        """The graph under edit."""
        return self.module.graph

    def _note(self, node: fx.Node, source: fx.Node | None) -> None:
        self.edits += 1
        if source is not None and source is not node:
            for key in ("scope", "source"):
                if key in source.meta:
                    node.meta[key] = source.meta[key]
        node.meta["by"] = self.author

    def insert_after(
        self,
        place: fx.Node,
        op: str,
        target: Any,
        args: tuple[Value, ...],
        kwargs: dict[str, Value] | None = None,
    ) -> fx.Node:
        """A new node right after ``place``."""
        with self.graph.inserting_after(place):
            node = self.graph.create_node(op, target, args, kwargs or {})
        self._note(node, place)
        return node

    def insert_before(
        self,
        place: fx.Node,
        op: str,
        target: Any,
        args: tuple[Value, ...],
        kwargs: dict[str, Value] | None = None,
    ) -> fx.Node:
        """A new node right before ``place``."""
        with self.graph.inserting_before(place):
            node = self.graph.create_node(op, target, args, kwargs or {})
        self._note(node, place)
        return node

    def become(
        self,
        node: fx.Node,
        op: str,
        target: Any,
        args: tuple[Value, ...],
        kwargs: dict[str, Value] | None = None,
    ) -> None:
        """Let a node compute something else under its old name; its users stay."""
        kwargs = kwargs or {}
        if (node.op, node.target, node.args, node.kwargs) == (op, target, args, kwargs):
            return
        node.op, node.target = op, target
        node.args, node.kwargs = args, kwargs
        self._note(node, None)

    def replace(self, node: fx.Node, new: fx.Node, where: Callable[[fx.Node], bool] = lambda user: True) -> None:
        """Let the users of ``node`` read ``new`` instead (``new`` itself keeps reading ``node``)."""
        changed = node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and where(user))
        self.edits += len(changed)

    def read(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one user read ``new`` where it read ``old``."""
        user.replace_input_with(old, new)
        self.edits += 1

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nobody reads."""
        if node.users:
            raise GraphError(f"cannot remove {node.name}: {', '.join(user.name for user in node.users)} read it.")
        self.graph.erase_node(node)
        self.edits += 1

    def sweep(self) -> None:
        """Remove everything whose result nobody needs, except what writes in place."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code(is_impure_node=mutates)
        self.edits += before - len(self.graph.nodes)

    # ---- state -------------------------------------------------------------------------------------------------

    def owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a parameter or buffer, and its name there."""
        return owner(self.module, name)

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Replace the tensor of a parameter or buffer, under all its names; parameters stay parameters."""
        holder, leaf = self.owner(name)
        self.exchange(getattr(holder, leaf), tensor)

    def exchange(self, old: Tensor, tensor: Tensor) -> None:
        """:meth:`set_tensor` for who has the parameter or buffer itself in hand."""
        new = tensor
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
        places = self._places(old)
        for table, key in places:  # tied ones stay tied
            table[key] = new
        self._index[id(new)] = weakref.ref(new), places
        self.edits += 1

    def _places(self, tensor: Tensor) -> list[tuple[Any, Any]]:
        """Every table and key under which a parameter or buffer is kept."""
        known = self._index.get(id(tensor))
        if known is None or known[0]() is not tensor:  # an id may be used again
            self._index = {}
            for module in modules_of(self.module).values():
                for table in (module._parameters, module._buffers):
                    for key, other in table.items():
                        if other is not None:
                            self._index.setdefault(id(other), (weakref.ref(other), []))[1].append((table, key))
                if isinstance(module, nn.RNNBase):  # which keeps a list of its weights beside
                    for index, weight in enumerate(module._flat_weights):
                        if weight is not None:
                            places = self._index.setdefault(id(weight), (weakref.ref(weight), []))[1]
                            places.append((module._flat_weights, index))
            known = self._index[id(tensor)]
        return known[1]

    def add_buffer(self, name: str, tensor: Tensor, *, persistent: bool) -> None:
        """Register a buffer under a dotted name, making the modules on the way."""
        holder, leaf = self._holder(name)
        holder.register_buffer(leaf, tensor, persistent=persistent)
        self.edits += 1

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        """Register a parameter under a dotted name, making the modules on the way."""
        holder, leaf = self._holder(name)
        holder.register_parameter(leaf, nn.Parameter(tensor))
        self.edits += 1

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        holder: nn.Module = self.module
        for part in path:
            if part not in holder._modules:
                holder._modules[part] = nn.Module()
            holder = submodule(holder, part)
        return holder, leaf

    def has_module(self, name: str) -> bool:
        """Whether there is a submodule of this name."""
        return _exists(self.module, name, tensors=False)

    def put_module(self, name: str, module: nn.Module) -> None:
        """Set a submodule under a dotted name, making the modules on the way."""
        *path, leaf = name.split(".")
        holder: nn.Module = self.module
        for part in path:
            if part not in holder._modules:
                holder._modules[part] = nn.Module()
            holder = submodule(holder, part)
        module.train(self.module.training)
        holder._modules[leaf] = module
        self.edits += 1

    def drop_module(self, name: str) -> None:
        """Remove a submodule, if it is there."""
        path, _, leaf = name.rpartition(".")
        if submodule(self.module, path)._modules.pop(leaf, None) is not None:
            self.edits += 1

    def finish(self) -> None:
        """Check the graph and compile it, if anything changed."""
        if self.edits:
            self.sweep()
            check(self.module)
            self.module.recompile()


@contextmanager
def rewriting(module: TracedModule, author: str) -> Iterator[Rewriter]:
    """A rewriter whose edits are checked and compiled at the end."""
    rewriter = Rewriter(module, author)
    yield rewriter
    rewriter.finish()


def check(module: TracedModule) -> None:
    """The verifier between passes: a well-formed graph whose targets exist.

    Raises:
        GraphError: with the node and where it came from.
    """
    seen: set[fx.Node] = set()
    outputs = 0
    for node in module.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                raise GraphError(f"{describe(node)} reads {source.name} before it is computed.")
        if node.op == "call_module" and not _exists(module, str(node.target), tensors=False):
            raise GraphError(f"{describe(node)} calls the module {node.target}, which does not exist.")
        if node.op == "get_attr" and not _exists(module, str(node.target), tensors=True):
            raise GraphError(f"{describe(node)} reads {node.target}, which does not exist.")
        if node.op == "call_function" and not callable(node.target):
            raise GraphError(f"{describe(node)} calls {node.target!r}, which is no function.")
        outputs += node.op == "output"
        seen.add(node)
    if outputs != 1 or next(reversed(module.graph.nodes)).op != "output":
        raise GraphError(f"the graph has {outputs} output nodes; expected one, at its end.")


def _exists(module: nn.Module, name: str, *, tensors: bool) -> bool:
    """Whether a name is that of a module below ``module``, or, with ``tensors``, of a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    try:
        holder = submodule(module, path)
    except GraphError:
        return False
    tables = (holder._modules, holder._parameters, holder._buffers) if tensors else (holder._modules,)
    return any(table.get(leaf) is not None for table in tables)


def describe(node: fx.Node) -> str:
    """A node for messages: its name, who made it, and the user's line."""
    by = f", by {node.meta['by']}" if "by" in node.meta else ""
    source = f", from {node.meta['source']}" if "source" in node.meta else ""
    return f"node {node.name} ({node.op} {node.target}{by}{source})"
