"""What a model costs: MACs, parameters, bytes, and measured time.

:func:`count` runs the model once, for real, under a dispatch mode that sees every ATen operator with its
operands: a module, a function, a method and an einsum all end in the same few contractions. (Fake tensors
give the same counts, but on resnet50 they take 0.65 s, a real run 0.1 s, and they stop at ``.item()``.)
"""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import prod
from typing import Any

import torch
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from fxcompress.errors import InputError
from fxcompress.inputs import Inputs, check_devices


@dataclass(frozen=True)
class Row:
    """The cost of one layer, or of what one module or fx node computes by itself.

    Attributes:
        name: dotted name of the module, or name of the fx node; "" is the model itself.
        kind: class of the module or name of the function; "attention" for scaled_dot_product_attention.
        macs: multiply-accumulates of the contractions, per sample, over all calls.
        params: elements of the module's own parameters; tied ones count where they come first.
        bytes: size of its own parameters and buffers; shared storage counts where it comes first.
        output: shape of the (first) output of the last call, batch included; () if it was not called.
        elementwise: output elements of the pointwise operators, per sample, over all calls.
    """

    name: str
    kind: str
    macs: int
    params: int
    bytes: int
    output: tuple[int, ...]
    elementwise: int


@dataclass(frozen=True)
class Cost:
    """What :func:`count` found; prints as a table.

    Attributes:
        table: a row for each layer that has a cost, in the order in which the model holds them; for a
            ``GraphModule``, in the order of execution. The totals are the sums of its columns.
    """

    table: tuple[Row, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the contractions, per sample. FLOPs are twice as many."""
        return sum(row.macs for row in self.table)

    @property
    def params(self) -> int:
        """Elements of all parameters, tied ones once, buffers not included."""
        return sum(row.params for row in self.table)

    @property
    def bytes(self) -> int:
        """Size of parameters and buffers in their own dtypes, shared storage once."""
        return sum(row.bytes for row in self.table)

    @property
    def elementwise(self) -> int:
        """Output elements of the pointwise operators that ran, per sample."""
        return sum(row.elementwise for row in self.table)

    def __rich__(self) -> Table:
        table = Table(box=box.SIMPLE, show_footer=True)
        table.add_column("layer", "total", overflow="fold")
        table.add_column("kind")
        table.add_column("output", justify="right")
        for header in ("macs", "params", "bytes", "elementwise"):
            table.add_column(header, f"{getattr(self, header):,}", justify="right")
        for row in self.table:
            figures = (row.macs, row.params, row.bytes, row.elementwise)
            table.add_row(
                escape(row.name) or "(model)", row.kind, shown_shape(row.output), *(f"{n:,}" for n in figures)
            )
        return table

    def __str__(self) -> str:
        return as_text(self)


@dataclass(frozen=True)
class Latency:
    """The measured time of one forward pass.

    Attributes:
        median: seconds for the batch.
        iqr: interquartile range of the measurements, in seconds.
        threads: threads that the operators could use.
        batch: samples in the batch.
        runs: forward passes measured.
    """

    median: float
    iqr: float
    threads: int
    batch: int
    runs: int

    def __str__(self) -> str:
        return (
            f"{self.median * 1e3:.3f} ms (median of {self.runs} runs, IQR {self.iqr * 1e3:.3f} ms), "
            f"batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        )


def count(model: nn.Module, example_inputs: Any) -> Cost:
    """Count what one forward pass of `model` in eval mode costs.

    MACs are those of convolutions (transposed and grouped ones too), linear layers, matrix products (einsum
    ends in them), recurrent layers, and scaled_dot_product_attention as its two matrix products, masked or
    not. They belong to the innermost module that was running; directly in a ``GraphModule``, to the fx node.
    Pointwise operators, as ATen tags them, are listed apart. Copies are not among them, and what a fused
    kernel does inside (attention's softmax, the gates of an LSTM) is not seen.

    Figures per sample are those of the batch as given, divided by its size and rounded up: work that does not
    depend on the batch is shared by its samples. The batch size is size 0 of the first tensor in the inputs
    that has a dimension.

    The model and the inputs are left as they were: mode, buffers, attributes, hooks, and the random state.
    Parameters that forward itself overwrites are not restored.

    Args:
        model: any module; a ``GraphModule`` is interpreted node by node. On the meta device it is counted
            without computing anything.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        InputError: the inputs are of another kind or on another device, hold no tensor or an empty batch, or
            the model fails on them; or its parameters are still lazy.
    """
    inputs = _checked(model, example_inputs)
    tally = _Tally()
    runnable = _NodeByNode(model, tally) if isinstance(model, fx.GraphModule) else model
    with _undisturbed(model), tally.watching(model), _AttentionCalls(tally), tally:
        tally.call("", type(model).__name__, _run, runnable, inputs)
    return Cost(_table(model, tally, inputs.batch))


def latency(model: nn.Module, example_inputs: Any, *, threads: int | None = None, min_run_time: float = 1.0) -> Latency:
    """Measure the time of a forward pass of `model` in eval mode, without gradients.

    ``torch.utils.benchmark`` does the measuring (``blocked_autorange``), after a warm-up.

    Args:
        model: any module, compiled ones included; left as it was, as by :func:`count`.
        example_inputs: the same as for :func:`count`; the batch is timed as given.
        threads: threads for the operators; as many as torch uses now if None.
        min_run_time: seconds to measure for; slow models are given the time of ten runs.

    Raises:
        InputError: as for :func:`count`, or `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; expected at least 1, or None for as many as torch uses now")
    inputs = _checked(model, example_inputs)
    copies = inputs.map(torch.clone)
    timer = Timer(
        "model(*args, **kwargs)",
        globals={"model": model, "args": copies.args, "kwargs": copies.kwargs},
        num_threads=threads or torch.get_num_threads(),
    )
    with _undisturbed(model):
        _run(model, inputs)
        once = timer.timeit(1).mean
        measured = timer.blocked_autorange(min_run_time=max(min_run_time, 10 * once))
    runs = measured.number_per_run * len(measured.times)
    return Latency(measured.median, measured.iqr, measured.num_threads, inputs.batch, runs)


def byte_count(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of `model` in their own dtypes, shared storage once."""
    return _new_bytes((*model.parameters(), *model.buffers()), Counter())


def as_text(renderable: RenderableType) -> str:
    """What rich shows for `renderable`, as plain text: the same whatever the terminal is."""
    console = Console(file=io.StringIO(), width=200, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def shown_shape(shape: Iterable[int]) -> str:
    """A shape as text: "64x3x7x7"."""
    return "x".join(map(str, shape))


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
class _Work:
    """What was counted at one place, over the whole batch."""

    macs: int = 0
    elementwise: int = 0
    output: tuple[int, ...] = ()


class _Tally(TorchDispatchMode):
    """Counts the work of each operator at the place that runs it: name and kind of a module or fx node."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[tuple[str, str], _Work] = {}
        self._running: list[tuple[str, str]] = []

    def enter(self, name: str, kind: str) -> None:
        self._running.append((name, kind))
        self.places.setdefault((name, kind), _Work())

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


class _AttentionCalls(TorchFunctionMode):
    """Gives attention its own rows whichever kernel it takes: some are matrix products to a dispatch mode.

    Any function mode also makes torch.nn's attention run as its parts, not as one fused operator.
    """

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self._tally = tally

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default):
            return self._tally.attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _NodeByNode(fx.Interpreter):
    """Runs a GraphModule with the work of each function and method counted at its node."""

    def __init__(self, module: fx.GraphModule, tally: _Tally) -> None:
        super().__init__(module)
        self._tally = tally

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = signature(self.module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return self.run(*bound.args)

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):  # modules are watched by hooks
            return super().run_node(n)
        target = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "function")
        return self._tally.call(n.name, target.split(".")[0], super().run_node, n)  # "linear.default" is linear


def _new_bytes(tensors: Iterable[Tensor], counted: Counter[int]) -> int:
    """How many bytes `tensors` take beyond those `counted` before, by storage; counts them."""
    total = 0
    for tensor in tensors:
        size = limit = tensor.numel() * tensor.element_size()
        key = id(tensor)
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            key = storage.data_ptr() or key  # 0 on the meta device
            limit = storage.nbytes()  # less than the size of an expanded tensor
        new = min(size, limit - counted[key])
        counted[key] += new
        total += new
    return total


def _table(model: nn.Module, tally: _Tally, batch: int) -> tuple[Row, ...]:
    counted: Counter[int] = Counter()
    seen: set[Tensor] = set()
    held: dict[tuple[str, str], tuple[int, int]] = {}  # params and bytes
    order: dict[str, int] = {}
    for name, module in model.named_modules():
        own = dict.fromkeys(module.parameters(recurse=False))
        size = _new_bytes((*own, *module.buffers(recurse=False)), counted)
        held[name, type(module).__name__] = sum(each.numel() for each in own if each not in seen), size
        seen.update(own)
        order[name] = len(order)
    places = {**tally.places, **{place: _Work() for place in held if place not in tally.places}}
    if not isinstance(model, fx.GraphModule):
        places = dict(sorted(places.items(), key=lambda place: order[place[0][0]]))
    rows = []
    for (name, kind), work in places.items():
        params, size = held.get((name, kind), (0, 0))
        macs, elementwise = -(-work.macs // batch), -(-work.elementwise // batch)
        if macs or params or size or elementwise:
            rows.append(Row(name, kind, macs, params, size, work.output, elementwise))
    return tuple(rows)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_iter(tree) if isinstance(leaf, Tensor))


def _checked(model: nn.Module, example_inputs: Any) -> Inputs:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    inputs = Inputs.parse(example_inputs)
    if inputs.batch == 0:
        raise InputError(f"example_inputs hold an empty batch (shapes {inputs.shapes()}); give at least one sample.")
    if any(map(is_lazy, model.parameters())):
        raise InputError("the model has lazy parameters, whose shapes are not known; run it once first.")
    check_devices(model, inputs)
    return inputs


def _run(model: Callable[..., Any], inputs: Inputs) -> Any:
    try:
        return inputs.run(model)
    except Exception as error:
        raise InputError(
            f"the model failed on the example inputs (shapes {inputs.shapes()}): {error}. "
            "Expected inputs on which it runs in eval mode."
        ) from error


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards attributes, buffers and the random state are what they were."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    values = [value for own in attributes for value in own.values()]
    contents = [(held, held.copy()) for held in values if type(held) in (dict, OrderedDict, list)]
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer)
        for module in modules
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    devices = {each.device for each in (*model.parameters(), *model.buffers()) if each.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
            copies = {buffer: buffer.clone() for _, _, buffer in buffers}
            for module in modules:
                module.training = False  # by .eval(), a model may do more than that
            for module, name, buffer in buffers:
                setattr(module, name, copies[buffer])
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
        for held, content in contents:
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)
        for module, own in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(own)
