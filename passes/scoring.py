"""What a channel criterion sees of a layer, and scores of weights, activations and gradients by one mechanism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.calibration import replica, watch
from fxcompress.channels.activations import Activations, Place
from fxcompress.channels.groups import ChannelGroups, Slices
from fxcompress.channels.labels import FloatArray, IntArray
from fxcompress.context import Context
from fxcompress.errors import InputError, PassError, TrainingError
from fxcompress.masking import Masking
from fxcompress.module import TracedModule, owner
from fxcompress.processes import averaged, in_step, summed
from fxcompress.task import Need, Task

#: What a criterion looks at besides weights.
Reads = Literal["weight", "activation", "gradient"]
#: What it needs of a task for that.
NEEDS: dict[Reads, tuple[Need, ...]] = {"weight": (), "activation": ("batches",), "gradient": ("batches", "loss")}


@dataclass(frozen=True)
class Layer:
    """What a criterion sees of a layer that produces channels.

    Attributes:
        name: dotted name of the module that holds the weight.
        module: that module.
        weight: its producing slices, shape (channels, ...): dimension 0 is the channel, whatever the layer's own
            layout; masked elements are zero. Of a recurrent layer they are the rows of ``weight_ih`` and then those
            of ``weight_hh``, one for each gate of a hidden unit, whose scores are combined as coupled layers' are.
    """

    name: str
    module: nn.Module
    weight: Tensor
    _seen: dict[Reads, Tensor] = field(default_factory=dict)

    @property
    def activation(self) -> Tensor:
        """What the channels hold in one batch: (channels, positions), a position for each sample and place in space.

        It is the layer's own activation: behind its BatchNorm, its dropout and its activation function; where it has
        none, its output.
        """
        return self._measured("activation")

    @property
    def gradient(self) -> Tensor:
        """The gradient of the task's loss in one batch with respect to :attr:`weight`, in its shape."""
        return self._measured("gradient")

    def _measured(self, what: Reads) -> Tensor:
        if what not in self._seen:
            raise PassError(f'layer.{what} was not measured. Write reads = "{what}" in the criterion\'s class.')
        return self._seen[what]


@dataclass(frozen=True)
class Criterion:
    """How slices are scored.

    Attributes:
        name: the pass, for messages.
        score: ``Layer -> (channels,)``.
        reads: what it looks at. Of activations and gradients it is asked once for each batch; scores are averaged,
            those of an activation in proportion to its positions.
        batches: how many of the task's batches are taken, all if None.
    """

    name: str
    score: Callable[[Layer], Tensor]
    reads: Reads
    batches: int | None

    def scores(
        self,
        slices: Sequence[Slices],
        module: TracedModule,
        masking: Masking,
        groups: ChannelGroups,
        context: Context,
    ) -> list[FloatArray]:
        """For every slice the scores of its rows."""
        layers = [_layer(item, module, masking) for item in slices]
        if self.reads == "weight":
            with torch.no_grad():
                return [self._ask(layer).numpy() for layer in layers]
        task = context.required_task(NEEDS[self.reads], self.name)
        tally = _Tally(self, layers)
        if not slices:
            return []
        places: list[list[Place]] = []
        if self.reads == "activation":
            assert context.inputs is not None
            activations = Activations(module, groups, context.inputs)
            places = [activations.of(item) for item in slices]
            _check_seen(self.name, slices, places)
        with replica(module, task, self.name, masking, groups) as trial:
            if self.reads == "activation":
                self._run_activations(trial, task, places, tally)
            else:
                self._run_gradients(trial, task, slices, tally)
        return tally.means()

    def _ask(self, layer: Layer) -> Tensor:
        """The scores of one layer: float64 on the CPU."""
        score = self.score(layer)
        count = len(layer.weight)
        if not isinstance(score, Tensor) or score.shape != (count,):
            found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise PassError(f"{self.name}.score({layer.name}) gave {found}; expected shape ({count},).")
        values = score.detach().double().cpu()
        if bool(values.isnan().any()):
            raise PassError(f"{self.name}.score({layer.name}) gave NaN; expected finite scores.")
        return values

    def _run_activations(
        self, trial: TracedModule, task: Task, places: Sequence[Sequence[Place]], tally: _Tally
    ) -> None:
        seen: dict[str, list[tuple[int, Place]]] = {}
        for number, found in enumerate(places):
            for place in found:
                seen.setdefault(place.node, []).append((number, place))
        watch(trial, {node: partial(tally.see, readers) for node, readers in seen.items()})
        for batch in task.read(self.batches):
            tally.batch += 1
            task.feed(trial, batch)
        tally.share(next((p.device for p in trial.parameters()), torch.device("cpu")))

    def _run_gradients(self, trial: TracedModule, task: Task, slices: Sequence[Slices], tally: _Tally) -> None:
        trial.requires_grad_(False)
        names = list(dict.fromkeys(item.parameter for item in slices))
        wanted = [trial.get_parameter(name).requires_grad_(True) for name in names]
        recurrent = any(isinstance(layer, nn.RNNBase) for layer in trial.modules())
        for batch in in_step(task.read(self.batches), self.name, wanted[0].device):
            tally.batch += 1
            # cuDNN's recurrent kernels have no backward in eval mode
            with (
                torch.enable_grad(),
                torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent),
            ):
                loss = task.objective(trial, batch)
                if not bool(torch.isfinite(loss)):
                    raise TrainingError(
                        f"the loss is {float(loss.detach())} at batch {tally.batch} of {self.name}; expected a finite "
                        "one. Look at that batch, or at the weights."
                    )
                if not loss.requires_grad:
                    raise InputError(
                        f"loss(model, batch) has no gradient, which {self.name} needs; expected one computed from the "
                        "model's outputs without torch.no_grad() or .detach()."
                    )
                found = torch.autograd.grad(loss, wanted, allow_unused=True)
            gradients = {
                name: averaged(torch.zeros_like(parameter) if gradient is None else gradient)
                for name, parameter, gradient in zip(names, wanted, found, strict=True)
            }
            for number, item in enumerate(slices):
                tally.add(number, "gradient", _lines(item, gradients[item.parameter].detach()), 1, slice(None))


class _Tally:
    """Scores added up over batches."""

    def __init__(self, criterion: Criterion, layers: Sequence[Layer]) -> None:
        self.criterion, self.layers = criterion, layers
        self.totals = [torch.zeros(len(layer.weight), dtype=torch.float64) for layer in layers]
        self.weights = [torch.zeros_like(total) for total in self.totals]
        self.batch = 0

    def see(self, readers: Sequence[tuple[int, Place]], value: Any) -> None:
        """Score an activation at once: it need not be kept."""
        with torch.no_grad():
            for number, place in readers:
                seen = place.read(value)
                self.add(number, "activation", seen, seen.shape[1], place.rows)

    def add(self, number: int, what: Reads, seen: Tensor, weight: int, rows: IntArray | slice) -> None:
        """Score (some rows of) a layer by what was seen of it, with a weight."""
        layer = self.layers[number]
        if not bool(torch.isfinite(seen).all()):
            raise TrainingError(
                f"the {what} of {layer.name} holds NaN or infinite values at batch {self.batch} of "
                f"{self.criterion.name}; expected finite ones. Look at that batch, or at the weights."
            )
        seen = seen.to(layer.weight.device)
        chosen = layer.weight if len(seen) == len(layer.weight) else layer.weight[rows]
        part = Layer(layer.name, layer.module, chosen, {what: seen})
        self.totals[number][rows] += weight * self.criterion._ask(part)
        self.weights[number][rows] += weight

    def share(self, device: torch.device) -> None:
        """Add up what several processes saw, each of its own part of every batch."""
        told = summed(torch.cat([*self.totals, *self.weights]).to(device)).cpu()
        sizes = [len(total) for total in self.totals]
        parts = told.split([*sizes, *sizes])
        self.totals, self.weights = list(parts[: len(sizes)]), list(parts[len(sizes) :])

    def means(self) -> list[FloatArray]:
        """The mean score of every row."""
        return [(total / weight).numpy() for total, weight in zip(self.totals, self.weights, strict=True)]


def _check_seen(name: str, slices: Sequence[Slices], places: Sequence[Sequence[Place]]) -> None:
    for item, found in zip(slices, places, strict=True):
        if len({row for place in found for row in place.rows.tolist()}) < len(item.rows):
            raise PassError(
                f"the activation of {item.layer} shows in no value of the graph, which {name} ranks its channels by. "
                f"Leave it out (exclude={item.layer!r}), or rank by weights."
            )


def elements(item: Slices, module: TracedModule) -> int:
    """How many weights produce one channel."""
    return item.lines(module.get_parameter(item.parameter))[0].numel()


def _lines(item: Slices, tensor: Tensor) -> Tensor:
    """The rows of a weight (or of its gradient), dimension 0 first."""
    lines = item.lines(tensor)
    if len(item.rows) == len(lines) and not (item.rows[:-1] > item.rows[1:]).any():
        return lines
    return lines.index_select(0, torch.from_numpy(item.rows).to(tensor.device))


def _layer(item: Slices, module: TracedModule, masking: Masking) -> Layer:
    layer, name = owner(module, item.parameter)
    parameter = layer._parameters[name]
    assert parameter is not None
    weight, mask = parameter.detach(), masking.elements.get(item.parameter)
    return Layer(item.layer, layer, _lines(item, weight if mask is None else weight * mask))


def normalised(scores: FloatArray, by: Literal["none", "size", "layer"], size: int) -> FloatArray:
    """Scores of layers of different size, made comparable.

    Args:
        scores: of a layer's channels.
        by: ``"size"`` divides by ``size``, ``"layer"`` by the mean magnitude of the layer's scores.
        size: how many weights produce one channel.
    """
    if by == "size":
        return scores / size
    if by == "layer":
        return scores / max(float(np.abs(scores).mean()), 1e-30)
    return scores
