"""Capture: run the caller's forward once and keep what it did as a graph (design 5)."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxcompress import attempts, dtypes
from fxcompress.arguments import leaves, mapped
from fxcompress.attention import multihead_attention
from fxcompress.errors import FxCompressError, InputError
from fxcompress.exclusive import exclusive
from fxcompress.inputs import Inputs, check_devices, other_batch, tensors_in
from fxcompress.module import TracedModule, copied, copy_graph, modules_of, owner, state_of
from fxcompress.nodes import scale_size
from fxcompress.recorder import CONSTANTS, MODE_HOLDER, Recorder, TrainingFlag, ValueReadError, user_line
from fxcompress.valueless import Valueless

#: Modules of torch.nn that are written out or traced through: channels, or sizes that change with them, live inside.
_OPENED = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.Unflatten,
)
#: Functions whose integers are sizes, where a literal may stand for the batch.
_SHAPED = frozenset(
    """
    view reshape expand repeat tile unflatten split narrow arange zeros ones full empty rand randn new_zeros
    new_ones new_full new_empty broadcast_to
    """.split()
)


#: Functions that take a dimension apart, over which Python may then have looped.
_TAKEN_APART = frozenset(("unbind", "select", "chunk", "split", "tensor_split"))


@exclusive
def trace(model: nn.Module, example_inputs: Any = None) -> TracedModule:
    """Record ``model``'s forward on ``example_inputs`` as a graph over its own layers.

    ``torch.nn`` layers become ``call_module`` nodes, everything else the functions and methods that ran. Sizes stay
    symbolic, so the result runs at other batch sizes, and at other resolutions where the model does. The model is
    copied; the caller's is left as it was. Its mode (train or eval) decides which code path is recorded.

    Args:
        model: any module, or what fxcompress made before (which is copied, not traced again).
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Without any, the forward is
            traced with stand-ins, which fails where Python looks at sizes or values.

    Raises:
        InputError: inputs on another device, or the forward fails on them (or on stand-ins).
        TraceError: the forward itself reads values out of tensors (the line is named).
    """
    return capture(model, example_inputs)


def capture(model: nn.Module, example_inputs: Any, *, waiting: bool = False) -> TracedModule:
    """:func:`trace`, of which a recorded graph may be ``waiting`` for its code."""
    if isinstance(model, TracedModule) and (example_inputs is None or not model.meta.get("provisional")):
        return copy.deepcopy(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    if example_inputs is None:
        return _trace_symbolically(model)
    inputs = Inputs.parse(example_inputs)
    if inputs is not example_inputs:  # whoever parsed them has checked them
        check_devices(model, inputs)
    if isinstance(model, TracedModule):
        return _trace_again(model, inputs)
    return _trace(model, inputs, waiting)


def _trace(model: nn.Module, inputs: Inputs, waiting: bool = False) -> TracedModule:
    work = copied(model)
    attempt = attempts.best(functools.partial(_record, model, work, inputs), work)
    recorder, opaque = attempt.recorder, attempt.opaque
    for scope, read in attempt.reads.items():
        warnings.warn(
            f"{scope} stays as it is: {read.what}, at {read.line}. Its channels will not be pruned.", stacklevel=3
        )
    for field, kind in recorder.left_out.items():
        warnings.warn(
            f"{field} of the model's result is a {kind}, which a graph cannot hold: the traced model leaves it None. "
            "If you do not need it, turn it off in the call or in the model's config (a cache of keys and values by "
            "use_cache=False); if you do, return its tensors.",
            stacklevel=3,
        )
    if recorder.branches:
        warnings.warn(
            f"the forward asks for self.training, at {recorder.branches[0]}, and the model is in train mode: the path "
            "that it takes then is what was recorded. Call model.eval() before, if the result is to run in eval mode.",
            stacklevel=3,
        )
    found = _dtype_followers(model, inputs, attempt)
    with attempt.asked():
        batched = _settle_batch(model, work, inputs, recorder, opaque)
    if found:
        recorder.constants[dtypes.MARKER] = torch.zeros((), dtype=dtypes.dtype_of(work), device=recorder.device)
        dtypes.follow(recorder.graph, found, f"{CONSTANTS}.{dtypes.MARKER}")
    return _assemble(work, recorder, opaque, batched, waiting)


def _trace_again(model: TracedModule, inputs: Inputs) -> TracedModule:
    """What was traced with stand-ins, recorded now that there are inputs; its masks are laid again."""
    from fxcompress.masking import lay, lift  # masks need the analysis, which traces

    work = copy.deepcopy(model)
    masking, history = lift(work), work.meta["history"]
    made = _trace(work, inputs)
    made.meta["history"] = history
    lay(made, masking, None, "trace")
    return made


class _StandIns(fx.Tracer):
    """torch.fx's own tracer, with our leaves: for passes that look at weights alone."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or isinstance(m, nn.MultiheadAttention)


def _trace_symbolically(model: nn.Module) -> TracedModule:
    work = copy.deepcopy(model)
    recorder = Recorder(work, frozenset())
    try:
        recorder.graph = copy_graph(_StandIns().trace(work))
    except Exception as error:  # whatever a forward does to a stand-in
        raise InputError(
            f"example_inputs is missing, and the forward cannot be traced without ({type(error).__name__}: {error}). "
            "Pass a batch for it to run on."
        ) from error
    state = {name for name, _ in [*work.named_parameters(), *work.named_buffers()]}
    for node in recorder.graph.find_nodes(op="get_attr"):
        if node.target not in state:  # a tensor that the forward made, or that is a plain attribute
            path, _, leaf = str(node.target).rpartition(".")
            recorder.constants[node.name] = getattr(work.get_submodule(path), leaf)
            node.target = f"{CONSTANTS}.{node.name}"
    targets = [str(node.target) for node in recorder.graph.nodes if node.op == "call_module"]
    recorder.reached |= {name for name, _ in work.named_modules()}
    opaque = {name for name in targets if not is_leaf(work.get_submodule(name))}
    made = _assemble(work, recorder, opaque, ())
    made.meta["provisional"] = True
    return made


def _record(model: nn.Module, work: nn.Module, inputs: Inputs, opaque: set[str], known: frozenset[int]) -> Recorder:
    """Record the forward without computing what layers make of activations; with it, where that is not possible."""
    if not opaque:  # an opaque module is the user's code, and looks at values
        try:
            return _record_with(model, work, inputs, opaque, known, computes=False)
        except InputError:
            pass
    return _record_with(model, work, inputs, opaque, known, computes=True)


def _record_with(
    model: nn.Module, work: nn.Module, inputs: Inputs, opaque: set[str], known: frozenset[int], *, computes: bool
) -> Recorder:
    recorder = Recorder(work, known, computes=computes)
    inputs = inputs.map(Tensor.clone)
    bound = _bind(work, inputs)
    originals = {name: t for name, t in state_of(model).items() if not isinstance(t, nn.Parameter)}
    buffers = {name: (owner(work, name), t) for name, t in recorder.state.items() if name in originals}
    with _instrumented(work, recorder, opaque), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name, (value, optional) in bound.items():
            recorder.placeholder(name, value, optional)
        try:
            with recorder:
                result = work(*inputs.args, **inputs.kwargs)
        except (ValueReadError, FxCompressError):
            raise
        except Exception as error:
            raise InputError(
                f"the model failed on the example inputs (shapes {inputs.shapes()}): {error}. "
                "Expected inputs on which model(*inputs) runs."
            ) from error
        finally:
            held = {name: getattr(*place) for name, (place, _) in buffers.items()}
            for name, buffer in held.items():
                buffer.copy_(originals[name])
        replaced = sorted(name for name, (_, buffer) in buffers.items() if held[name] is not buffer)
        if replaced:
            warnings.warn(
                f"the forward replaces {', '.join(replaced)} by a new tensor, which a graph cannot do: the result "
                "keeps the value. Write into the buffer in place (copy_, mul_, add_).",
                stacklevel=4,
            )
        recorder.output(result)
    return recorder


def _bind(model: nn.Module, inputs: Inputs) -> dict[str, tuple[Any, bool]]:
    """Parameter name of ``forward`` to (value, whether it has a default), in the signature's order."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise InputError(f"example_inputs do not fit the model's forward{signature}: {error}.") from None
    flat: dict[str, tuple[Any, bool]] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            flat.update({f"{name}_{i}": (item, False) for i, item in enumerate(value)})
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            flat.update({key: (item, False) for key, item in value.items()})
        else:
            flat[name] = (value, parameter.default is not inspect.Parameter.empty)
    first_default = False
    for name, (value, optional) in flat.items():  # Python wants defaults after all that have none
        first_default = first_default or not any(True for _ in tensors_in(value))
        flat[name] = (value, optional and first_default)
    return flat


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is recorded as one call: a plain ``torch.nn`` layer without hooks."""
    plain = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, _OPENED)
    hooked = module._forward_hooks or module._forward_pre_hooks
    if isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros":
        return False  # a pad and a convolution
    childless = all(child is None for child in module._modules.values())
    return plain and not hooked and childless and type(module) is not nn.Module


@contextmanager
def _instrumented(model: nn.Module, recorder: Recorder, opaque: set[str]) -> Iterator[None]:
    """Let every submodule report its calls to the recorder, and nothing of that outlive the context."""
    modules = list(modules_of(model).items())
    saved = [(module, dict(module.__dict__)) for _, module in modules]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for path, module in modules:
            if path in opaque or (path and is_leaf(module)):  # the model itself is always written out
                module.__dict__["forward"] = _leaf_forward(recorder, path, module.forward)
                continue
            forward = module.forward
            if isinstance(module, nn.MultiheadAttention):
                forward = functools.partial(multihead_attention, module)
            module.__dict__["forward"] = _scoped_forward(recorder, path, forward)
            if not is_leaf(module) and not any(path.startswith(f"{name}.") for name in opaque):
                flag = module.__dict__["training"] = TrainingFlag(module.training)
                flag.asked = recorder.branches if module.training else None
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, before in saved:
            for key in ("forward", "training"):
                module.__dict__.pop(key, None)
                if key in before:
                    module.__dict__[key] = before[key]


def _leaf_forward(recorder: Recorder, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if recorder.quiet:
            return forward(*args, **kwargs)
        recorder.reached.add(path)
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            what = f"a PackedSequence, which values of lengths lay out, enters {path}"
            raise ValueReadError(recorder.scopes[-1], what, user_line())
        tensors = list(tensors_in((args, kwargs)))
        call = forward if recorder.computes or not recorder.depends_on_inputs(tensors) else valueless
        return recorder.record(call, "", args, kwargs, tensors, module=path)

    def valueless(*args: Any, **kwargs: Any) -> Any:
        with Valueless():
            return forward(*args, **kwargs)

    return run


def _scoped_forward(recorder: Recorder, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        recorder.reached.add(path)
        recorder.scopes.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            recorder.scopes.pop()

    return run


# ---- the dtype and the batch dimension -----------------------------------------------------------------------------


def _dtype_followers(model: nn.Module, inputs: Inputs, attempt: attempts.Attempt) -> dtypes.Followers:
    """The literals that are the model's own dtype, found by recording it in another where there could be any."""
    dtype = dtypes.dtype_of(model)
    if dtype is None or not dtypes.names_dtype(attempt.recorder.graph, dtype):
        return []
    other = dtypes.other_dtype(dtype)
    twin = copied(model).to(other)
    moved = inputs.map(lambda tensor: tensor.to(other) if tensor.is_floating_point() else tensor)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = attempts.attempt(functools.partial(_record, twin, twin, moved), twin, attempt.asked)
    except FxCompressError:
        return []
    return dtypes.followers(attempt.recorder.graph, again.recorder.graph, dtype, other)


def _settle_batch(
    model: nn.Module, work: nn.Module, inputs: Inputs, recorder: Recorder, opaque: set[str]
) -> tuple[str, ...]:
    """Names of the inputs whose dimension 0 is the batch; literals that stand for it become sizes.

    ``int(x)`` drops a size's memory, which is right for a size that must not change and wrong for a batch. Where a
    literal looks like one, the forward is recorded once more at another batch size, and the literals that scaled
    with it are the batch. If the two recordings differ otherwise, there is no batch dimension.
    """
    batch = inputs.batch
    batched = tuple(name for name, value in recorder.inputs.items() if value.dim() and len(value) == batch)
    if not batched:
        return ()
    if not recorder.literals and not any(_looks_like_batch(node, batch) for node in recorder.graph.nodes):
        return batched
    other = other_batch(batch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = _record(model, work, inputs.rebatched(other), opaque, recorder.known)
    except (FxCompressError, ValueReadError):
        return ()
    pairs = zip(recorder.literals, again.literals, strict=False)
    if not all(torch.equal(one, two) for one, two in pairs):
        return ()  # numbers in the code count the batch
    source = next(node for node in recorder.graph.nodes if node.name in batched)
    return batched if _replace_scaled(recorder.graph, again.graph, batch, other, source) else ()


def _looks_like_batch(node: fx.Node, batch: int) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return False
    if name in _TAKEN_APART or (name == "getitem" and _first_index(node.args[1])):
        return True
    if name not in _SHAPED:
        return False
    return any(type(leaf) is int and leaf > 0 and leaf % batch == 0 for leaf in leaves((node.args, node.kwargs)))


def _first_index(index: Any) -> bool:
    """Whether an index picks one element, or a fixed range, of dimension 0."""
    first = index[0] if isinstance(index, (tuple, list)) and index else index
    if isinstance(first, slice):
        return any(type(bound) is int for bound in (first.start, first.stop))
    return type(first) is int


def _replace_scaled(first: fx.Graph, second: fx.Graph, batch: int, other: int, source: fx.Node) -> bool:
    """Turn the literals that scale with the batch into sizes of ``source``; False if the graphs do not correspond."""
    pairs = list(zip(first.nodes, second.nodes, strict=False))
    if len(first.nodes) != len(second.nodes):
        return False
    scaled: list[tuple[fx.Node, set[int]]] = []
    for node, twin in pairs:
        if (node.op, node.target) != (twin.op, twin.target):
            return False
        here, there = leaves((node.args, node.kwargs)), leaves((twin.args, twin.kwargs))
        if len(here) != len(there):
            return False
        found = set()
        for index, (a, b) in enumerate(zip(here, there, strict=True)):
            if isinstance(a, (fx.Node, Tensor)) or a == b:
                continue
            if type(a) is not int or type(b) is not int or a * other != b * batch:
                return False
            found.add(index)
        if found:
            scaled.append((node, found))
    if scaled:
        _write_sizes(first, scaled, batch, source)
    return True


def _write_sizes(graph: fx.Graph, scaled: list[tuple[fx.Node, set[int]]], batch: int, source: fx.Node) -> None:
    with graph.inserting_after(source):
        size = graph.call_method("size", (source, 0))
    for node, indices in scaled:
        places = itertools.count()

        def rewrite(
            value: Any, node: fx.Node = node, indices: set[int] = indices, places: Iterator[int] = places
        ) -> Any:
            if next(places) not in indices:
                return value
            if value == batch:
                return size
            with graph.inserting_before(node):
                return graph.call_function(scale_size, (size, value, batch))

        node.args, node.kwargs = mapped(rewrite, node.args), mapped(rewrite, dict(node.kwargs))


# ---- the module that runs the graph --------------------------------------------------------------------------


class Holder(nn.Module):
    """Stands where one of the caller's modules stood and keeps its parameters, buffers and children.

    ``kind`` is the torch.nn class that the module was, or derived from, so that passes can select it by type and the
    caller's own class is not needed to load it.
    """

    kind: type[nn.Module] = nn.Module

    @classmethod
    def of(cls, module: nn.Module) -> Holder:
        """One that holds the module's own tensors, and no children yet."""
        made = cls()
        made.kind = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn"))
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
            made.__dict__[name] = module.__dict__[name]
        return made

    def extra_repr(self) -> str:
        return f"of {self.kind.__name__}"


def _tied(modules: dict[str, nn.Module], kept: set[str]) -> set[str]:
    """Names of the modules outside ``kept`` that hold nothing but other names of parameters inside."""
    inside = {id(parameter) for path in kept if path in modules for parameter in modules[path]._parameters.values()}
    return {
        path
        for path, module in modules.items()
        if path not in kept
        and path.rpartition(".")[0] in kept
        and not any(True for _ in (*module.children(), *module.buffers(recurse=False)))
        and (own := [parameter for parameter in module._parameters.values() if parameter is not None])
        and inside.issuperset(map(id, own))
    }


def _assemble(
    work: nn.Module, recorder: Recorder, opaque: set[str], batched: tuple[str, ...], waiting: bool = False
) -> TracedModule:
    nodes = list(recorder.graph.nodes)
    used = {str(node.target) for node in nodes if node.op == "get_attr"}
    kept = recorder.reached | {name.rpartition(".")[0] for name in used}
    ancestors = {".".join(path.split(".")[:depth]) for path in kept for depth in range(path.count(".") + 1)}
    kept |= ancestors
    dropped: list[str] = []
    every = modules_of(work)
    idle = _tied(every, kept)  # nobody calls them, and their names are in the state_dict
    kept |= idle
    canonical = {id(module): path for path, module in every.items()}
    modules = {path: module for path, module in every.items() if path in kept}
    whole = {path for path in modules if path in opaque or (path and path not in idle and is_leaf(modules[path]))}
    made = {id(item): item if path in whole else Holder.of(item) for path, item in modules.items()}
    for path, module in modules.items():
        for name, child in module._modules.items() if path not in whole else ():
            if child is not None and canonical[id(child)] in kept:
                made[id(module)]._modules[name] = made[id(child)]
            elif child is not None and any(True for _ in [*child.parameters(), *child.buffers()]):
                dropped.append(canonical[id(child)])
    tree = made[id(work)]
    if any(node.target == MODE_HOLDER for node in nodes):
        tree._modules[MODE_HOLDER] = nn.Identity().train(tree.training)
    if recorder.constants:
        tree._modules[CONSTANTS] = constants = nn.Module()
        for name, tensor in recorder.constants.items():
            constants.register_buffer(name, tensor.detach().clone(), persistent=False)
    meta = {"history": (), "batched": batched, "opaque": tuple(sorted(opaque)), "unreached": tuple(dropped)}
    return TracedModule.build(tree, recorder.graph, meta, waiting=waiting)
