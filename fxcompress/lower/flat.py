"""A graph as one function with everything looked up beforehand.

What torch.fx generates finds every layer through its path of containers (``self.features.__getattr__("2").conv``) and
calls it through ``nn.Module.__call__``: some microseconds for each node, which counts where a kernel takes fifty.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxcompress.lower.integers import PREPARED
from fxcompress.lower.replayed import Replayed, recordable

#: ``module.meta``: the module runs as a flat function.
FLAT = "flat"
_LITERALS = (bool, int, str, type(None))


def flattened(module: fx.GraphModule) -> Callable[..., Any] | None:
    """The function that runs a module's graph, without gradients; None if its signature is beyond this.

    It holds the layers and tables of tensors, not the module. Tensors may be replaced; layers may not, but for those
    without packed weights where a call is not replayed. Kernels with packed weights are called directly, without hooks.
    What comes again in the same shapes is replayed without Python (:mod:`fxcompress.lower.replayed`).
    """
    names: dict[str, Any] = {}
    fixed = recordable(module)
    variables = {node: f"v{number}" for number, node in enumerate(module.graph.nodes)}
    inputs: list[fx.Node] = []
    lines: list[str] = []
    dying = _last_uses(module.graph)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if str(node.target).startswith("*"):
                return None
            inputs.append(node)
            continue
        if node.op == "output":
            lines.append(f"return {_text(node.args[0], variables, names)}")
            continue
        lines.append(f"{variables[node]} = {_call(module, node, variables, names, fixed)}")
        dead = [variables[other] for other in dying.get(node, ())]
        if dead:
            lines.append(f"del {', '.join(dead)}")
    defaults = [f"{node.target}={_bound(names, node.args[0])}" if node.args else str(node.target) for node in inputs]
    given = ", ".join(str(node.target) for node in inputs)
    own = "_" * (1 + max((len(str(node.target)) for node in inputs), default=0))  # begins the name of no input
    names |= {f"{own}no_grad": torch.no_grad, f"{own}grad": torch.is_grad_enabled}
    code = f"""
def made():
    def {own}run({", ".join(variables[node] for node in inputs)}):
        {(chr(10) + " " * 8).join(lines)}
    def forward({", ".join(defaults)}):
        if not {own}grad():  # to enter no_grad once more takes as long as a small kernel
            return {own}run({given})
        with {own}no_grad():
            return {own}run({given})
    return forward
"""
    exec(code, names)
    function: Callable[..., Any] = names.pop("made")()  # in `names` it would keep itself alive
    return Replayed(function, module) if fixed else function


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What nobody needs any more after each node; the inputs stay."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in dict.fromkeys((*node.all_input_nodes, node)):
            if source not in seen and node.op != "output" and source.op != "placeholder":
                found.setdefault(node, []).append(source)
            seen.add(source)
    return found


def _call(
    module: fx.GraphModule, node: fx.Node, variables: dict[fx.Node, str], names: dict[str, Any], fixed: bool
) -> str:
    """A node as code. Layers that are not ``fixed`` are looked up at every call, unless their weights are packed."""
    if node.op == "get_attr":
        return _attribute(module, str(node.target), names)
    args = [_text(item, variables, names) for item in node.args]
    args += [f"{key}={_text(item, variables, names)}" for key, item in node.kwargs.items()]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    if node.op == "call_module":
        path, _, leaf = str(node.target).rpartition(".")
        layers = module.get_submodule(path)._modules
        if hasattr(layers[leaf], "_kernel"):
            layer = _bound(names, layers[leaf])
            return f"({layer}._kernel or {layer})({', '.join(args)})"
        layer = _bound(names, layers[leaf]) if fixed else f"{_bound(names, layers)}[{leaf!r}]"
        return f"{layer}({', '.join(args)})"
    if node.target is operator.getitem and len(args) == 2 and isinstance(node.args[1], int):
        return f"{args[0]}[{args[1]}]"
    if node.target in PREPARED and not node.kwargs and all(map(_is_constant, node.args[1:])):
        return f"{_bound(names, PREPARED[node.target](*node.args[1:]))}({args[0]})"
    return f"{_bound(names, node.target)}({', '.join(args)})"


def _attribute(module: fx.GraphModule, name: str, names: dict[str, Any]) -> str:
    path, _, leaf = name.rpartition(".")
    holder: nn.Module = module.get_submodule(path)
    for table in (holder._parameters, holder._buffers):
        if leaf in table:
            return f"{_bound(names, table)}[{leaf!r}]"
    return _bound(names, getattr(holder, leaf))


def _text(value: Any, variables: dict[fx.Node, str], names: dict[str, Any]) -> str:
    """An argument as code."""
    if isinstance(value, fx.Node):
        return variables[value]
    if type(value) in _LITERALS:
        return repr(value)
    if isinstance(value, slice):
        parts = (_text(item, variables, names) for item in (value.start, value.stop, value.step))
        return f"slice({', '.join(parts)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(item, variables, names)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)) and not _is_constant(value):
        parts = (_text(item, variables, names) for item in value)
        if hasattr(value, "_fields"):
            return f"{_bound(names, type(value))}({', '.join(parts)})"
        return f"[{', '.join(parts)}]" if isinstance(value, list) else f"({', '.join(parts)},)"
    return _bound(names, value)


def _is_constant(value: Any) -> bool:
    """Whether a tuple, once made, will do for every call; a list might be written into."""
    if isinstance(value, (fx.Node, list, dict, slice)):
        return False
    return all(map(_is_constant, value)) if isinstance(value, tuple) else True


def _bound(names: dict[str, Any], value: Any) -> str:
    name = f"c{len(names)}"
    names[name] = value
    return name
