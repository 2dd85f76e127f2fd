"""How many bits each layer's weight gets, found by a sampler of Optuna under a budget."""

from __future__ import annotations

import copy
import glob
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from fxcompress.budget import Budget
from fxcompress.channels.labels import FloatArray, IntArray
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.inputs import Inputs
from fxcompress.masking import Masking
from fxcompress.module import TracedModule, modules_of
from fxcompress.passes.inner_pruner import prune
from fxcompress.passes.ptq_quantizer import PTQQuantizer
from fxcompress.passes.quantizer import Quantizer
from fxcompress.passes.samplers import Suggestions, require_sampler, tuned
from fxcompress.passes.searching_pruner import require_dense, told
from fxcompress.pipeline import Pass
from fxcompress.prices import dense_cost
from fxcompress.quantization.bits import require_bits
from fxcompress.search.history import SearchHistory
from fxcompress.search.trial import Proposal, Trial
from fxcompress.search.weight_bits import WeightSite, weight_sites
from fxcompress.select import Selection
from fxcompress.task import Need, Task, require_count
from fxcompress.training import placed

#: A layer that is less than its place by this has moved to the one below.
_MOVED = 1e-9


@dataclass
class QuantizedSubject:
    """A model whose layers get bits: what a trial is about.

    Attributes:
        module: a clean traced module, the subject's own.
        inputs: the example inputs.
        task: scores, and gives what to calibrate with.
        masking: of the module.
        inner: puts fake-quant nodes in.
        layers: that proposals list; 0 bits leave one in float.
    """

    module: TracedModule
    inputs: Inputs | None
    task: Task
    masking: Masking
    inner: Quantizer
    layers: tuple[str, ...]

    def score(self, proposal: Proposal) -> float:
        """The score with so many bits, calibrated anew. Nothing is traced."""
        context = Context(inputs=self.inputs, task=self.task, masking=self.masking)
        module = copy.deepcopy(self.module)
        if any(proposal.bits):
            prune(with_bits(self.inner, self.layers, proposal.bits), module, context)
        context.masked(module, self.inner.name)
        with placed(module, self.task.device):
            return self.task.measure(module)


def with_bits(inner: Quantizer, layers: Sequence[str], bits: Sequence[int]) -> Quantizer:
    """The quantizer with so many bits for each layer's weight."""
    chosen = {glob.escape(name): width for name, width in zip(layers, bits, strict=True) if width}
    return replace(inner, weight_bits=chosen)


@dataclass(frozen=True)
class TunedQuantizer(Pass):
    """Lets Optuna choose the bits of every layer's weight, so that the weights take as little room as allowed.

    The sampler suggests a number for every layer; bits follow its place among the choices. Suggestions are lowered
    together until the budget is met. The best trial is quantized for good.

    Args:
        budget: ``Budget(bytes=..)``: of the dense model's parameters and buffers, where a weight of b bits takes b / 8
            bytes an element. (Scales are not counted: one number for each output channel.)
        bits: the choices, 2 to 8.
        inner: the quantizer; its ``weight_bits`` are replaced.
        sampler: ``"tpe"``, ``"cmaes"``, ``"random"``, ``"nsga2"`` or ``"grid"``.
        trials: how many, besides the float model and the one with equal bits.

    Needs the task's score, and what the inner quantizer needs. Needs ``fxcompress[search]``.
    """

    budget: Budget
    bits: Sequence[int] = (2, 3, 4, 6, 8)
    inner: Quantizer = field(default_factory=PTQQuantizer)
    sampler: str = "tpe"
    trials: int = 32

    lifts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget) or list(self.budget.ratios) != ["bytes"]:
            raise InputError(f"budget is {self.budget!r}; expected one of bytes alone, such as Budget(bytes=0.15).")
        if not isinstance(self.inner, Quantizer):
            raise InputError(f"inner is {self.inner!r}; expected a quantizer, such as PTQQuantizer().")
        for width in self.bits:
            require_bits("bits", width, self.inner.least_bits)
        if not self.bits:
            raise InputError("bits is empty; expected the choices, such as (2, 4, 8).")
        require_sampler(self.sampler)
        require_count("trials", self.trials)

    @property
    def needs(self) -> tuple[Need, ...]:
        """A score, and what the inner quantizer needs."""
        return tuple(dict.fromkeys(("score", *self.inner.needs)))

    def requires(self, module: TracedModule, context: Context) -> None:
        """Raise if the inner quantizer cannot run."""
        super().requires(module, context)
        self.inner.requires(module, context)

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Search, then quantize with the best."""
        sites = self._sites(module)
        layers = tuple(site.layer for site in sites)
        history = context.step(module, partial(self._look, module, context, sites))
        context.searches.append(history)
        assert history.taken is not None
        prune(with_bits(self.inner, layers, history.taken.bits), module, context)
        return module

    def _sites(self, module: TracedModule) -> tuple[WeightSite, ...]:
        names = modules_of(module)
        sites = weight_sites(module, self.inner.tables(module))
        layers = {site.layer: names[site.layer] for site in sites}
        chosen = Selection(self.inner.include, self.inner.exclude).chosen(layers)
        taken = tuple(site for site in sites if site.layer in chosen)
        if not taken:
            raise InputError(f"{self.name} has no layer to quantize; expected at least one that {self.inner!r} takes.")
        return taken

    def _look(self, module: TracedModule, context: Context, sites: tuple[WeightSite, ...]) -> SearchHistory:
        task = context.required_task(self.needs, self.name)
        layers = tuple(site.layer for site in sites)
        prices = _BytePrices.of(self, module, context, sites)
        subject = QuantizedSubject(
            copy.deepcopy(module), context.inputs, task, context.masking or Masking(), self.inner, layers
        )
        with context.search(self.name, 2 + self.trials, self, layers, within=_quantized) as search:
            study = Suggestions(self.sampler, layers, 1.0, self.trials, search.seeds)
            search.about(lambda: subject)
            begun = [prices.proposal(np.zeros(len(layers), dtype=np.int64)), prices.met(np.ones(len(layers)))]
            dense, *_ = require_dense(search, search.evaluate(begun))
            tuned(search, study, self.trials, lambda asked: [prices.met(row) for row in asked], _score)
            best = search.best(_quantized)
            known: dict[str, Any] = {"groups": layers, "widths": (32,) * len(layers), "dense": dense.score}
            history = search.history(best=best.number, taken=best.proposal, budget=dict(self.budget.ratios), **known)
        context.notes += told(history)
        cost = best.proposal.cost["bytes"]
        context.notes.append(f"trial {best.number} is taken: score {best.score:.6g}, {cost:.2%} of the bytes")
        return history


def _score(trial: Trial) -> list[float]:
    assert trial.score is not None
    return [trial.score]


def _quantized(trial: Trial) -> bool:
    return any(trial.proposal.bits)


@dataclass(frozen=True)
class _BytePrices:
    """What bits cost.

    Attributes:
        choices: the bits, few first.
        elements: (layers,): of each weight.
        sizes: (layers,): bytes of each weight in float.
        total: bytes of the module in float.
        dense: bytes of the caller's dense model.
        ratio: of those, what is allowed.
    """

    choices: IntArray
    elements: IntArray
    sizes: IntArray
    total: int
    dense: float
    ratio: float

    @classmethod
    def of(
        cls, item: TunedQuantizer, module: TracedModule, context: Context, sites: Sequence[WeightSite]
    ) -> _BytePrices:
        """For a module as it is.

        Raises:
            InputError: the fewest bits everywhere are too many.
        """
        weights = [module.get_parameter(site.weight) for site in sites]
        total = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        dense = float(total) if context.inputs is None else dense_cost(module, context.inputs).figures["bytes"]
        ratio = item.budget.bytes
        assert ratio is not None
        made = cls(
            np.array(sorted(set(item.bits)), dtype=np.int64),
            np.array([weight.numel() for weight in weights], dtype=np.int64),
            np.array([weight.numel() * weight.element_size() for weight in weights], dtype=np.int64),
            total,
            dense,
            ratio,
        )
        least = made.cost(np.full(len(sites), made.choices[0]))
        if least > ratio:
            raise InputError(
                f"the budget allows {ratio:.2%} of the bytes; {least:.2%} is left with {made.choices[0]} bits for "
                "every weight. Give a larger budget, fewer bits, or prune first."
            )
        return made

    def cost(self, bits: IntArray) -> float:
        """Bytes with so many bits, 0 for float, as a fraction of the dense model's."""
        stored = np.where(bits > 0, self.elements * bits / 8, self.sizes)
        return float(self.total - self.sizes.sum() + stored.sum()) / self.dense

    def proposal(self, bits: IntArray) -> Proposal:
        """Some bits as a proposal."""
        return Proposal(bits=tuple(bits.tolist()), cost={"bytes": self.cost(bits)})

    def met(self, wishes: FloatArray) -> Proposal:
        """Bits by wishes in [0, 1], all lowered by as little as meets the budget.

        A wish counts by its place among the choices; between two moves of a layer nothing changes, so that the places
        at which one moves are all there is to try.
        """
        count = len(self.choices)
        moves = np.unique([0.0, *(wishes[:, None] - np.arange(count) / count).clip(0).reshape(-1)])
        low, high = 0, len(moves) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self.cost(self._bits(wishes - moves[middle])) <= self.ratio
            low, high = (low, middle) if fits else (middle + 1, high)
        return self.proposal(self._bits(wishes - moves[low]))

    def _bits(self, wishes: FloatArray) -> IntArray:
        count = len(self.choices)
        place = np.ceil(wishes * count - _MOVED).astype(np.int64) - 1
        found: IntArray = self.choices[place.clip(0, count - 1)]
        return found
