"""Under which names kernels go into the tree: those of the layers whose parameters they take over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from fxcompress.module import TracedModule, modules_of, state_of, submodule
from fxcompress.quantization.fake_quantize import fake_quant_of


class Names:
    """Hands out names that nobody else needs.

    Args:
        module: before any layer is replaced.
        layers: the calls of layers that kernels may replace, and what enters each.
    """

    def __init__(self, module: TracedModule, layers: Mapping[fx.Node, fx.Node]) -> None:
        self._taken = {*state_of(module, every_name=True), *_in_use(module, layers)}

    def take(self, parameter: str) -> str:
        """The name of the kernel that takes over a weight: its layer's.

        A layer that is called twice, or whose tensors others read, keeps its name once.
        """
        path, _, leaf = parameter.rpartition(".")
        stem = parameter.removesuffix("_weight")
        base = path if path and leaf == "weight" else stem if stem != parameter else f"{parameter}_layer"
        name, count = base, 1
        while name in self._taken:
            count += 1
            name = f"{base}_call{count}"
        self._taken.add(name)
        return name


def _in_use(module: TracedModule, layers: Mapping[fx.Node, fx.Node]) -> set[str]:
    """Modules that are called, or of whose tensors somebody reads more than the layers do."""
    constant: set[fx.Node] = set()
    for node in module.graph.nodes:
        made = node.op in ("call_function", "call_method") or fake_quant_of(module, node) is not None
        if node.op == "get_attr" or (made and node.all_input_nodes and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    held: set[fx.Node] = set()  # parameters of these layers, and of nobody else
    for node in reversed(module.graph.nodes):
        if node in constant and all(user in held or layers.get(user, node) is not node for user in node.users):
            held.add(node)
    found = {str(node.target) for node in module.graph.find_nodes(op="call_module") if node not in layers}
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr") if node not in held}
    return found | {name.rpartition(".")[0] for name in read}


def state_read(module: TracedModule) -> dict[str, Tensor]:
    """The parameters and buffers that the graph reads, by itself or in the modules that it calls, by all names."""
    targets = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    state = state_of(module, every_name=True)
    return {name: tensor for name, tensor in state.items() if not targets.isdisjoint(_paths(name))}


def _paths(name: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def drop_unread(module: TracedModule, before: Mapping[str, Tensor]) -> None:
    """Remove the parameters and buffers that a graph read before, and no longer does.

    Args:
        module: changed in place.
        before: see :func:`state_read`.
    """
    gone = {id(tensor) for tensor in before.values()} - {id(tensor) for tensor in state_read(module).values()}
    called = {str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")}
    for name, item in modules_of(module, every_name=True).items():
        lost = [leaf for table in _tables(item) for leaf, tensor in table.items() if id(tensor) in gone]
        if not lost or not called.isdisjoint(_paths(name)):
            continue
        left = nn.Module()  # a layer without its weight is none
        left.training = item.training
        left._modules.update(item._modules)
        for table, kept in zip(_tables(item), _tables(left), strict=True):
            kept.update({leaf: tensor for leaf, tensor in table.items() if leaf not in lost and tensor is not None})
        left._non_persistent_buffers_set.update(item._non_persistent_buffers_set - set(lost))
        _exchange(module, name, left)


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _exchange(root: TracedModule, name: str, left: nn.Module) -> None:
    """Put what is left of a module in its place, if anything is."""
    if not name:
        for table, kept in zip(_tables(root), _tables(left), strict=True):
            for leaf in table.keys() - kept.keys():
                del table[leaf]
        root._non_persistent_buffers_set.intersection_update(left._non_persistent_buffers_set)
        return
    path, _, key = name.rpartition(".")
    parent = submodule(root, path)
    if left._modules or any(_tables(left)):
        parent._modules[key] = left
    else:
        del parent._modules[key]
