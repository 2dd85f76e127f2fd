"""Quantization in simulation: what all quantizers share. One of your own is one method, ``quantize(x, spec)``."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fxcompress.context import Context
from fxcompress.errors import InputError, PassError
from fxcompress.export.session import OnnxModule
from fxcompress.lower.flat import FLAT
from fxcompress.module import TracedModule, submodule
from fxcompress.pipeline import Pass
from fxcompress.quantization.bits import BitRules, Bits, require_bits
from fxcompress.quantization.calibrate import Calibrator, calibrate
from fxcompress.quantization.edges import LayerSpecs
from fxcompress.quantization.fake_quantize import QUANT, FakeQuantize, TransformedFakeQuantize
from fxcompress.quantization.insert import Slot, insert
from fxcompress.quantization.regular import common_step
from fxcompress.quantization.sites import Site, ends, find_sites
from fxcompress.quantization.spec import QuantSpec, activation_spec, weight_spec
from fxcompress.rewrite import rewriting
from fxcompress.select import Selection, Selectors
from fxcompress.task import Need, require_count
from fxcompress.training import placed


@dataclass(frozen=True)
class Quantizer(Pass):
    """Rounds the weights of convolutions and linear layers, and what they read, to a few bits, in simulation.

    Puts fake-quant nodes on the edges of the graph, and keeps those that are there; parameters keep their names and
    values (not in :class:`PTQQuantizer`), and what is new in the ``state_dict`` is under ``_quant.``. Masks stay: a
    masked weight is zero behind its fake-quant node too.

    Args:
        weight_bits: 2 to 8, or a mapping of name pattern to bits (the last match counts; unmatched layers stay float).
        activation_bits: likewise, of what a layer reads; None leaves activations in float.
        include: name patterns, module types or predicates that choose layers; all by default.
        exclude: layers to leave in float.
        first_last: what becomes of the first and the last layers: ``"same"``, ``"float"``, or how many bits.
        epochs: of training on the task, with the nodes in place; 0 leaves the training to you.
    """

    weight_bits: Bits = 8
    activation_bits: Bits | None = None
    include: Selectors | None = None
    exclude: Selectors | None = None
    first_last: Literal["same", "float"] | int = "same"
    epochs: int = 0

    idempotent: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    #: Smallest number of bits.
    least_bits: ClassVar[int] = 2
    #: Weights lie on the grid that they have once BatchNorm is folded.
    folds: ClassVar[bool] = False
    #: Activations lie on grids wherever integer kernels read or write; without, only where a layer reads.
    kernels: ClassVar[bool] = False
    #: ``quantize`` brings its own gradient; without, it is 1.
    own_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Selection(self.include, self.exclude)
        BitRules.parse("weight_bits", self.weight_bits, self.least_bits)
        if self.activation_bits is not None:
            BitRules.parse("activation_bits", self.activation_bits, self.least_bits)
        if self.first_last not in ("same", "float"):
            if isinstance(self.first_last, str):
                raise InputError(f"first_last is {self.first_last!r}; expected 'same', 'float' or a number of bits.")
            require_bits("first_last", self.first_last, self.least_bits)
        require_count("epochs", self.epochs, least=0)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What training needs, if it trains."""
        return ("batches", "loss", "optimizer") if self.epochs else ()

    def requires(self, module: TracedModule, context: Context) -> None:
        """Activations are followed through a run of the model, which is not lowered yet."""
        super().requires(module, context)
        if module.meta.get(FLAT) or any(isinstance(item, OnnxModule) for item in module.modules()):
            raise PassError(
                f"{self.name} was given a lowered module, whose kernels hold packed weights; expected one that Lower "
                "did not see. Quantize first, then lower."
            )
        if (self.activation_bits is not None or self.product_spec() is not None) and context.inputs is None:
            raise InputError(f"example_inputs is missing: {self.name} follows activations through a run of the model.")

    # ---- what an algorithm says ----------------------------------------------------------------------------------

    def quantize(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """``x`` on a grid of the spec's bits: by default the nearest of ``spec``'s integers times ``max abs(x)``."""
        scale, _ = replace(spec, symmetric=True).grid(x.min(), x.max())
        return (x / scale).round().clamp(spec.quant_min, spec.quant_max) * scale

    def step(self, x: Tensor, spec: QuantSpec) -> Tensor | None:
        """The distance of neighbouring values of ``quantize(x)``, one for each index of the spec's axis; by default the
        largest number of which all values are multiples, if 8 bits hold those."""
        return common_step(self.quantize(x, spec).detach(), spec.axis)

    def weight_spec(self, bits: int) -> QuantSpec:
        """The grid of a weight."""
        return weight_spec(bits, axis=None)

    def activation_spec(self, bits: int) -> QuantSpec:
        """The grid of an activation."""
        return replace(activation_spec(bits, None), signed=True, symmetric=True)

    def product_spec(self) -> QuantSpec | None:
        """The grid of what contractions of two activations read; by default they stay float."""
        return None

    def tables(self, module: TracedModule) -> list[Site]:
        """The embeddings whose weights are rounded; by default they stay float."""
        return []

    def make(self, slot: Slot, seen: Calibrator) -> FakeQuantize:
        """The module for a slot, of which ``seen`` saw what goes by there."""
        plain = replace(self, include=None, exclude=None)  # predicates need not pickle
        return TransformedFakeQuantize(seen.spec, plain, calls=slot.calls)

    def train(self, module: TracedModule, context: Context) -> None:
        """Train with the nodes in place."""
        context.train(module, epochs=self.epochs, title=self.name)

    def prepare(self, module: TracedModule, context: Context) -> TracedModule:
        """What is done to the clean module before nodes go in."""
        return module

    def finish(self, module: TracedModule, context: Context, seen: dict[str, Calibrator]) -> None:
        """What is done with the nodes in place, before training."""

    def calibration(self, context: Context) -> Iterator[Any]:
        """What to calibrate with: one batch of the task, or the example inputs."""
        return self.first_batches(context, 1)

    # ---- the work ------------------------------------------------------------------------------------------------

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Insert, calibrate, train."""
        summary = context.step(module, partial(self._place, module, context))
        if summary is None:
            context.notes.append("nothing to quantize")
            return module
        if self.epochs:
            with context.laid(module, self.name):
                self.train(module, context)
        context.notes.append(summary)
        return module

    def _place(self, module: TracedModule, context: Context) -> str | None:
        """Put in the nodes, with ranges that calibration found; a line for the notes, or None if nothing is chosen.

        A step of the run: one that goes on after it was killed in training finds the nodes there.
        """
        if self.prepare(module, context) is not module:
            raise PassError(f"{self.name}.prepare returned another module; expected the one that it was given.")
        specs = self._specs(module)
        products = self.product_spec()
        wants_facts = self.folds or products is not None or any(item.data is not None for item in specs.values())
        facts = context.groups(module).channels.facts if wants_facts and context.inputs is not None else None
        slots = insert(
            module,
            specs,
            facts,
            self.name,
            folds=self.folds,
            kernels=self.kernels,
            products=products,
            tables=self.tables(module),
        )
        if not slots:
            self._say_why(module, specs)
            return None
        with context.laid(module, self.name):
            self._fill(module, slots, context)
        return _summary(slots)

    def _say_why(self, module: TracedModule, specs: Mapping[str, LayerSpecs]) -> None:
        """Warn that nothing is left to quantize, unless all of it was quantized with the bits that are asked for."""
        sites = [*find_sites(module), *self.tables(module)]
        kept = [(site, submodule(module, f"{QUANT}.{site.weight}")) for site in sites if site.layer in specs]
        others = [
            f"{site.layer} has {quantizer.spec.bits}, not {wanted.bits}"
            for site, quantizer in kept
            if (wanted := specs[site.layer].weight) is not None
            and isinstance(quantizer, FakeQuantize)
            and quantizer.spec.bits != wanted.bits
        ]
        reason = ""
        if not sites:
            reason = "the model has no convolution or linear layer whose weight is a parameter"
        elif not specs:
            reason = "include, exclude, the bits and first_last leave every layer in float"
        elif others:
            reason = f"fake-quant nodes that are there stay ({'; '.join(others[:5])} bits)"
        if reason:
            warnings.warn(f"{self.name} has nothing to quantize: {reason}", stacklevel=2)

    def _specs(self, module: TracedModule) -> dict[str, LayerSpecs]:
        """What is wanted of each layer."""
        sites = list(find_sites(module))
        layers = {site.layer: submodule(module, site.layer) for site in [*sites, *self.tables(module)]}
        chosen = Selection(self.include, self.exclude).chosen(layers)
        weights = BitRules.parse("weight_bits", self.weight_bits, self.least_bits).of(layers)
        data: dict[str, int] = {}
        if self.activation_bits is not None:
            data = BitRules.parse("activation_bits", self.activation_bits, self.least_bits).of(layers)
        if self.first_last != "same":
            for name in ends(module, sites):
                for bits in (weights, data):
                    if name in bits and self.first_last != "float":
                        bits[name] = self.first_last
                    elif name in bits:
                        del bits[name]
        return {
            name: LayerSpecs(
                self.weight_spec(weights[name]) if name in weights else None,
                self.activation_spec(data[name]) if name in data else None,
            )
            for name in layers
            if name in chosen and (name in weights or name in data)
        }

    def _fill(self, module: TracedModule, slots: list[Slot], context: Context) -> None:
        """Let calibrators see what goes by, and put in what is made of it."""
        modules = {slot.name: submodule(module, slot.name) for slot in slots}
        seen = {name: item for name, item in modules.items() if isinstance(item, Calibrator)}
        with placed(module, None if context.task is None else context.task.device):  # where its batches are
            if context.inputs is None:
                _see_weights(module, seen)
            else:
                calibrate(module, seen.values(), self.calibration(context), partial(feed, module, context))
            like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
            with rewriting(module, self.name) as rewriter:
                for slot in slots:
                    made = self.make(slot, seen[slot.name])
                    rewriter.put_module(slot.name, made.to(like.device, like.dtype))
            self.finish(module, context, seen)

    def first_batches(self, context: Context, count: int) -> Iterator[Any]:
        """At most ``count`` batches of the task, or the example inputs if there is none."""
        if context.task is not None and context.task.batches is not None:
            return itertools.islice(context.task.read(), count)
        return iter([context.inputs])


def feed(module: TracedModule, context: Context, batch: Any) -> None:
    """Run the model on a batch of the task, or on the example inputs."""
    if batch is context.inputs:
        assert context.inputs is not None
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        context.inputs.map(lambda tensor: tensor.to(device)).run(module)
    else:
        assert context.task is not None
        context.task.feed(module, batch)


def _see_weights(module: TracedModule, seen: dict[str, Calibrator]) -> None:
    """Show every calibrator its weight, masked as it is; nothing else needs to run."""
    values: dict[Any, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            values[node] = getattr(submodule(module, path), leaf)
        elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            if "mask" in node.meta:
                values[node] = node.target(*(values.get(item, item) for item in node.args))
        elif node.op == "call_module" and str(node.target) in seen:
            with torch.no_grad():
                seen[str(node.target)].see(values[node.args[0]].detach())


def _summary(slots: list[Slot]) -> str:
    """A line for the notes."""
    weights = [slot.spec.bits for slot in slots if slot.layer]
    data = [slot.spec.bits for slot in slots if not slot.layer]
    parts = []
    for bits, what in ((weights, "weights"), (data, "activations")):
        if bits:
            widths = ", ".join(f"{bits.count(width)} to {width} bits" for width in sorted(set(bits)))
            parts.append(f"{what}: {widths}")
    return "; ".join(parts)
