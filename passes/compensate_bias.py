"""The mean of what was masked, held by the biases of whoever read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxcompress.calibration import replica, watch
from fxcompress.channels.constants import Affine, affine_of
from fxcompress.channels.labels import Labels
from fxcompress.constant_channels import fold, live_outputs, output_dim, users
from fxcompress.context import Context
from fxcompress.errors import TrainingError
from fxcompress.layers import functional
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule
from fxcompress.pipeline import Pass
from fxcompress.processes import summed
from fxcompress.recurrent import operator_of, weight_names
from fxcompress.rewrite import rewriting
from fxcompress.task import Need, require_count


@dataclass(frozen=True)
class CompensateBias(Pass):
    """Folds the mean of what was masked into the biases of those who read it.

    A linear layer or convolution with weight W and mask M lost ``(W * (1 - M)) x`` of its output, where x is what the
    model without masks gives it. Its bias takes over the mean of that over samples and positions,
    ``b' = b + mean((W * (1 - M)) x)``: the constant that leaves the smallest mean squared error. Of masked channels
    these are the columns that read them. Where what was masked is a constant the result is exact, as long as every
    position reads it alike (not at the border of a zero-padded convolution, nor behind a transposed one with strides).
    Where there is no bias the running mean of the BatchNorm behind takes it, or a bias is added (a new ``state_dict``
    key, which the notes list).

    The masked weights that were compensated become zero, so that a second run, after more was masked, adds only what is
    new. Comes after pruners and before ``Speedup``. Recurrent layers and layers whose bias is shared are left as they
    are, and listed.

    He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168, reconstruct the
    output of the reader in this sense; only its bias changes here.

    Args:
        batches: how many of the task's batches are taken; all by default.

    Needs the task's batches.
    """

    batches: int | None = None

    idempotent: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    versioned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.batches is not None:
            require_count("batches", self.batches)

    @property
    def needs(self) -> tuple[Need, ...]:
        """Batches to measure on."""
        return ("batches",)

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Measure on the model without its masks, and fold."""
        masking = context.masking or Masking()
        if masking.dead:
            masking = complete(module, masking, context.groups(module).channels)
        losses = _losses(module, masking, context)
        if not losses:
            return module
        self._measure(module, losses, context)
        told = []
        with rewriting(module, self.name) as rewriter:
            for calls in _by_bias(losses):
                amounts = torch.stack([call.total for call in calls]).sum(0) / sum(call.positions for call in calls)
                told.append(fold(rewriter, calls[0].reader, amounts * calls[0].live, calls[0].dims))
            for name in dict.fromkeys(loss.reader.weight for loss in losses):
                weight = module.get_parameter(name).detach()
                gone = [loss.removed != 0 for loss in losses if loss.reader.weight == name]
                rewriter.set_tensor(name, weight.masked_fill(torch.stack(gone).any(0), 0))
        context.notes.append(f"the mean of what is masked was folded into {', '.join(told)}")
        return module

    def _measure(self, module: TracedModule, losses: Sequence[_Loss], context: Context) -> None:
        task = context.required_task(self.needs, self.name)
        with replica(module, task, self.name) as trial:
            watch(trial, inputs={loss.reader.node.name: partial(loss.see, trial) for loss in losses})
            for batch in task.read(self.batches):
                task.feed(trial, batch)
            device = next((p.device for p in trial.parameters()), torch.device("cpu"))
            for loss in losses:
                loss.share(self.name, device)


class _Loss:
    """What one call of an affine map lost.

    Attributes:
        reader: the map.
        removed: its masked weights, in the weight's shape; zero where it has some, or nobody reads the output.
        live: float64, 1 for each output that is live, 0 for the others.
        dims: number of dimensions of its output.
        total: what was lost of each output, summed over positions: float64.
        positions: how many there were.
    """

    def __init__(self, reader: Affine, removed: Tensor, live: Tensor, dim: int) -> None:
        self.reader, self.removed, self.live, self.dim = reader, removed, live, dim
        self.dims = 0
        self.total = torch.zeros(len(live), dtype=torch.float64)
        self.positions = 0

    def see(self, trial: TracedModule, x: Tensor) -> None:
        """Add what a batch would have given; the map is linear, so that the mean over samples can go through it."""
        self.dims, linear = x.dim(), self.dim == -1
        samples = x.flatten(0, -2) if linear else x if x.dim() == self.removed.dim() else x.unsqueeze(0)
        made = self._apply(trial, samples.mean(0, keepdim=True), self.removed.to(x.device, x.dtype))
        lost = made.movedim(self.dim, 0).flatten(1).double()
        self.total += lost.sum(1).cpu() * len(samples)
        self.positions += lost.shape[1] * len(samples)

    def _apply(self, trial: TracedModule, x: Tensor, weight: Tensor) -> Tensor:
        node = self.reader.node
        if node.op == "call_module":
            call = functional(trial.get_submodule(str(node.target)), x, weight, None)
            assert call is not None
            function, args, kwargs = call
        else:
            assert callable(node.target)
            function, args, kwargs = (
                node.target,
                (x, weight, None, *node.args[3:]),
                {name: value for name, value in node.kwargs.items() if name not in ("input", "weight", "bias")},
            )
        made: Tensor = function(*args, **kwargs)
        return made

    def share(self, author: str, device: torch.device) -> None:
        """Add up what several processes saw."""
        told = torch.cat([self.total, torch.tensor([self.positions], dtype=torch.float64)])
        told = summed(told.to(device)).cpu()
        self.total, self.positions = told[:-1], int(told[-1])
        if not bool(torch.isfinite(self.total).all()):
            where = self.reader.layer or self.reader.node.name
            raise TrainingError(
                f"what enters {where} holds NaN or infinite values in the batches of {author}; expected finite ones. "
                "Look at the task's batches, or at the weights."
            )


def _losses(module: TracedModule, masking: Masking, context: Context) -> list[_Loss]:
    """The calls of affine maps that lost something, whose bias can take it; notes those whose bias cannot."""
    names = _first_names(module)
    losses, alone = [], []
    for node in module.graph.nodes:
        reader = affine_of(module, node)
        if reader is None:
            alone += [node] if _reads_masked(module, node, masking, names) else []
            continue
        mask = masking.elements.get(names[reader.weight])
        removed = None if mask is None else _removed(module, reader, mask, masking, context)
        if removed is None or not bool(removed[0].any()):
            continue
        if _computed(node) or (reader.bias and users(module, reader.bias) != {reader.layer or node}):
            alone.append(node)
        else:
            losses.append(_Loss(reader, *removed, output_dim(module, reader)))
    if alone:
        told = ", ".join(str(node.target) if node.op == "call_module" else node.name for node in alone)
        context.notes.append(f"no bias of its own takes the mean of what is masked in {told}")
    return losses


def _removed(
    module: TracedModule, reader: Affine, mask: Tensor, masking: Masking, context: Context
) -> tuple[Tensor, Tensor]:
    """The masked weights of an affine map that live outputs lost, and which outputs live (1 or 0)."""
    weight = module.get_parameter(reader.weight).detach()
    live = torch.ones(_outputs(module, reader), dtype=torch.bool)
    if masking.dead:
        groups = context.groups(module)
        labels = groups.channels.facts.values[reader.node.name]
        assert isinstance(labels, Labels)
        live = live_outputs(labels, masking.live(groups.channels), output_dim(module, reader))
    kept = _along_outputs(live.to(weight.device), weight, module, reader)
    return weight * ~mask * kept, live.double()


def _reads_masked(module: TracedModule, node: fx.Node, masking: Masking, names: Mapping[str, str]) -> bool:
    """Whether a recurrent layer, or a product with a parameter and no bias, has masked columns."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        weights = [f"{node.target}.{name}" for name in weight_names(layer)] if operator_of(layer) else []
    elif node.op == "call_function":
        weights = [str(s.target) for s in node.all_input_nodes[1:] if s.op == "get_attr" and str(s.target) in names]
        weights = [name for name in weights if module.get_parameter(name).dim() > 1]
    else:
        weights = []
    masks = [masking.elements[names[name]] for name in weights if names[name] in masking.elements]
    return any(
        bool((~mask).flatten(1).all(1).sum() < (~mask).flatten(1).any(1).sum()) for mask in masks if mask.dim() > 1
    )


def _first_names(module: nn.Module) -> dict[str, str]:
    """Every name of every parameter to the first name of the same tensor."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _computed(node: fx.Node) -> bool:
    """Whether a call's options are computed, by the graph."""
    given: list[Any] = [*node.args[3:], *(v for k, v in node.kwargs.items() if k not in ("input", "weight", "bias"))]
    found: list[fx.Node] = []
    fx.map_arg(given, found.append)
    return bool(found)


def _outputs(module: TracedModule, reader: Affine) -> int:
    """How many outputs an affine map has."""
    weight = module.get_parameter(reader.weight)
    layer = module.get_submodule(reader.layer) if reader.layer else None
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return layer.out_channels
    return len(module.get_parameter(reader.bias)) if reader.bias else len(weight)


def _along_outputs(live: Tensor, weight: Tensor, module: TracedModule, reader: Affine) -> Tensor:
    """Flags of outputs, to be multiplied with the weight."""
    transposed = "transpose" in getattr(reader.node.target, "__name__", "")
    layer = module.get_submodule(reader.layer) if reader.layer else None
    rest = [1] * (weight.dim() - 2)
    if not transposed and not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return live.reshape(-1, 1, *rest)
    groups = len(live) // weight.shape[1]  # the weight is (inputs, outputs / groups, ...)
    return live.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1).reshape(len(weight), -1, *rest)


def _by_bias(losses: Sequence[_Loss]) -> Iterator[list[_Loss]]:
    """The calls whose lost means one bias takes."""
    found: dict[str, list[_Loss]] = {}
    for loss in losses:
        found.setdefault(loss.reader.bias or loss.reader.weight, []).append(loss)
    yield from found.values()
