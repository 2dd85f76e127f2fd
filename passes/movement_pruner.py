"""Movement pruning: what training moves towards zero goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.row_sets import RowSet
from fxcompress.checkpoint import Kept
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.layers import opens
from fxcompress.masking import Masking, complete
from fxcompress.module import MASKS, TracedModule, submodule
from fxcompress.nodes import apply_mask, learned_mask
from fxcompress.passes.agp_pruner import cubic
from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.inner_pruner import TRAINING, with_sparsity
from fxcompress.passes.level_pruner import LevelPruner
from fxcompress.passes.scoring import Layer
from fxcompress.pipeline import Pass
from fxcompress.rewrite import Rewriter, rewriting
from fxcompress.select import Selectors
from fxcompress.task import Need, require_count

#: Where the scores are while they are learned.
SCORES = "_scores"


@dataclass(frozen=True)
class MovementPruner(Pass):
    """Learns a score for every weight while it trains, and masks those that score lowest.

    Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683, section 4. The forward
    uses W' = W * M, M the weights with the highest scores S; the gradient goes straight through M to the scores,
    dL/dS = dL/dW' * W, so that a score is the larger the further its weight moved away from zero. M is renewed after
    every step of the optimizer, for a sparsity of s * (1 - (1 - t)^3), where t runs from 0 to 1 between warm-up and
    cool-down; what is masked meanwhile may come back. Scores start at 0 and are parameters like all others to the
    optimizer; afterwards they are gone.

    With ``"channel"`` a channel has one score for each layer that produces it (block movement pruning: Lagunas et al.
    2021, arXiv 2109.04838), added up over coupled layers; its weights are masked where they produce it and where they
    read it. Statistics over channels (LayerNorm) count it as zero while scores are learned, and leave it out after.

    Args:
        sparsity: fraction to mask, in [0, 1), or a mapping of name pattern to fraction.
        include: layers, as for every pruner.
        exclude: layers to leave alone.
        scope: ``"layer"`` or ``"global"``.
        granularity: ``"element"``, or that of a channel pruner: ``"channel"``, ``"head_dim"``, ``"head"``.
        warmup: fraction of all steps before anything is masked.
        cooldown: fraction of all steps, the last ones, at the final sparsity.
        epochs: how long the training is; the task's by default. The task's ``patience`` does not end it.

    Needs the task's batches, loss and optimizer. What was masked before stays masked.
    """

    sparsity: float | Mapping[str, float]
    include: Selectors | None = None
    exclude: Selectors | None = None
    scope: Literal["layer", "global"] = "layer"
    granularity: Literal["element", "channel", "head_dim", "head"] = "element"
    warmup: float = 0.1
    cooldown: float = 0.2
    epochs: int | None = None

    lifts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise InputError(f"{name} is {value!r}; expected a fraction of all steps, in [0, 1).")
        if self.warmup + self.cooldown >= 1:
            raise InputError(
                f"warmup and cooldown are {self.warmup} and {self.cooldown}; expected a sum below 1, so that steps are "
                "left in which the sparsity grows."
            )
        if self.epochs is not None:
            require_count("epochs", self.epochs)
        self.chooser  # noqa: B018 - raises where an option is wrong

    @property
    def chooser(self) -> LevelPruner | _ScoredChannels:
        """What chooses by the scores."""
        if self.granularity == "element":
            return LevelPruner(self.sparsity, self.include, self.exclude, self.scope)
        return _ScoredChannels(
            self.sparsity, self.include, self.exclude, scope=self.scope, granularity=self.granularity
        )

    @property
    def needs(self) -> tuple[Need, ...]:
        """What training needs."""
        return TRAINING

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]  # element by element it looks at weights alone
        """Whether channels are looked at."""
        return self.chooser.needs_inputs

    def sparsity_at(self, step: int, steps: int, final: float) -> float:
        """The sparsity after ``step`` of ``steps`` steps."""
        ramp = steps * (1 - self.warmup - self.cooldown)
        return final * (1 - cubic(min(max((step - steps * self.warmup) / ramp, 0.0), 1.0)))

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Learn scores, then mask."""
        task = context.required_task(self.needs, self.name)
        epochs = task.epochs if self.epochs is None else self.epochs
        start = Kept(masking=context.masking)
        release = context.keep(start)
        steps = context.step(module, partial(self._begin, module, context, partial(task.steps, module, epochs)))
        before: Masking = start["masking"] or Masking()
        learned = self._learned(module, context, before)
        context.task = task.without_patience()  # the best epoch would be the one with the least masked
        try:
            with context.laid(module, self.name):
                _attach(module, self.name)
                renew = partial(self._renew, module, learned, steps)
                context.train(module, epochs=epochs, after_step=renew, title=self.name)
        finally:
            context.task = task
        context.masking = before
        learned.finish(module)
        module._modules.pop(SCORES, None)
        release()
        return module

    def _begin(self, module: TracedModule, context: Context, steps: Callable[[], int]) -> int:
        """Put scores of zero and masks without holes in place; returns the number of steps to come."""
        masking = context.masking or Masking()
        learned = self._learned(module, context, masking)
        rewriter, parameters = Rewriter(module, self.name), dict(module.named_parameters())
        for name, shape in learned.scored.items():
            rewriter.add_parameter(f"{SCORES}.{name}", parameters[name].new_zeros(shape))
        whole = {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in learned.masked}
        context.masking = masking.joined(whole)
        return steps()

    def _learned(self, module: TracedModule, context: Context, before: Masking) -> _Elements | _Channels:
        chooser = self.chooser
        if isinstance(chooser, LevelPruner):
            return _Elements(chooser, module, context, before)
        return _Channels(chooser, module, context, before)

    def _renew(self, module: TracedModule, learned: _Elements | _Channels, steps: int, step: int) -> None:
        """Masks for the sparsity after a step."""
        for name, mask in learned.masks(module, partial(self.sparsity_at, step, steps)).items():
            module.get_buffer(f"{MASKS}.{name}").copy_(mask)


class _Elements:
    """Every weight has a score.

    Attributes:
        scored: the shapes of scores, by the name of the weight.
        masked: names of the parameters that get masks.
    """

    def __init__(self, chooser: LevelPruner, module: TracedModule, context: Context, before: Masking) -> None:
        self.chooser, self.context = chooser, context
        self.before = complete(module, before, context.groups(module).channels) if before.dead else before
        weights, self.layers = chooser.weights(module)
        self.scored = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.masked = list(weights)

    def masks(self, module: TracedModule, change: Callable[[float], float]) -> dict[str, Tensor]:
        """The masks that follow from the scores, for other sparsities."""
        chooser = with_sparsity(self.chooser, change)
        assert isinstance(chooser, LevelPruner)
        scores = {name: module.get_parameter(f"{SCORES}.{name}").detach() for name in self.scored}
        return chooser.select(scores, self.layers, self.before)

    def finish(self, module: TracedModule) -> None:
        """Mask for good."""
        masks = self.masks(module, float)
        self.context.masking = self.before.joined({name: mask for name, mask in masks.items() if not bool(mask.all())})


class _Channels:
    """Every channel has a score in each weight that produces it; attributes as those of :class:`_Elements`."""

    def __init__(self, chooser: _ScoredChannels, module: TracedModule, context: Context, before: Masking) -> None:
        self.chooser, self.context = chooser, context
        self.groups = context.groups(module)
        self.before = complete(module, before, self.groups.channels)
        self.live = self.before.live(self.groups.channels)
        said = len(context.notes)
        self.chosen = chooser._choose(self.groups, module, context)
        del context.notes[said:]  # they are said once more in the end
        parameters = dict(module.named_parameters())
        self.scored: dict[str, tuple[int, ...]] = {}
        for part in (part for item, _ in self.chosen for part in item.slices):
            name = part.parameter.removeprefix(f"{SCORES}.")
            shape, known = parameters[name].shape, self.scored.get(name, (1,) * parameters[name].dim())
            own = (part.dim,) if part.groups == 1 else (0, part.dim)  # a grouped transposed one numbers outputs by both
            self.scored[name] = tuple(shape[dim] if dim in own else size for dim, size in enumerate(known))
        names = {name: None for item, _ in self.chosen for name, _ in item.members if name in parameters}
        self.masked = [name for name in names if _opens(module, name)]

    def masks(self, module: TracedModule, change: Callable[[float], float]) -> dict[str, Tensor]:
        """The masks that follow from the scores, for other sparsities."""
        channels = self.groups.channels
        chosen = [(item, change(sparsity)) for item, sparsity in self.chosen]
        ranking = self.chooser._ranking(chosen, module, self.groups, self.before, self.context)
        counts = self.chooser._counts(list(ranking.tables), [sparsity for _, sparsity in chosen])
        components, rows = ranking.lowest(counts)
        live = torch.from_numpy(self.live & channels.live(components, rows))
        made = {}
        for name in self.masked:
            masks = [live[factor] for factor in channels.facts.state[name].factors]
            if name in self.before.elements:
                masks.append(self.before.elements[name].cpu())
            made[name] = torch.stack(torch.broadcast_tensors(*masks)).all(0)
        return made

    def finish(self, module: TracedModule) -> None:
        """Mask for good."""
        self.chooser.run(module, self.context)


@dataclass(frozen=True)
class _ScoredChannels(ChannelPruner):
    """Chooses channels by scores that were learned."""

    idempotent: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """That of the pass that it works for."""
        return MovementPruner.__name__

    def score(self, layer: Layer) -> Tensor:
        """The sum of a channel's scores: (channels,)."""
        return layer.weight.flatten(1).sum(1)

    def _choose(
        self, groups: ChannelGroups, module: TracedModule, context: Context
    ) -> list[tuple[Group | RowSet, float]]:
        """The chosen groups, with the scores of the weights that produce them in place of these weights."""
        found: list[tuple[Group | RowSet, float]] = []
        for item, sparsity in super()._choose(groups, module, context):
            closed = [part.layer for part in item.slices if not _opens(module, part.parameter)]
            if closed:
                context.notes.append(f"{', '.join(closed)} cannot be masked while it trains; {item.name} stays")
                continue
            slices = tuple(replace(part, parameter=f"{SCORES}.{part.parameter}") for part in item.slices)
            found.append((replace(item, slices=slices), sparsity))
        return found


def _opens(module: TracedModule, parameter: str) -> bool:
    """Whether a parameter of a clean module can be masked on its way into the operator that reads it."""
    holder = parameter.rpartition(".")[0]
    called = bool(module.graph.find_nodes(op="call_module", target=holder))
    return not called or opens(submodule(module, holder))


def _attach(module: TracedModule, author: str) -> None:
    """Let the masks of parameters with scores pass gradients to these."""
    scores = {name for name, _ in module.named_parameters() if name.startswith(f"{SCORES}.")}
    with rewriting(module, author) as rewriter:
        for node in module.graph.find_nodes(op="call_function", target=apply_mask):
            weight, mask = node.args
            name = f"{SCORES}.{str(mask.target).removeprefix(f'{MASKS}.')}"
            if weight.op == "get_attr" and mask.op == "get_attr" and name in scores:
                given = rewriter.insert_before(node, "get_attr", name, ())
                given.meta["mask"] = True
                rewriter.become(node, "call_function", learned_mask, (weight, mask, given))
