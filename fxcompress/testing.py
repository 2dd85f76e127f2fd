"""Laws that every pass obeys, and networks to check them on: for tests of one's own passes.

    from hypothesis import given
    from fxcompress.testing import Spec, check_laws, inputs, network, networks

    @given(networks())
    def test_my_pass(spec: Spec) -> None:
        check_laws(MyPass(0.5), network(spec), inputs(spec))

Drawing networks needs hypothesis, which is imported when a strategy is made.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.compress import Step, compress
from fxcompress.context import Context
from fxcompress.errors import VerificationError
from fxcompress.generate import Op, Spec, inputs, motifs, network, networks
from fxcompress.inputs import Inputs, other_batch
from fxcompress.module import MASKS, TracedModule
from fxcompress.pipeline import Pass
from fxcompress.quantization.fake_quantize import QUANT
from fxcompress.task import Task
from fxcompress.trace import trace
from fxcompress.verify import TOLERANCE, precise

__all__ = [
    "LAWS", "Case", "LawBroken", "Op", "Spec", "check_laws", "inputs", "motifs", "network", "networks", "quiet_task",
]  # fmt: skip


class LawBroken(AssertionError):  # noqa: N818 - it reads as what it is
    """A pass breaks a law.

    Attributes:
        law: the law's name, a key of :data:`LAWS`.
    """

    def __init__(self, law: str, message: str) -> None:
        super().__init__(f"{law}: {message}")
        self.law = law


@dataclass(frozen=True)
class Case:
    """One run of a pass: what every law looks at.

    Attributes:
        item: the pass.
        model: the caller's model.
        inputs: the example inputs, at the caller's and (where the model has a batch dimension) at another batch size.
        before: the model as a trace, which is what the pass got.
        after: the result.
        again: the result of running the pass on the result, or None where the pass does not say that it is idempotent.
        touched: where the caller's model, the inputs, the random numbers or the first result changed during the runs.
        seed: of the runs.
    """

    item: Pass
    model: nn.Module
    inputs: tuple[Inputs, ...]
    before: TracedModule
    after: TracedModule
    again: TracedModule | None
    touched: tuple[str, ...]
    seed: int

    @property
    def step(self) -> Step:
        """What the result's history says about the run."""
        step: Step = self.after.meta["history"][-1]
        return step

    @functools.cached_property
    def outputs(self) -> list[list[Any]]:
        """The result's outputs in eval mode, for each of the inputs."""
        twin = copy.deepcopy(self.after).eval()
        return [_run(twin, trial) for trial in self.inputs]


def check_laws(
    pass_: Pass,
    model: nn.Module,
    inputs: Any,
    *,
    task: Task | None = None,
    seed: int = 0,
    laws: Sequence[str] | None = None,
) -> TracedModule:
    """Run a pass on a model and check the laws that every pass obeys.

    - ``untouched``: the caller's model (state bit by bit, modes, graph, attributes), the inputs and the global random
      numbers are as before.
    - ``verifies``: the result is a well-formed graph whose layers' attributes agree with their weights; it runs, at
      another batch size too, and gives outputs of the same shapes.
    - ``modified``: the flag in its history holds if and only if the printed graph or the state changed.
    - ``idempotent``: a second run changes nothing, where the pass says so.
    - ``preserves``: what it claims to preserve is preserved, in float64; by its own ``compare``, if it has one.
    - ``keys``: the ``state_dict`` has the caller's keys, but for masks and for what the notes or ``meta`` list.
    - ``copies``: a deep copy and a pickle compute the same, and share no tensor with the result.
    - ``modes``: the result is in the model's mode; ``train()`` and ``eval()`` reach everything, and training for a step
      and coming back gives the same outputs.
    - ``trains``: every parameter that had a gradient still gets one, unless the result is not to be trained.

    Args:
        pass_: the pass.
        model: any module, or what fxcompress made.
        inputs: what ``compress`` takes as ``example_inputs``.
        task: what a pass trains on; :func:`quiet_task` by default.
        seed: for whatever is random.
        laws: names of the laws to check; all by default.

    Returns:
        The result, for further checks.

    Raises:
        LawBroken: naming the law and what was found.
    """
    chosen = tuple(LAWS) if laws is None else tuple(laws)
    unknown = [name for name in chosen if name not in LAWS]
    if unknown:
        raise ValueError(f"laws has {unknown[0]!r}; expected names from {', '.join(LAWS)}.")
    example = Inputs.parse(inputs)
    case = _run_case(pass_, model, example, quiet_task(example) if task is None else task, seed)
    for name in chosen:
        problem = LAWS[name](case)
        if problem:
            raise LawBroken(name, f"{problem} ({pass_!r})")
    return case.after


def quiet_task(inputs: Inputs) -> Task:
    """A task for any model: its batches are the inputs, twice; its outputs shall be small."""
    return Task(
        batches=[inputs, inputs],
        loss=_mean_square,
        score=lambda model: -float(_mean_square(model, inputs)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    )


def _mean_square(model: nn.Module, batch: Inputs) -> Tensor:
    floating = [
        out for out in pytree.tree_leaves(batch.run(model)) if isinstance(out, Tensor) and out.is_floating_point()
    ]
    scale = max((float(out.detach().abs().max()) for out in floating if out.numel()), default=1.0) or 1.0
    total = torch.zeros((), requires_grad=True)
    for out in floating:
        total = total + (out.float() / scale).square().mean()
    return total


def _run_case(item: Pass, model: nn.Module, example: Inputs, task: Task, seed: int) -> Case:
    run = functools.partial(
        compress, passes=[item], example_inputs=example, task=task, verify=False, seed=seed, progress=False
    )
    before = trace(model, example)
    portraits = {"model": (model, portrait(model)), "inputs": (example, portrait(example))}
    random = torch.get_rng_state()

    def touched() -> tuple[str, ...]:
        found = [
            f"{name}{where}" for name, (thing, old) in portraits.items() for where in _changes(old, portrait(thing))
        ]
        return (
            *found,
            *([] if torch.equal(random, torch.get_rng_state()) else ["torch's global random numbers"]),
        )

    try:
        after = run(model)
        portraits["result"] = (after, portrait(after))
        again = run(after) if item.idempotent else None
    except Exception as error:
        changed = touched()
        if changed:  # also a run that fails leaves the caller's model alone
            raise LawBroken("untouched", f"{changed[0]} changed, and the pass failed: {error} ({item!r})") from error
        raise
    trials = (example, *([example.rebatched(other_batch(example.batch))] if before.meta["batched"] else []))
    return Case(item, model, trials, before, after, again, touched(), seed)


# ---- what was there before, without a copy that could be wrong in the same way ---------------------------------


def portrait(thing: Any) -> dict[str, Any]:
    """Everything that a model (or any tree of objects) consists of, by path: equal portraits mean untouched.

    Tensors count with identity and every bit, graphs with their printed nodes, other objects with their attributes.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    waiting = [("", thing)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Tensor):
            found[path] = (id(value), value.requires_grad, *content(value))
            waiting.append((f"{path}.grad", value.grad if value.is_leaf else None))
        elif isinstance(value, np.ndarray):
            found[path] = (str(value.dtype), value.shape, value.tobytes())
        elif isinstance(value, fx.Graph):
            found[path] = (id(value), printed(value), tuple(tuple(node.meta) for node in value.nodes))
        elif isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)):
            found[path] = repr(value)
        elif id(value) in seen:
            found[path] = id(value)
        else:
            seen.add(id(value))
            items = _items(value)
            found[path] = (id(value), type(value), tuple(key for key, _ in items))
            waiting += [(f"{path}{key}", item) for key, item in reversed(items)]
    return found


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, (nn.Module, Inputs)):
        return [(f".{key}", item) for key, item in vars(value).items()]
    return []


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for path in {**old, **new}:
        if old.get(path) != new.get(path):
            yield path


def content(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor's dtype, shape and bits."""
    if tensor.is_meta:
        return str(tensor.dtype), tuple(tensor.shape), b""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (
        str(tensor.dtype),
        tuple(tensor.shape),
        flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"",
    )


def printed(graph: fx.Graph) -> tuple[str, ...]:
    """The nodes of a graph, one line each."""
    return tuple(f"{n.name} = {n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes)


def _state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: content(tensor) for name, tensor in named}


def _difference(one: TracedModule, two: TracedModule) -> str:
    """Where two modules differ in printed graph or state; empty where they do not."""
    for left, right in zip(printed(one.graph), printed(two.graph), strict=False):
        if left != right:
            return f"{left!r} became {right!r}"
    if len(one.graph.nodes) != len(two.graph.nodes):
        return f"{len(one.graph.nodes)} nodes became {len(two.graph.nodes)}"
    names = list(_changes(_state(one), _state(two)))
    return f"{names[0]} changed" if names else ""


# ---- running ---------------------------------------------------------------------------------------------------


def _run(model: nn.Module, trial: Inputs) -> list[Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pytree.tree_leaves(trial.run(model))


def _gap(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """The largest ``max abs(a - b) / max abs(a)`` over outputs."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if isinstance(a, Tensor) and a.numel():
            a, b = a.double(), b.double()
            if not torch.equal(a.isfinite(), b.isfinite()):
                return float("inf")
            a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
            scale = a.abs().max().item()
            worst = max(worst, (a - b).abs().max().item() / (scale or 1.0))
    return worst


def _shapes(outputs: Sequence[Any]) -> list[Any]:
    return [tuple(item.shape) if isinstance(item, Tensor) else type(item) for item in outputs]


def _equal(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return _shapes(one) == _shapes(two) and all(
        content(a) == content(b) for a, b in zip(one, two, strict=True) if isinstance(a, Tensor)
    )


# ---- the laws: each returns what breaks it, or nothing ---------------------------------------------------------


def _untouched(case: Case) -> str:
    return f"{case.touched[0]} changed" if case.touched else ""


def _verifies(case: Case) -> str:
    after = case.after
    try:
        after.graph.lint()
        outputs = case.outputs
    except Exception as error:  # whatever a broken graph raises
        return f"the result does not run: {type(error).__name__}: {error}"
    twin = copy.deepcopy(case.before).eval()
    for trial, found in zip(case.inputs, outputs, strict=True):
        expected = _run(twin, trial)
        if _shapes(expected) != _shapes(found):
            return f"inputs {trial.shapes()} give outputs {_shapes(found)}; expected {_shapes(expected)}"
    for name, layer in after.named_modules():
        for attribute, value, expected_value in _sizes_said(layer):
            if value != expected_value:
                return f"{name}.{attribute} is {value} and its tensors say {expected_value}"
    return ""


def _sizes_said(layer: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """What a layer's attributes say of its sizes, and what its tensors do."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        shape = (layer.out_channels, layer.in_channels // layer.groups)
        if layer.transposed:
            shape = (layer.in_channels, layer.out_channels // layer.groups)
        yield "weight.shape[:2]", shape, tuple(layer.weight.shape[:2])
        for attribute in ("in_channels", "out_channels"):
            yield f"{attribute} % groups", getattr(layer, attribute) % layer.groups, 0
    elif isinstance(layer, nn.Linear):
        yield (
            "(out_features, in_features)",
            (layer.out_features, layer.in_features),
            tuple(layer.weight.shape),
        )
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(layer, name)
            if tensor is not None:
                yield "num_features", layer.num_features, len(tensor)
    elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
        yield "normalized_shape", tuple(layer.normalized_shape), tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm) and layer.affine:
        yield "num_channels", layer.num_channels, len(layer.weight)
        yield "num_channels % num_groups", layer.num_channels % layer.num_groups, 0


def _modified(case: Case) -> str:
    changed = _difference(case.before, case.after)
    if case.step.modified and not changed:
        return "the pass says that it changed something, and the graph and the state are as before"
    if changed and not case.step.modified:
        return f"the pass says that it changed nothing, and {changed}"
    return ""


def _idempotent(case: Case) -> str:
    if case.again is None:
        return ""
    changed = _difference(case.after, case.again)
    if changed:
        return f"in the second run {changed}"
    said = case.again.meta["history"][-1].modified
    return "the second run changed nothing and says that it did" if said else ""


def _preserves(case: Case) -> str:
    if not case.item.claims:
        return ""
    context = Context(inputs=case.inputs[0], seed=case.seed, verify=False)
    reference = case.item.reference(copy.deepcopy(case.before), context)
    if type(case.item).compare is not Pass.compare:  # kernels for one dtype: the pass says what agreement is
        return _compared(case, reference, context)
    bound = TOLERANCE[torch.float32 if case.item.rounding else torch.float64]
    one, two = precise(reference).eval(), precise(case.after).eval()
    for trial in case.inputs:
        wide = trial.map(lambda t: t.double() if t.is_floating_point() else t)
        gap = _gap(_run(one, wide), _run(two, wide))
        if not gap <= bound:
            return f"outputs differ by {gap:.3g} on inputs {trial.shapes()} in float64; expected at most {bound:g}"
    return ""


def _compared(case: Case, reference: TracedModule, context: Context) -> str:
    try:
        case.item.compare(copy.deepcopy(reference).eval(), copy.deepcopy(case.after).eval(), context)
    except VerificationError as error:
        return str(error)
    return ""


def _keys(case: Case) -> str:
    own = (f"{MASKS}.", f"{QUANT}.")
    before, after = (
        {key for key in module.state_dict() if not key.startswith(own)} for module in (case.model, case.after)
    )
    said = " ".join(case.step.notes)
    unreached = tuple(case.after.meta["unreached"])
    for key in before - after:
        holder = key.rpartition(".")[0]
        gone = any(key == name or key.startswith(f"{name}.") for name in unreached)
        if not gone and key not in said and not (holder and holder in said):
            return f"{key} left the state_dict, and neither the notes nor meta['unreached'] say so"
    for key in after - before:
        if key not in said:
            return f"{key} is new in the state_dict, and the notes do not say so"
    return ""


def _copies(case: Case) -> str:
    mine = {tensor.data_ptr() for tensor in [*case.after.parameters(), *case.after.buffers()] if tensor.numel()}
    for kind, twin in (
        ("deep copy", copy.deepcopy(case.after)),
        ("pickle", pickle.loads(pickle.dumps(case.after))),
    ):
        changed = _difference(case.after, twin)
        if changed:
            return f"in a {kind} {changed}"
        if twin.training != case.after.training:
            return f"a {kind} is in another mode"
        if any(tensor.data_ptr() in mine for tensor in [*twin.parameters(), *twin.buffers()] if tensor.numel()):
            return f"a {kind} shares tensors with the original"
        twin.eval()
        for trial, expected in zip(case.inputs, case.outputs, strict=True):
            if not _equal(expected, _run(twin, trial)):
                return f"a {kind} computes something else on inputs {trial.shapes()}"
    return ""


def _modes(case: Case) -> str:
    modes = {name: module.training for name, module in case.model.named_modules()}
    for name, module in case.after.named_modules():
        if name in modes and module.training != modes[name]:
            return f"{name or 'the result'} has training={module.training}; the model has training={modes[name]}"
    twin = copy.deepcopy(case.after)
    for training in (True, False):
        twin.train(training)
        stuck = [name for name, module in twin.named_modules() if module.training != training]
        if stuck:
            return f"train({training}) does not reach {stuck[0]}"
    if not _trainable(case):
        return ""
    twin.train()
    try:
        _run(twin, case.inputs[0])
    except Exception as error:  # the model itself runs in train mode
        return f"the result does not run in train mode: {type(error).__name__}: {error}"
    twin.load_state_dict(case.after.state_dict())
    twin.eval()
    if not _equal(case.outputs[0], _run(twin, case.inputs[0])):
        return "after a step in train mode, with the state loaded back, eval mode gives other outputs"
    return ""


def _trainable(case: Case) -> bool:
    """Whether the model itself runs in train mode on the inputs (BatchNorm on one value does not)."""
    try:
        _run(copy.deepcopy(case.before).train(), case.inputs[0])
    except Exception:  # whatever the user's model raises
        return False
    return True


def _trains(case: Case) -> str:
    if not case.item.trainable:
        return ""
    expected, found = _gradients(case.before, case.inputs[0]), _gradients(case.after, case.inputs[0])
    lost = [name for name in found if name in expected and expected[name] and not found[name]]
    return f"{lost[0]} gets no gradient any more" if lost else ""


def _gradients(module: TracedModule, trial: Inputs) -> dict[str, bool]:
    """For every parameter whether a finite gradient reaches it, in eval mode."""
    twin = copy.deepcopy(module).eval()
    with torch.enable_grad():
        leaves = [y for y in pytree.tree_leaves(trial.run(twin)) if isinstance(y, Tensor) and y.requires_grad]
        if leaves:
            torch.autograd.backward(torch.stack([y.double().square().mean() for y in leaves]).sum())
    return {
        name: parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for name, parameter in twin.named_parameters()
        if parameter.requires_grad
    }


#: The laws by name; each takes a :class:`Case` and returns what breaks it, or nothing.
LAWS: dict[str, Callable[[Case], str]] = {
    "untouched": _untouched,
    "verifies": _verifies,
    "modified": _modified,
    "idempotent": _idempotent,
    "preserves": _preserves,
    "keys": _keys,
    "copies": _copies,
    "modes": _modes,
    "trains": _trains,
}
