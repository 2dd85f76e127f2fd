"""How the work of operators is counted: at each place that runs them, as they go by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# The MACs of one call, from its operands.


def _matrices(left: Tensor, right: Tensor) -> int:
    """[.., L, K] times [.., K, R]; a vector is a matrix without L or without R."""
    return left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def _convolution(positions: Tensor, weight: Tensor) -> int:
    """Each position of the output [N, O, *space] (of the input, if transposed) meets the kernel once."""
    return positions.shape[0] * prod(positions.shape[2:]) * weight.numel()


def _attention(query: Tensor, key: Tensor, output: Tensor) -> int:
    """Query [.., L, E] times key [.., S, E], and weights [.., L, S] times value [.., S, V]; by query head."""
    return key.shape[-2] * (query.numel() + output.numel())


def _recurrent(inputs: Tensor, weights: Iterable[Tensor]) -> int:
    """Each weight matrix [gates * H, I or H] and projection at each step of the input [T, N, I]."""
    return prod(inputs.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


_ATTENTION_KERNELS = (
    *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"),
    "fused_attention_overrideable",
)
_CONTRACTIONS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {  # of (args, output) of the operator
    **dict.fromkeys(
        [f"aten::{name}" for name in ("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm")],
        lambda args, output: _matrices(args[0], args[1]),
    ),
    **dict.fromkeys(
        [f"aten::{name}" for name in ("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation")],
        lambda args, output: _matrices(args[1], args[2]),
    ),
    **dict.fromkeys(
        [f"aten::{name}" for name in ("convolution", "_convolution", "convolution_overrideable")],
        lambda args, output: _convolution(args[0] if args[6] else output, args[1]),
    ),
    **dict.fromkeys(
        [f"aten::_scaled_dot_product_{name}" for name in _ATTENTION_KERNELS],
        lambda args, output: _attention(args[0], args[1], output[0]),
    ),
    "aten::mkldnn_rnn_layer": lambda args, output: _recurrent(args[0], args[1:3]),
    "aten::_cudnn_rnn": lambda args, output: _recurrent(args[0], args[1]),
    "mkldnn::_convolution_pointwise": lambda args, output: _convolution(output, args[1]),
    "mkldnn::_linear_pointwise": lambda args, output: args[0].numel() * args[1].shape[0],
}
_POINTWISE_WITHOUT_TAG = frozenset(
    f"aten::{name}"
    for name in ("hardswish", "_prelu_kernel", "masked_fill", "rsub", "threshold", "log_sigmoid_forward")
)
_COPIES = frozenset({"aten::clone"})  # tagged as pointwise


@dataclass
class Work:
    """What was counted at one place, over the whole batch."""

    macs: int = 0
    elementwise: int = 0
    output: tuple[int, ...] = ()


class Tally(TorchDispatchMode):
    """Counts the work of each operator at the place that runs it: name and kind of a module or fx node."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[tuple[str, str], Work] = {}
        self._running: list[tuple[str, str]] = []

    def enter(self, name: str, kind: str) -> None:
        self._running.append((name, kind))
        self.places.setdefault((name, kind), Work())

    def leave(self, result: Any) -> None:
        self.places[self._running.pop()].output = next((tuple(each.shape) for each in _tensors(result)), ())

    def call(self, name: str, kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, its work counted at (`name`, `kind`)."""
        self.enter(name, kind)
        result = None
        try:
            result = function(*args, **kwargs)
        finally:
            self.leave(result)
        return result

    def attention(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same, at a place of its own beside the running one."""
        return self.call(self._running[-1][0], "attention", function, *args, **kwargs)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count what each module inside `model` runs at that module, by hooks."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                takes_hooks = not isinstance(module, torch.jit.ScriptModule)
                if module is not model and takes_hooks:
                    enter = partial(self._before, name)
                    hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True))
                    hooks.enter_context(module.register_forward_hook(self._after, always_call=True))
            yield

    def _before(self, name: str, module: nn.Module, _: Any) -> None:
        self.enter(name, type(module).__name__)

    def _after(self, _module: nn.Module, _args: Any, result: Any) -> None:
        self.leave(result)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0].removesuffix("_")  # an in-place form is its functional one
        work = self.places[self._running[-1]]
        if name in _CONTRACTIONS:
            work.macs += _CONTRACTIONS[name](args, output)
        elif name in _POINTWISE_WITHOUT_TAG or (torch.Tag.pointwise in func.tags and name not in _COPIES):
            work.elementwise += next((each.numel() for each in _tensors(output)), 0)
        return output


class AttentionCalls(TorchFunctionMode):
    """Gives attention its own rows whichever kernel it takes: some are matrix products to a dispatch mode.

    Any function mode also makes torch.nn's attention run as its parts, not as one fused operator.
    """

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default):
            return self._tally.attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class NodeByNode(fx.Interpreter):
    """Runs a GraphModule with the work of each function and method counted at its node."""

    def __init__(self, module: fx.GraphModule, tally: Tally) -> None:
        super().__init__(module)
        self._tally = tally

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = signature(self.module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return self.run(*bound.args, *bound.kwargs.values())  # keyword-only ones are placeholders too

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):  # modules are watched by hooks
            return super().run_node(n)
        target = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "function")
        return self._tally.call(n.name, target.split(".")[0], super().run_node, n)  # "linear.default" is linear


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_iter(tree) if isinstance(leaf, Tensor))
