"""Knowledge distillation: a student is trained towards what its teacher says, besides what the task asks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.context import signature
from fxcompress.errors import InputError
from fxcompress.module import TracedModule, copied, copy_graph, modules_of, submodule
from fxcompress.nodes import apply_mask, restore_live
from fxcompress.processes import unwrapped
from fxcompress.select import Selection, Selectors
from fxcompress.task import Need, Task

if TYPE_CHECKING:
    from fxcompress.training import Epoch, Training


def class_scores(output: Any) -> Tensor:
    """What a model says of the classes: its output if that is a tensor, else the part of it called ``logits``.

    Raises:
        InputError: there is no such part.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise InputError(
            f"the model returns a {type(output).__name__}; expected a tensor, or something with a tensor `logits`. Say "
            "where it is: Distill(task, logits=lambda output: output[0])."
        )
    return found


@dataclass(frozen=True, init=False)
class Distill(Task):
    """A task whose loss also asks that the model agree with a teacher (Hinton et al. 2015, arXiv 1503.02531).

    With student logits z and teacher logits v over the classes in their last dimension, temperature T, weight w::

        (1 - w) * task.loss + w * T^2 * KL(softmax(v / T) || softmax(z / T)) + layer_weight * sum over layers of MSE

    KL is the mean over all positions before the last dimension; MSE the mean over a layer's output (Romero et al. 2015,
    arXiv 1412.6550, equation 3, without a regressor). The student is run once, by the task's loss; the teacher on the
    same arguments, in eval mode and without gradients, where the student is. It is a copy: yours stays as it is.

    Args:
        task: what the model is for. Without a loss (``weight`` must be 1 then) its batches are the model's inputs.
        teacher: by default the model that ``compress`` was given, which must be one that no pass has changed.
        layers: whose outputs are compared: name patterns, types or predicates as everywhere; of plain layers that both
            have under the same name. A masked layer gives as wide an output as a dense one, zeros where it is masked.
            A removed one does not, and is refused: distill before ``Speedup``, or through logits alone.
        temperature: T, above 0.
        weight: w, in [0, 1].
        layer_weight: of the layers' errors, at least 0.
        logits: a function from a model's output to its logits (..., classes).

    Raises:
        InputError: an option out of its range; when it is trained: there is no teacher, or the outputs differ in shape.
    """

    task: Task
    teacher: nn.Module | None
    layers: Selectors
    temperature: float
    weight: float
    layer_weight: float
    logits: Callable[[Any], Tensor]

    def __init__(
        self,
        task: Task,
        teacher: nn.Module | None = None,
        *,
        layers: Selectors = (),
        temperature: float = 4.0,
        weight: float = 0.5,
        layer_weight: float = 1.0,
        logits: Callable[[Any], Tensor] = class_scores,
    ) -> None:
        if not isinstance(task, Task):
            raise InputError(f"task is a {type(task).__name__}; expected a fxcompress.Task.")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise InputError(f"teacher is a {type(teacher).__name__}; expected a torch.nn.Module or None.")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature!r}; expected a number above 0.")
        if not 0 <= weight <= 1:
            raise InputError(f"weight is {weight!r}; expected the teacher's share of the loss, in [0, 1].")
        if not layer_weight >= 0:
            raise InputError(f"layer_weight is {layer_weight!r}; expected a number of at least 0.")
        if task.loss is None and weight != 1:
            raise InputError(f"the task has no loss and weight is {weight!r}; give it a loss, or let weight be 1.")
        if layers != ():
            Selection(include=layers)
        for name in (item.name for item in fields(Task)):
            object.__setattr__(self, name, getattr(task, name))
        mine: dict[str, Any] = {
            "task": task, "teacher": teacher, "layers": layers, "temperature": temperature, "weight": weight,
            "layer_weight": layer_weight, "logits": logits,
        }  # fmt: skip
        for name, value in mine.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "loss", _Objective(**mine))

    def begun_with(self, dense: nn.Module) -> Distill:
        """With the run's dense model as teacher, unless there is one.

        Raises:
            InputError: passes have changed that model already.
        """
        if self.teacher is not None:
            return self._with(self.task.begun_with(dense), self.teacher)
        changed = [step.name for step in getattr(dense, "meta", {}).get("history", ()) if step.modified]
        if changed:
            raise InputError(
                f"the model that compress was given has been through {', '.join(changed)}; expected the dense one, for "
                "a teacher. Give the dense model: Distill(task, teacher=dense)."
            )
        return self._with(self.task.begun_with(dense), dense)

    def _with(self, task: Task, teacher: nn.Module | None) -> Distill:
        return Distill(
            task, teacher, layers=self.layers, temperature=self.temperature, weight=self.weight,
            layer_weight=self.layer_weight, logits=self.logits,
        )  # fmt: skip

    def without_patience(self) -> Distill:
        """The same, all epochs of which run."""
        return self._with(self.task.without_patience(), self.teacher)

    def with_loss(self, loss: Callable[[nn.Module, Any], Tensor]) -> Task:
        """What trains as the task within does, on another loss."""
        return self.task.with_loss(loss)

    def lacking(self, needs: Iterable[Need]) -> list[Need]:
        """What of ``needs`` the task within was not given; there is a loss in any case."""
        return [need for need in self.task.lacking(needs) if need != "loss"]

    def steps(self, model: nn.Module, epochs: int) -> int:
        """As many as the task within."""
        return self.task.steps(model, epochs)

    def train(self, model: nn.Module, training: Training) -> tuple[Epoch, ...]:
        """Train as the task within does, whichever library that uses."""
        assert self.loss is not None
        return self.task.with_loss(self.loss).train(model, training)


@dataclass(frozen=True, kw_only=True)
class _Objective:
    """The loss of :class:`Distill`, and the copy of the teacher that it runs."""

    task: Task
    teacher: nn.Module | None
    layers: Selectors
    temperature: float
    weight: float
    layer_weight: float
    logits: Callable[[Any], Tensor]
    copies: list[nn.Module] = field(default_factory=list)
    taps: WeakKeyDictionary[nn.Module, _Tapped] = field(default_factory=WeakKeyDictionary)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        student = unwrapped(model)
        teacher = self._copy(next((p.device for p in student.parameters()), torch.device("cpu")))
        names = self._names(student, teacher)
        said = _Said([], [])
        with ExitStack() as stack:
            taught = stack.enter_context(self._outputs(teacher, names))
            learnt = stack.enter_context(self._outputs(student, names))
            ask = model.register_forward_pre_hook(partial(said.ask, teacher), with_kwargs=True)
            stack.callback(ask.remove)
            stack.callback(model.register_forward_hook(said.listen).remove)
            loss = None if self.task.loss is None else self.task.loss(model, batch)
            if loss is None:
                self.task.feed(model, batch)
        if not said.student:
            raise InputError(
                "loss(model, batch) did not call the model that it was given; there is nothing to distill."
            )
        pairs = zip(said.student, said.teacher, strict=True)
        divergence = torch.stack([self._divergence(*map(self.logits, pair)) for pair in pairs]).mean()
        total = self.weight * divergence if loss is None else (1 - self.weight) * loss + self.weight * divergence
        errors = [_error(name, learnt[name], taught[name]) for name in names]
        return total + self.layer_weight * torch.stack(errors).sum() if errors else total

    def _copy(self, device: torch.device) -> nn.Module:
        if not self.copies:
            if self.teacher is None:
                raise InputError("there is no teacher; call compress(..., task=Distill(task)), or give teacher=.")
            self.copies.append(copied(self.teacher).eval().requires_grad_(False))
        return self.copies[0].to(device)

    def _names(self, student: nn.Module, teacher: nn.Module) -> list[str]:
        """The chosen layers, which both have, in the student's order."""
        if self.layers == ():
            return []
        ours, theirs = _layers(student), _layers(teacher)
        chosen = Selection(include=self.layers).chosen(ours)
        lost = [name for name in ours if name in chosen and name not in theirs]
        if lost:
            raise InputError(f"the teacher has no layer {', '.join(lost)}; expected the student's names in layers=.")
        return [name for name in ours if name in chosen]

    def _outputs(self, model: nn.Module, names: Sequence[str]) -> AbstractContextManager[dict[str, list[Any]]]:
        """What these layers give meanwhile, call by call."""
        if not names or not isinstance(model, TracedModule):
            return _hooked(model, names)
        now = signature(model.graph)
        tapped = self.taps.get(model)
        if tapped is None or tapped.signature != now:
            tapped = self.taps[model] = _Tapped.of(model, names, now)
        return tapped.outputs(model)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise InputError(
                f"the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; expected one "
                "shape. Choose the part that they share with logits=."
            )
        ours, theirs = (F.log_softmax(_wide(each) / self.temperature, dim=-1) for each in (student, teacher))
        per_position = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        return self.temperature**2 * per_position.mean()


@dataclass(frozen=True)
class _Said:
    """What two models returned for the same arguments, call by call."""

    student: list[Any]
    teacher: list[Any]

    def ask(self, teacher: nn.Module, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the student runs, which may write into its arguments, the teacher does."""
        with torch.no_grad():
            self.teacher.append(teacher(*args, **kwargs))

    def listen(self, model: nn.Module, args: Any, output: Any) -> None:
        """The student has run."""
        self.student.append(output)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs can be had: of a traced model those that are nodes, in the order of the graph."""
    if not isinstance(model, TracedModule):
        return modules_of(model)
    names = dict.fromkeys(name for node in model.graph.nodes if (name := _layer_of(node)) is not None)
    return {name: submodule(model, name) for name in names}


def _layer_of(node: fx.Node) -> str | None:
    """The layer that a node is, opened or not."""
    opened: str | None = node.meta.get("layer")
    return str(node.target) if node.op == "call_module" else opened


@contextmanager
def _hooked(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """What these modules return meanwhile, call by call; later writes in place do not show."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in names:
            stack.callback(submodule(model, name).register_forward_hook(partial(_record, found[name])).remove)
        yield found


def _record(found: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    found.append(_snapshot(output))


def _snapshot(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class _Tapped:
    """A traced module's forward that also tells what its layers gave.

    Masking opens layers into functional calls, which no hook on a module sees.

    Attributes:
        signature: of the graph that it was made from.
        forward: a function of the module and its arguments: the output, and the values.
        names: for each value its layer.
    """

    signature: list[Any]
    forward: Callable[..., tuple[Any, tuple[Any, ...]]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, module: TracedModule, names: Sequence[str], signed: list[Any]) -> _Tapped:
        """Copy the graph and add the values of these layers to what it returns."""
        graph = copy_graph(module.graph)
        taps: list[tuple[str, fx.Node]] = []
        for node in list(graph.nodes):
            name = _layer_of(node)
            if name in names:
                last = _unmasked(node)
                with graph.inserting_after(last):
                    taps.append((str(name), graph.call_function(_snapshot, (last,))))
        output = graph.output_node()
        output.args = ((output.args[0], tuple(node for _, node in taps)),)
        twin = copy.copy(module)
        twin.graph = graph
        twin.recompile()
        twin.ready()
        return cls(signed, type(twin).forward, tuple(name for name, _ in taps))

    @contextmanager
    def outputs(self, module: TracedModule) -> Iterator[dict[str, list[Any]]]:
        """The values of every run of the module meanwhile, by layer."""
        found: dict[str, list[Any]] = {name: [] for name in self.names}
        wrapped = module.__dict__.get("forward")
        module.__dict__["forward"] = partial(self._run, module, found)
        try:
            yield found
        finally:
            del module.__dict__["forward"]
            if wrapped is not None:  # by a trainer
                module.__dict__["forward"] = wrapped

    def _run(self, module: TracedModule, found: dict[str, list[Any]], *args: Any, **kwargs: Any) -> Any:
        output, values = self.forward(module, *args, **kwargs)
        for name, value in zip(self.names, values, strict=True):
            found[name].append(value)
        return output


def _unmasked(node: fx.Node) -> fx.Node:
    """The value behind the nodes by which masking makes it a dense one with zeros."""
    while True:
        following = [
            user
            for user in node.users
            if user.target in (apply_mask, restore_live) and "mask" in user.meta and user.args[0] is node
        ]
        if len(following) != 1:
            return node
        node = following[0]


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, whatever precision the models ran in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _error(name: str, student: list[Any], teacher: list[Any]) -> Tensor:
    """Mean squared error of a layer's outputs, over its calls."""
    if len(student) != len(teacher):
        raise InputError(f"{name} runs {len(student)} times in the student and {len(teacher)} times in the teacher.")
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            raise InputError(f"{name} gives a {type(ours).__name__}; expected layers in layers= that give one tensor.")
        if ours.shape != theirs.shape:
            raise InputError(
                f"{name} gives {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher; expected "
                "one shape. Distill the masked model, before Speedup narrows it, or leave the layer out of layers=."
            )
        errors.append(F.mse_loss(_wide(ours), _wide(theirs)))
    return torch.stack(errors).mean()
