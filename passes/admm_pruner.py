"""Pruning by the alternating direction method of multipliers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fxcompress.checkpoint import Kept
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule
from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.inner_pruner import AroundPruner, prune, require_pruner
from fxcompress.passes.level_pruner import LevelPruner
from fxcompress.passes.scoring import Layer
from fxcompress.pipeline import Pass
from fxcompress.select import Selectors
from fxcompress.task import require_count


@dataclass(frozen=True)
class _EnergyPruner(ChannelPruner):
    """Keeps the channels that hold most of the squared norm of what produces them."""

    @property
    def name(self) -> str:
        """That of the pass that it works for."""
        return ADMMPruner.__name__

    def score(self, layer: Layer) -> Tensor:
        """Squared norms: (channels,)."""
        return layer.weight.double().flatten(1).square().sum(1)


@dataclass(frozen=True)
class ADMMPruner(AroundPruner):
    """Trains weights towards the sparse set before they are masked.

    Zhang et al. 2018, "A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers",
    arXiv 1804.03294, section 3. Minimises the loss f(W) under W in S by iterations of

    - W: train on f(W) + rho/2 * norm(W - Z + U)^2 (equation 7),
    - Z: project W + U on S (equation 9),
    - U: U + W - Z,

    from Z = W (a copy) and U = 0; afterwards what the last projection made zero is masked. S is what a pruner leaves.
    ``"element"``: tensors with so many weights other than zero; keeping the largest is the Euclidean projection.
    Otherwise: weights in which so many channels are zero where they are produced and where they are read. Channels are
    chosen by the squared norm of what produces them, in all coupled layers together. Biases and norms are not pulled.

    The residual norm(W - Z) of every iteration is noted. Follow with ``FineTune``.

    Args:
        sparsity: fraction to mask, in [0, 1), or a mapping of name pattern to fraction; left out with ``inner``.
        include: layers, as for every pruner.
        exclude: layers to leave alone.
        scope: ``"layer"`` or ``"global"``.
        rho: weight of the penalty.
        iterations: how many.
        epochs: how long each training is; the task's by default.
        granularity: ``"element"``, or that of a channel pruner: ``"channel"``, ``"head_dim"``, ``"head"``.
        inner: a pruner that projects in place of those: what it masks of W + U is zero in Z.

    Needs the task's batches, loss and optimizer, and what the inner pruner needs. Masks that were there stay.
    """

    sparsity: float | Mapping[str, float] | None = None
    include: Selectors | None = None
    exclude: Selectors | None = None
    scope: Literal["layer", "global"] = "layer"
    rho: float = 1e-4
    iterations: int = 10
    epochs: int | None = None
    granularity: Literal["element", "channel", "head_dim", "head"] = "element"
    inner: Pass | None = None

    def __post_init__(self) -> None:
        if self.inner is not None:
            require_pruner(self.inner, self.name, scaled=False)
            if "optimizer" in self.inner.needs:
                raise InputError(f"inner is {self.inner!r}, which trains; expected a pruner that masks at once.")
            if (self.sparsity, self.include, self.exclude, self.scope) != (None, None, None, "layer"):
                raise InputError("inner decides what is masked; leave sparsity, include, exclude and scope out.")
        elif self.sparsity is None:
            raise InputError("sparsity is missing: give the fraction to mask, in [0, 1), or an inner pruner.")
        self.pruner  # noqa: B018 - raises where an option is wrong
        require_count("iterations", self.iterations)
        if self.epochs is not None:
            require_count("epochs", self.epochs)
        if isinstance(self.rho, bool) or not isinstance(self.rho, (int, float)) or not 0 < self.rho < math.inf:
            raise InputError(f"rho is {self.rho!r}; expected a positive number, the weight of the penalty.")

    @property
    def pruner(self) -> Pass:
        """The pruner whose masks make Z of W + U."""
        if self.inner is not None:
            return self.inner
        assert self.sparsity is not None
        if self.granularity == "element":
            return LevelPruner(self.sparsity, self.include, self.exclude, self.scope)
        return _EnergyPruner(
            self.sparsity, self.include, self.exclude, scope=self.scope, granularity=self.granularity
        )  # fmt: skip

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Alternate, then mask."""
        split = Kept(z={}, u={}, masking=None)
        release = context.keep(split)
        weights = _Weights.of(module, context)
        context.step(module, partial(self._begin, module, context, weights, split))
        for iteration in range(1, self.iterations + 1):
            place = f"iteration {iteration} of {self.iterations}"
            with context.laid(module, self.name):
                penalty = _Penalty(self.rho, weights, {name: z - split["u"][name] for name, z in split["z"].items()})
                context.train(module, epochs=self.epochs, penalty=penalty, title=f"{self.name}, {place}")
            residual, norm = context.step(module, partial(self._project, module, context, weights, split))
            share = residual / norm if norm else 0.0
            context.notes.append(f"{place}: norm(W - Z) is {residual:.6g}, {share:.2%} of norm(W)")
        context.step(module, partial(self._mask, context, split))
        release()
        return module

    def _mask(self, context: Context, split: Kept) -> None:
        """Mask what the last projection made zero. A step: what follows may mask more, and be stored, in its place."""
        context.masking = split["masking"]

    def _begin(self, module: TracedModule, context: Context, weights: _Weights, split: Kept) -> None:
        """Z is a copy of the weights that would be masked now."""
        _, masks = self._masks(module, context)
        with torch.no_grad():
            split["z"] = {name: weights[name].clone() for name in masks}
            split["u"] = {name: torch.zeros_like(z) for name, z in split["z"].items()}

    def _project(self, module: TracedModule, context: Context, weights: _Weights, split: Kept) -> tuple[float, float]:
        """The Z-step and the U-step; returns norm(W - Z) and norm(W)."""
        duals: dict[str, Tensor] = split["u"]
        residual = norm = 0.0
        with torch.no_grad():
            with _holding(module, {name: weights[name] + dual for name, dual in duals.items()}):
                split["masking"], masks = self._masks(module, context)
            split["z"], split["u"] = {}, {}
            for name in {**duals, **masks}:  # a layer may lose its first weight later than others
                weight = weights[name]
                total = weight + duals[name] if name in duals else weight.clone()
                z = total * masks[name] if name in masks else total
                split["z"][name], split["u"][name] = z, total - z
                residual += float((weight - z).double().square().sum())
                norm += float(weight.double().square().sum())
        return math.sqrt(residual), math.sqrt(norm)

    def _masks(self, module: TracedModule, context: Context) -> tuple[Masking, dict[str, Tensor]]:
        """What the projection would mask now, and its masks of weights; the context's own masking stays."""
        start = context.masking
        try:
            prune(self.pruner, module, context)
            found = context.masking or Masking()
        finally:
            context.masking = start
        full = complete(module, found, context.groups(module).channels) if found.dead else found
        dims = {name: parameter.dim() for name, parameter in module.named_parameters()}
        return found, {name: mask for name, mask in full.elements.items() if dims[name] > 1}


@dataclass(frozen=True)
class _Weights:
    """A module's weights by name, what is masked zero.

    Attributes:
        parameters: by name.
        masks: bool tensors, True = keep, of those that were masked before.
    """

    parameters: dict[str, nn.Parameter]
    masks: dict[str, Tensor]

    @classmethod
    def of(cls, module: TracedModule, context: Context) -> _Weights:
        masking = context.masking or Masking()
        if masking.dead:
            masking = complete(module, masking, context.groups(module).channels)
        return cls(dict(module.named_parameters()), masking.elements)

    def __getitem__(self, name: str) -> Tensor:
        parameter, mask = self.parameters[name], self.masks.get(name)
        return parameter if mask is None else parameter * mask.to(parameter.device)


class _Penalty:
    """rho/2 * sum norm(W - target)^2, with target = Z - U."""

    def __init__(self, rho: float, weights: _Weights, targets: dict[str, Tensor]) -> None:
        self.rho, self.weights, self.targets = rho, weights, targets

    def __call__(self) -> Tensor:
        total = torch.zeros(())
        for name, target in self.targets.items():
            weight = self.weights[name]
            if target.device != weight.device:  # the task trains elsewhere
                self.targets[name] = target = target.to(weight.device)
            total = total.to(weight) + (weight - target).square().sum()
        return self.rho / 2 * total


@contextmanager
def _holding(module: TracedModule, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters with other values meanwhile."""
    own = {name: module.get_parameter(name).data for name in values}
    for name, value in values.items():
        module.get_parameter(name).data = value
    try:
        yield
    finally:
        for name, value in own.items():
            module.get_parameter(name).data = value
