"""Capture: run the caller's forward once and keep what it did as a graph (design 5)."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxcompress import attempts, dtypes
from fxcompress.attention import multihead_attention
from fxcompress.batch import looks_like_batch, replace_scaled
from fxcompress.callers import user_line
from fxcompress.chance import foreign_draws
from fxcompress.errors import FxCompressError, InputError
from fxcompress.exclusive import exclusive
from fxcompress.gradients import differentiating
from fxcompress.inputs import Inputs, check_devices, other_batch, tensors_in
from fxcompress.modes import PlainFlagNeeded, TrainingFlag
from fxcompress.module import TracedModule, copied, copy_graph, modules_of, owner, state_of
from fxcompress.recorder import CONSTANTS, MODE_HOLDER, Recorder, ValueReadError
from fxcompress.valueless import Valueless
from fxcompress.verify import difference, run_seeded, tolerance_of

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
    with differentiating():  # what is made in inference mode has no versions, by which writes are seen
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
    attempt = attempts.best(
        functools.partial(_record, model, work, inputs), work, functools.partial(_is_right, model, work, inputs)
    )
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
    if recorder.drawn:
        warnings.warn(
            f"the forward draws numbers from {' and '.join(sorted(recorder.drawn))}, which no graph does: the result "
            "keeps what they were when it was recorded. Draw from torch (torch.rand, Tensor.bernoulli_), in the size "
            "of the batch if it is a path that is dropped.",
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
    for index, (dtype, followers) in enumerate(found):
        marker = f"{dtypes.MARKER}{index or ''}"
        recorder.constants[marker] = torch.zeros((), dtype=dtype, device=recorder.device)
        dtypes.follow(recorder.graph, followers, f"{CONSTANTS}.{marker}")
    return _assemble(work, recorder, opaque, batched, waiting)


def _is_right(model: nn.Module, work: nn.Module, inputs: Inputs, attempt: attempts.Attempt) -> bool:
    """Whether a recording computes what the model does, which is told nothing about being captured."""
    made = copy.deepcopy(_assemble(work, attempt.recorder, attempt.opaque, ()))
    bounds = [tolerance_of(tensor.dtype) for tensor in model.parameters() if tensor.is_floating_point()]
    with torch.no_grad():
        expected = run_seeded(copied(model), inputs)
        try:
            return difference(expected, run_seeded(made, inputs)) <= max(bounds, default=tolerance_of(torch.float32))
        except Exception:  # noqa: BLE001 - what a recording raises where the model does not
            return False


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

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise NotImplementedError("a part that runs without gradients can only be recorded")
        return super().create_node(*args, **kwargs)


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
    computes = bool(opaque)  # an opaque module is the user's code, and looks at values
    plain: set[str] = set()
    while True:  # every round adds a module, or is the last but one
        try:
            return _record_with(model, work, inputs, opaque, known, plain, computes=computes)
        except PlainFlagNeeded as needed:
            plain.add(needed.path)
        except InputError:
            if computes:
                raise
            computes = True


def _record_with(
    model: nn.Module,
    work: nn.Module,
    inputs: Inputs,
    opaque: set[str],
    known: frozenset[int],
    plain: set[str],
    *,
    computes: bool,
) -> Recorder:
    recorder = Recorder(work, known, computes=computes)
    recorder.plain = plain
    inputs = inputs.map(lambda tensor: tensor.detach().clone())
    bound = _bind(work, inputs)
    originals = {name: t for name, t in state_of(model).items() if not isinstance(t, nn.Parameter)}
    buffers = {name: (owner(work, name), t) for name, t in recorder.state.items() if name in originals}
    with _instrumented(work, recorder, opaque), torch.random.fork_rng(devices=[]):
        for name, (value, optional) in bound.items():
            recorder.placeholder(name, value, optional)
        try:
            with foreign_draws(recorder.drawn), recorder:
                result = work(*inputs.args, **inputs.kwargs)
        except (ValueReadError, PlainFlagNeeded, FxCompressError):
            raise
        except Exception as error:
            raise InputError(
                f"the model failed on the example inputs (shapes {inputs.shapes()}): {error}. "
                "Expected inputs on which model(*inputs) runs."
            ) from error
        finally:
            held = {name: getattr(*place) for name, (place, _) in buffers.items()}
            for name, buffer in held.items():
                buffer.detach().copy_(originals[name])
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
    """Parameter name of ``forward`` to (value, whether it may be left out), in the signature's order."""
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
    constant = {name: not any(True for _ in tensors_in(value)) for name, (value, _) in flat.items()}
    needed = [name for name, (_, optional) in flat.items() if not constant[name] and not optional]
    left_out, behind = False, not needed  # Python wants defaults behind all that have none
    for name, (value, optional) in flat.items():
        left_out = left_out or (constant[name] and behind)
        flat[name] = (value, (constant[name] or optional) and left_out)
        behind = behind or name == needed[-1]
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
                module.__dict__["forward"] = _leaf_forward(recorder, path, module)
                continue
            forward = module.forward
            if isinstance(module, nn.MultiheadAttention):
                forward = functools.partial(multihead_attention, module)
            module.__dict__["forward"] = _scoped_forward(recorder, path, forward)
            inside = path in recorder.plain or any(path.startswith(f"{name}.") for name in opaque)
            if not is_leaf(module) and not inside:
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


def _leaf_forward(recorder: Recorder, path: str, module: nn.Module) -> Callable[..., Any]:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if recorder.quiet:
            return forward(*args, **kwargs)
        recorder.reached.add(path)
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            what = f"a PackedSequence, which values of lengths lay out, enters {path}"
            raise ValueReadError(recorder.scopes[-1], what, user_line())
        tensors = list(tensors_in((args, kwargs)))
        call = forward if recorder.computes or not recorder.depends_on_inputs(tensors) else valueless
        trains = not torch.is_grad_enabled() and any(each.requires_grad for each in module.parameters())
        return recorder.record(call, "", args, kwargs, tensors, module=path, trains=trains)

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
        except TypeError as error:
            if PlainFlagNeeded.is_behind(error) and path not in recorder.plain:
                raise PlainFlagNeeded(path) from None
            raise
        finally:
            recorder.scopes.pop()

    return run


# ---- the dtype and the batch dimension -----------------------------------------------------------------------------


def _dtype_followers(
    model: nn.Module, inputs: Inputs, attempt: attempts.Attempt
) -> list[tuple[torch.dtype, dtypes.Followers]]:
    """The literals that are a dtype of the model's, found by recording it in another where there could be any."""
    found = []
    present = dtypes.dtypes_of(model)
    for dtype in present:
        if not dtypes.names_dtype(attempt.recorder.graph, dtype):
            continue
        other = dtypes.other_dtype(present)
        twin = dtypes.moved(copied(model), dtype, other)
        moves = [each for each in (tensor.dtype for tensor in inputs.tensors()) if each.is_floating_point]
        given = _moved(inputs, [dtype] if len(present) > 1 else moves, other)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = attempts.attempt(functools.partial(_record, twin, twin, given), twin, attempt.asked)
        except FxCompressError:
            continue
        followers = dtypes.followers(attempt.recorder.graph, again.recorder.graph, dtype, other)
        found += [(dtype, followers)] if followers else []
    return found


def _moved(inputs: Inputs, dtypes_: list[torch.dtype], other: torch.dtype) -> Inputs:
    return inputs.map(lambda tensor: tensor.to(other) if tensor.dtype in dtypes_ else tensor)


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
    if not recorder.literals and not any(looks_like_batch(node, batch) for node in recorder.graph.nodes):
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
    return batched if replace_scaled(recorder.graph, again.graph, batch, other, source) else ()


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
