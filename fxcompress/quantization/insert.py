"""The one function that puts fake-quant nodes into a graph: what algorithms annotate with specs is carried out here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxcompress.channels.labels import Labels
from fxcompress.channels.propagate import Facts
from fxcompress.errors import InputError
from fxcompress.folding import calls_of, norm_source
from fxcompress.layers import open_layer, parameter_node
from fxcompress.module import TracedModule, owner, submodule
from fxcompress.nodes import batch_norm_factor
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.edges import ActivationEdges, Block, Edges, LayerSpecs
from fxcompress.quantization.fake_quantize import QUANT, ROLE
from fxcompress.quantization.sites import Site, find_sites
from fxcompress.quantization.spec import QuantSpec
from fxcompress.rewrite import Rewriter, Value, rewriting


@dataclass(frozen=True)
class Slot:
    """A place where a fake-quant module belongs.

    Attributes:
        name: of the module, under ``_quant.``.
        spec: its grid.
        channels: length of the spec's axis, 0 without.
        calls: at how many nodes it is called.
        layer: whose weight it is; empty for an activation.
    """

    name: str
    spec: QuantSpec
    channels: int
    calls: int
    layer: str


def insert(
    module: TracedModule,
    specs: Mapping[str, LayerSpecs],
    facts: Facts | None,
    author: str,
    *,
    folds: bool,
    kernels: bool,
    products: QuantSpec | None = None,
    tables: Sequence[Site] = (),
) -> list[Slot]:
    """Open the layers and put a node on every edge that the specs ask for; the modules are still calibrators.

    Args:
        module: a clean traced module, changed in place. Edges that have a node keep it.
        specs: what is wanted of each layer, by its name.
        facts: the module's channel analysis; None if no spec is about activations.
        author: the pass, for provenance.
        folds: a weight with a BatchNorm behind it lies on the grid of the folded weight.
        kernels: activations lie on grids wherever integer kernels read or write them; without, only what the layers
            read does, and other readers see it as it was.
        products: with ``kernels``, of what contractions of two activations read; None leaves them as they are.
        tables: embeddings whose weights are rounded too, with a scale for each row.

    Raises:
        InputError: a spec of an activation has a scale for each index of a dimension.
    """
    for name, spec in [*((name, item.data) for name, item in specs.items()), ("product", products)]:
        if spec is not None and spec.axis is not None:
            raise InputError(
                f"the activation_spec of {author} for {name} has axis={spec.axis}; expected None: what a layer reads "
                "has one scale for the tensor."
            )
    sites = [site for site in find_sites(module) if site.layer in specs]
    with rewriting(module, author) as rewriter:
        inserter = _Inserter(rewriter, facts)
        if facts is not None:
            edges = Edges(module, facts, find_sites(module), {site.node: specs[site.layer] for site in sites})
            blocks = {block.site.node: block for block in edges.blocks}
            activations = edges.activations(products) if kernels else edges.inputs()
        else:
            blocks, activations = {}, []
        order = {node: place for place, node in enumerate(module.graph.nodes)}
        readers = [*sites, *(site for site in tables if site.layer in specs)]
        readers.sort(key=lambda site: order[site.node])
        inserter.weights([site for site in readers if not site.quantized], specs, blocks if folds else {})
        for item in activations:
            inserter.activation(item)
    return inserter.slots


class _Inserter:
    def __init__(self, rewriter: Rewriter, facts: Facts | None) -> None:
        self.rewriter, self.facts = rewriter, facts
        self.module = rewriter.module
        self.slots: list[Slot] = []

    def weights(self, sites: list[Site], specs: Mapping[str, LayerSpecs], blocks: Mapping[fx.Node, Block]) -> None:
        """One node for each weight, whoever reads it."""
        readers: dict[str, list[Site]] = {}
        for site in sites:
            if specs[site.layer].weight is not None:
                readers.setdefault(site.weight, []).append(site)
        calls = calls_of(self.module)
        for name, same in readers.items():
            spec = specs[same[0].layer].weight
            assert spec is not None
            norm = blocks[same[0].node].norm if len(same) == 1 and same[0].node in blocks else None
            if norm is not None and (
                same[0].axis is None or norm_source(norm, self.module, calls, self._ranks) is None
            ):
                norm = None
            for site in same:
                if site.node.op == "call_module":
                    open_layer(self.rewriter, site.node)
            self._weight(name, same, spec, norm)

    def _weight(self, name: str, same: list[Site], spec: QuantSpec, norm: fx.Node | None) -> None:
        first = same[0].node
        source = parameter_node(self.rewriter, name, before=first)
        holder, leaf = owner(self.module, name)
        weight = holder.get_parameter(leaf)
        axis = same[0].axis if spec.axis is not None or any(site.table for site in same) else None
        spec = spec if spec.axis == axis else spec.along(axis)
        args: tuple[fx.Node, ...] = (source,)
        if norm is not None:
            args = (source, self._factor(norm, first, same[0].axis or 0, weight.dim()))
        slot = self._slot(name, spec, weight.shape[axis] if axis is not None else 0, 1, same[0].layer)
        node = self.rewriter.insert_before(first, "call_module", slot.name, args)
        node.meta[ROLE] = spec.role
        for site in same:
            read = site.node.args[1] if len(site.node.args) > 1 else site.node.kwargs["weight"]
            assert isinstance(read, fx.Node)
            self.rewriter.read(site.node, read, node)

    def _factor(self, norm: fx.Node, before: fx.Node, axis: int, dims: int) -> fx.Node:
        """What the BatchNorm multiplies the weight with, once it is folded."""
        layer = submodule(self.module, str(norm.target))
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        variance = parameter_node(self.rewriter, f"{norm.target}.running_var", before=before)
        gamma = None
        if layer.weight is not None:
            gamma = parameter_node(self.rewriter, f"{norm.target}.weight", before=before)
        shape = tuple(-1 if dim == axis else 1 for dim in range(dims))
        args = (variance, gamma, layer.eps, shape)
        return self.rewriter.insert_before(before, "call_function", batch_norm_factor, args)

    def _ranks(self, node: fx.Node) -> int:
        labels = None if self.facts is None else self.facts.values.get(node.name)
        return len(labels.shape) if isinstance(labels, Labels) else 0

    def activation(self, edges: ActivationEdges) -> None:
        """One module behind each of the places."""
        slot = self._slot(f"activations.{edges.places[0].name}", edges.spec, 0, len(edges.places), "")
        for number, place in enumerate(edges.places):
            options: dict[str, Value] = {"place": number} if len(edges.places) > 1 else {}
            node = self.rewriter.insert_after(place, "call_module", slot.name, (place,), options)
            node.meta[ROLE] = edges.spec.role
            readers = edges.readers
            self.rewriter.replace(place, node, (lambda user: True) if readers is None else readers.__contains__)

    def _slot(self, name: str, spec: QuantSpec, channels: int, calls: int, layer: str) -> Slot:
        full = f"{QUANT}.{name}"
        while self.rewriter.has_module(full):
            full += "_"
        self.rewriter.put_module(full, Calibrator(full, spec))
        self.slots.append(Slot(full, spec, channels, calls, layer))
        return self.slots[-1]
