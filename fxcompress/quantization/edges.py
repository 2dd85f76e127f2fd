"""Which edges of a graph carry fake-quant nodes, and which share one: decided from frozen specs, before any edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from fxcompress.channels.labels import Labels
from fxcompress.channels.propagate import Facts
from fxcompress.module import TracedModule, submodule
from fxcompress.quantization.fake_quantize import ROLE
from fxcompress.quantization.sites import Site, operation, repeats
from fxcompress.quantization.spec import QuantSpec

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Applied to the result of a layer by its kernel.
_ACTIVATIONS = frozenset(
    "relu relu6 hardtanh hardswish silu gelu leakyrelu sigmoid hardsigmoid tanh elu".split(),
)
_NOTHING_IN_EVAL = frozenset("dropout dropout1d dropout2d dropout3d identity droppath stochasticdepth".split())
_SUMS = frozenset(("add", "iadd"))
#: Computed on integers, with a scale of their own.
_MIXING = _SUMS | frozenset(
    """mul imul mean avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d
    interpolate upsample""".split()
)
#: Contractions of two activations, and how many of their arguments they multiply.
_PRODUCTS = {"matmul": 2, "bmm": 2, "scaleddotproductattention": 3}
_OPERANDS = ("input", "other", "mat2", "query", "key", "value")
#: Give the values of several inputs.
JOINS = frozenset("cat concat concatenate stack".split())
#: Their results are values of their inputs (movement aside, which the channel analysis knows).
_CLOSED = _NOTHING_IN_EVAL | frozenset(
    "maxpool1d maxpool2d maxpool3d adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d".split()
)


@dataclass(frozen=True)
class LayerSpecs:
    """What a pass wants of a layer; None leaves it in float."""

    weight: QuantSpec | None
    data: QuantSpec | None


@dataclass(frozen=True)
class Block:
    """A layer and what its kernel does behind it; every value in between has one reader.

    Attributes:
        site: the layer.
        norm: the BatchNorm behind it.
        addend: what is added then.
        end: the last node.
        inside: all nodes but the last.
    """

    site: Site
    norm: fx.Node | None
    addend: fx.Node | None
    end: fx.Node
    inside: tuple[fx.Node, ...]


@dataclass(frozen=True)
class ActivationEdges:
    """Values that share one fake-quant module.

    Attributes:
        places: the nodes behind which it is called, in the order of the graph.
        spec: its grid.
        readers: who reads the fake-quant node; None for all.
    """

    places: tuple[fx.Node, ...]
    spec: QuantSpec
    readers: frozenset[fx.Node] | None = None


@dataclass
class _Wish:
    """What is wanted of a value.

    Attributes:
        spec: its grid.
        readers: who computes on integers with it, or moves it there.
        in_float: whether it is made in float, so that rounding it is work of its own: others read it as it was.
    """

    spec: QuantSpec
    readers: set[fx.Node] = field(default_factory=set)
    in_float: bool = False


class Edges:
    """Reads a clean graph.

    Args:
        module: the clean traced module.
        facts: its channel analysis: shapes, and which nodes only move elements.
        sites: the layers to quantize.
        specs: what is wanted of each, by its node.
    """

    def __init__(
        self, module: TracedModule, facts: Facts, sites: Iterable[Site], specs: Mapping[fx.Node, LayerSpecs]
    ) -> None:
        self.module, self.facts, self.specs = module, facts, specs
        self.order = {node: place for place, node in enumerate(module.graph.nodes)}
        self.sites = list(sites)
        self.blocks = self._find_blocks()

    # ---- blocks --------------------------------------------------------------------------------------------------

    def _find_blocks(self) -> list[Block]:
        taken: set[fx.Node] = set()
        blocks = []
        for site in reversed(self.sites):  # of the two operands of a sum, the later one can add the earlier one
            block = self._block(site, taken)
            taken |= {*block.inside, block.end}
            blocks.append(block)
        return blocks[::-1]

    def _block(self, site: Site, taken: set[fx.Node]) -> Block:
        nodes = [site.node]
        norm: fx.Node | None = None
        addend: fx.Node | None = None
        activated = False
        while len(nodes[-1].users) == 1 and not activated:
            (reader,) = nodes[-1].users
            name = operation(self.module, reader)
            if reader in taken or reader.op == "output":
                break
            if name in _NOTHING_IN_EVAL:
                pass
            elif norm is None and addend is None and self._is_norm(reader):
                norm = reader
            elif addend is None and name in _SUMS and self._addend(reader, nodes[-1]) is not None:
                addend = self._addend(reader, nodes[-1])
            elif name in _ACTIVATIONS:
                activated = True
            else:
                break
            nodes.append(reader)
        return Block(site, norm, addend, nodes[-1], tuple(nodes[:-1]))

    def _is_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(submodule(self.module, str(node.target)), _NORMS)

    def _addend(self, node: fx.Node, value: fx.Node) -> fx.Node | None:
        """What a sum adds to ``value``, if it depends on the inputs and has the same shape."""
        others = [item for item in node.args if item is not value]
        if node.kwargs or len(node.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        mine, other = self._labels(value), self._labels(others[0])
        if mine is None or other is None or other.const or mine.shape != other.shape:
            return None
        return others[0]

    def _labels(self, node: fx.Node) -> Labels | None:
        found = self.facts.values.get(node.name)
        return found if isinstance(found, Labels) else None

    # ---- activations ---------------------------------------------------------------------------------------------

    def inputs(self) -> list[ActivationEdges]:
        """What the layers themselves read, and nobody else."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        specs: dict[fx.Node, QuantSpec] = {}
        for site in self.sites:
            spec = self.specs[site.node].data if site.node in self.specs else None
            if spec is not None and ROLE not in site.data.meta:
                readers.setdefault(site.data, []).append(site.node)
                specs[site.data] = max(spec, specs.get(site.data, spec), key=lambda item: item.bits)
        return [ActivationEdges((value,), specs[value], frozenset(nodes)) for value, nodes in readers.items()]

    def activations(self, products: QuantSpec | None = None) -> list[ActivationEdges]:
        """The values that integer operators read, in groups that share a scale.

        Args:
            products: of what contractions of two activations read, such as attention's; None leaves them as they are.
        """
        wanted: dict[fx.Node, _Wish] = {}
        shared: dict[fx.Node, fx.Node] = {}
        fused = {block.end: block for block in self.blocks}
        inside = {node for block in self.blocks for node in block.inside}
        data = {site.node: site.data for site in self.sites}
        for node in reversed(self.module.graph.nodes):
            spec = self.specs[node].data if node in self.specs else None
            if node in data and spec is not None:
                self._want(wanted, data[node], spec, node)
            if products is not None:
                for source in self._factors(node):
                    self._want(wanted, source, products, node)
            if node not in wanted or node in inside:
                continue
            spec, name = wanted[node].spec, operation(self.module, node)
            if node in fused:
                block = fused[node]
                own = self.specs[block.site.node].data if block.site.node in self.specs else None
                if block.addend is not None and own is not None:
                    adds = next(item for item in (*block.inside, block.end) if block.addend in item.args)
                    self._want(wanted, block.addend, spec, adds)
            elif name in JOINS:
                roots = [self._want(wanted, source, spec, node) for source in node.all_input_nodes]
                for root in roots[1:]:
                    shared[_first(shared, root)] = _first(shared, roots[0])
                shared[_first(shared, node)] = _first(shared, roots[0])
            elif (maker := self._mixes(node, name)) is not None:
                for source in maker.all_input_nodes:
                    labels = self._labels(source)
                    if labels is not None and not labels.const:
                        self._want(wanted, source, spec, maker)
            else:
                wanted[node].in_float = True
        return self._grouped(wanted, shared)

    def _mixes(self, node: fx.Node, name: str) -> fx.Node | None:
        """The node that computes a value from integers: it itself, or what is before a ReLU; None for other values."""
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if name == "relu" and source is not None and len(source.users) == 1:
            sums = operation(self.module, source) in _SUMS
            return source if sums or self._scales(source) else None
        return node if name in _MIXING or self._scales(node) else None

    def _scales(self, node: fx.Node) -> bool:
        """Whether a node is a BatchNorm over images that the network makes, with statistics."""
        layer = submodule(self.module, str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is None:
            return False
        return self.root(node.all_input_nodes[0]).op != "placeholder"

    def _factors(self, node: fx.Node) -> list[fx.Node]:
        """What a contraction of activations multiplies; empty for other nodes, and where a factor is no activation."""
        count = _PRODUCTS.get(operation(self.module, node), 0)
        given = [*node.args, *(node.kwargs[name] for name in _OPERANDS if name in node.kwargs)][:count]
        factors = [item for item in given if isinstance(item, fx.Node)]
        labels = [self._labels(item) for item in factors]
        fine = len(factors) == count and all(item is not None and not item.const for item in labels)
        return factors if fine else []

    def _want(self, wanted: dict[fx.Node, _Wish], value: fx.Node, spec: QuantSpec, reader: fx.Node) -> fx.Node:
        """Ask for a value on a grid where it is made; of two wishes the one with more bits counts."""
        root = self.root(value)
        if ROLE in root.meta:
            return root
        while value is not root:
            reader, value = value, value.all_input_nodes[0]
        wish = wanted.setdefault(root, _Wish(spec))
        wish.spec = max(wish.spec, spec, key=lambda item: item.bits)
        wish.readers.add(reader)
        return root

    def root(self, node: fx.Node) -> fx.Node:
        """Where a value was made that has only been moved since, or picked out."""
        root = node
        while node.args and isinstance(node.args[0], fx.Node) and self._is_closed(node):
            node = node.args[0]
            if writers(node):
                break  # what is read later is not what was made
            if self._labels(node) is not None:  # several tensors have no grid (a recurrent layer's)
                root = node
        return root

    def _is_closed(self, node: fx.Node) -> bool:
        name = operation(self.module, node)
        if node.op in ("placeholder", "get_attr") or name in JOINS:
            return False
        if node.name in self.facts.moves:
            return self._labels(node) is not None or name in ("chunk", "split", "unbind", "tensorsplit")
        return name in _CLOSED or repeats(self.module, node)

    def _grouped(self, wanted: Mapping[fx.Node, _Wish], shared: dict[fx.Node, fx.Node]) -> list[ActivationEdges]:
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in sorted(wanted, key=self.order.__getitem__):
            groups.setdefault(_first(shared, node), []).append(node)
        made = []
        for nodes in groups.values():
            places = tuple(node for node in nodes if operation(self.module, node) not in JOINS)
            spec = max((wanted[node].spec for node in nodes), key=lambda item: item.bits)
            wishes = [wanted[place] for place in places]
            some = all(wish.in_float for wish in wishes)
            readers = frozenset(reader for wish in wishes for reader in wish.readers)
            if places:
                made.append(ActivationEdges(places, spec, readers if some else None))
        return sorted(made, key=lambda edges: self.order[edges.places[0]])


def writers(value: fx.Node) -> list[fx.Node]:
    """Who writes into a value."""
    return [user for user in value.users if user.meta.get("mutates") and user.args and user.args[0] is value]


def _first(shared: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """The representative of the values that share a scale with this one."""
    while shared.get(node, node) is not node:
        node = shared[node]
    return node
