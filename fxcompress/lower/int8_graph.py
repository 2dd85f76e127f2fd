"""A fake-quantized graph to integer kernels: what is read is the fake-quant nodes, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from fxcompress.inputs import Inputs
from fxcompress.lower import integers, movement
from fxcompress.lower.agreement import GRID
from fxcompress.lower.float_graph import Left, drop_idle
from fxcompress.lower.fusion import FRESH, Chain, Chains, addends, post_op
from fxcompress.lower.integers import ByteGrid
from fxcompress.lower.layers_int8 import LAYERS, LayerSite, gathered, int8_layer, sites_of, weight_only
from fxcompress.lower.naming import Names
from fxcompress.lower.prepacked import PostOp
from fxcompress.lower.quantized import QuantizedBatchNorm
from fxcompress.lower.siblings import merge_siblings
from fxcompress.lower.stem import suits
from fxcompress.lower.values import shapes_of
from fxcompress.module import TracedModule, submodule
from fxcompress.quantization.fake_quantize import QUANT, FakeQuantize, fake_quant_of, require_kernels
from fxcompress.quantization.sites import operation
from fxcompress.rewrite import Rewriter, rewriting

_BATCH_NORM = (nn.BatchNorm2d,)


def lower_int8(module: TracedModule, inputs: Inputs, author: str) -> list[str]:
    """Lower a settled, fake-quantized module in eval mode, in place; returns notes.

    A node keeps its name where its value is the same one, as integers or rounded: the simulation and the result can be
    compared node by node.

    Raises:
        PassError: there is a fake-quant node whose spec integer kernels cannot run.
    """
    dtypes = shapes_of(module, inputs)[1]
    require_kernels(module, "backend='torch'", lambda node, item, grid: _limit(dtypes.get(node.name)))
    with rewriting(module, author) as rewriter:
        drop_idle(rewriter)
    shapes, _ = shapes_of(module, inputs)
    with rewriting(module, author) as rewriter:
        work = _Lowering(rewriter, shapes)
        work.run()
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    if not any(name.startswith(f"{QUANT}.") for name in called):  # values on no regular grid stay simulated
        module._modules.pop(QUANT, None)
    return work.notes()


def _limit(dtype: torch.dtype | None) -> str | None:
    """What can run in place of values of a dtype."""
    if dtype in (None, torch.float32):
        return None
    return f"float32 values, and these are {dtype}; convert the model with .float()"


class _Lowering:
    """Goes through the graph once; a node that gives integers afterwards has its grid in ``meta``."""

    def __init__(self, rewriter: Rewriter, shapes: dict[str, tuple[int, ...]]) -> None:
        self.rewriter, self.module = rewriter, rewriter.module
        self.chains = Chains(self.module, shapes)
        self.shapes = shapes
        self.left = Left()
        self.lowered: Counter[str] = Counter()
        self.merged: list[str] = []
        self.order = {node: place for place, node in enumerate(self.module.graph.nodes)}
        self.grids: dict[fx.Node, ByteGrid] = {}  # of nodes that give integers
        self.readers: set[fx.Node] = set()  # nodes that read integers as such
        self.floats: dict[fx.Node, fx.Node] = {}
        self.pending: dict[fx.Node, list[LayerSite]] = {}  # layers, by the last node that their kernel may take over
        # Before anything is edited: a layer that is called twice gives up its weights the first time.
        self.sites = sites_of(self.module)
        self.names = Names(self.module, {node: site.x for node, site in self.sites.items()})

    def run(self) -> None:
        for node in list(self.module.graph.nodes):
            if node.graph is not self.module.graph or node._erased:
                continue
            self._visit(node)
        self._convert()
        self.merged = merge_siblings(self.rewriter)

    def notes(self) -> list[str]:
        total = sum(self.lowered[kind] for kind in LAYERS) + sum(map(len, self.left.reasons.values()))
        layers = sum(self.lowered[kind] for kind in LAYERS)
        rest = {kind: count for kind, count in self.lowered.items() if kind not in LAYERS}
        parts = ", ".join(f"{count} {kind}" for kind, count in rest.items())
        made = [f"{layers} of {total} layers run in int8" + (f", with {parts}" if parts else "")]
        made += [f"linear layers with one input became one: {', '.join(self.merged)}"] if self.merged else []
        return made + self.left.notes()

    # ---- one node ------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node in self.pending:
            for waiting in self.pending.pop(node):
                self._kernel(waiting)
            return
        if node in self.grids:
            return
        site = self.sites.get(node)
        if site is not None:
            self._layer(site)
            return
        item = fake_quant_of(self.module, node)
        if item is not None:
            if item.spec.role == "activation":
                self._rounded(node, item)
            return
        sources = movement.tensor_sources(node)
        if sources is None:
            return
        if movement.moves(self.module, node) or movement.joins(self.module, node):
            grids = {self._grid_of(source) for source in sources}
            (grid,) = grids if len(grids) == 1 else (None,)
            if grid is not None:
                self._gives(node, grid)
        elif sources[0] in self.grids:
            self._in_order(node, sources[0])

    def _grid_of(self, node: fx.Node) -> ByteGrid | None:
        return self.grids.get(node)

    def _gives(self, node: fx.Node, grid: ByteGrid) -> None:
        """From now on the node gives integers, made of integers."""
        self.grids[node] = grid
        self.readers.add(node)
        node.meta[GRID] = grid

    def _in_order(self, node: fx.Node, source: fx.Node) -> None:
        """What commutes with rounding: the larger of two values has the larger integer."""
        grid = self.grids[source]
        options = max_pool_options(self.module, node)
        if options is not None:
            self.rewriter.become(node, "call_function", integers.max_pool2d, (source, *options))
            self._gives(node, grid)
            self.lowered["max-poolings"] += 1
        elif post_op(self.module, node) == PostOp("relu") and not node.meta.get("mutates"):
            self.rewriter.become(node, "call_function", integers.at_least, (source, grid.zero_point))
            self._gives(node, grid)

    # ---- layers --------------------------------------------------------------------------------------------------

    def _layer(self, site: LayerSite) -> None:
        """A convolution, linear layer or embedding with a fake-quantized weight."""
        if site.gathers:
            gathered(self.rewriter, site, self.names.take(site.parameter))
            self.lowered["embeddings"] += 1
            return
        x_grid = self.grids.get(site.x)
        reason = site.reason or ("its input is not quantized" if x_grid is None else None)
        if reason is not None:
            weight_only(self.rewriter, site, self.names.take(site.parameter))
            self.left.add(site.name, reason)
            return
        # What is added may come after the layer: everything is decided where the result is.
        longest = self.chains.behind(site.node, unary=site.fuses, binary=_only_relu if site.adds else None)
        if longest.last is site.node:
            self._kernel(site)
        else:
            self.pending.setdefault(longest.last, []).append(site)

    def _kernel(self, site: LayerSite) -> None:
        """The integer kernel of a layer and what it takes over."""
        chain, grid = self._chain(site)
        last = chain.last
        if grid is not None:
            (last,) = last.users
        other = None if chain.other is None else self.grids.get(chain.other)
        x, image = site.x, self._image(site, [*chain.nodes, last])
        added = other if grid is not None else None
        # Where integers are added as floats, others may read these floats too.
        spends = (added is not None or other is None) and self._expendable(chain.other, last)
        layer = int8_layer(site, chain.post, self.grids[x], grid, added, spends, rounds=image is not None)
        name = self.names.take(site.parameter)
        arguments: tuple[fx.Node, ...] = (image or x,)
        if chain.other is not None:
            floats = grid is None and other is not None
            arguments += (self._float(chain.other) if floats else chain.other,)
        last.meta.pop("mutates", None)
        self.rewriter.put_module(name, layer)
        self.rewriter.become(last, "call_module", name, arguments)
        for node in reversed(chain.nodes):
            if node is not last:
                self.rewriter.erase(node)
        if image is not None:
            self.rewriter.erase(x)
            del self.grids[x]
            self.lowered.subtract(("roundings",))
        if grid is not None:
            self._gives(last, grid)
        self.readers.add(last)
        self.lowered[site.kind] += 1
        if chain.other is not None:
            self.lowered["fused additions"] += 1

    def _image(self, site: LayerSite, chain: list[fx.Node]) -> fx.Node | None:
        """The float image that a convolution rounds itself, if nobody else reads it rounded."""
        node = site.x
        if node.target is not integers.quantize or len(node.users) != 1 or site.geometry is None:
            return None
        if not suits(site.weight, site.geometry.groups, self.shapes[node.name]) or self.chains.disturbed(
            [node, *chain]
        ):
            return None
        (source, _) = node.args
        assert isinstance(source, fx.Node)
        return source

    def _chain(self, site: LayerSite) -> tuple[Chain, ByteGrid | None]:
        """What the kernel takes over, and the grid of its result; None = float32."""
        full = self.chains.behind(site.node, unary=site.fuses, binary=_only_relu if site.adds else None)
        grid = self._rounding(full)
        if full.other is not None and site.geometry is not None and (grid is None or full.other not in self.grids):
            full = self.chains.behind(site.node, unary=site.fuses)  # a convolution adds integers to integers only
            grid = self._rounding(full)
        return full, grid

    def _rounding(self, chain: Chain) -> ByteGrid | None:
        """The grid that the one reader of a chain rounds to."""
        if len(chain.last.users) != 1:
            return None
        (reader,) = chain.last.users
        item = fake_quant_of(self.module, reader)
        grid = None if item is None or movement.overwritten(self.module, reader) else item.grid()
        return None if item is None or grid is None else ByteGrid.of(item.spec, grid)

    def _expendable(self, other: fx.Node | None, at: fx.Node) -> bool:
        """Whether a value has memory of its own, and nobody reads it, or a view of it, after the node ``at``."""
        if other is None or other.op != "call_module" or movement.moves(self.module, other):
            return False
        if other not in self.grids and not isinstance(submodule(self.module, str(other.target)), FRESH):
            return False
        return all(
            self.order.get(user, -1) <= self.order[at] and not movement.moves(self.module, user) for user in other.users
        )

    # ---- fake-quant nodes of activations -------------------------------------------------------------------------

    def _rounded(self, node: fx.Node, item: FakeQuantize) -> None:
        """A fake-quant node behind something that is no layer."""
        found = item.grid()
        if found is None or movement.overwritten(self.module, node):
            return
        grid, source = ByteGrid.of(item.spec, found), node.args[0]
        assert isinstance(source, fx.Node)
        if source in self.grids:
            old = self.grids[source]
            if old == grid:
                self.rewriter.replace(node, source)
                self.rewriter.erase(node)
                return
            self.rewriter.become(node, "call_function", integers.requantize, (source, old, grid))
            self._gives(node, grid)
            self.lowered["changes of scale"] += 1
            return
        if not self._combined(node, source, grid):
            self.rewriter.become(node, "call_function", integers.quantize, (source, grid))
            self.lowered["roundings"] += 1
        self._gives(node, grid)

    def _combined(self, node: fx.Node, source: fx.Node, grid: ByteGrid) -> bool:
        """Sums, products, BatchNorm and averages of integers; False if it is none of these."""
        relu = len(source.users) == 1 and post_op(self.module, source) == PostOp("relu")
        inner = source.args[0] if relu else source
        if not isinstance(inner, fx.Node) or len(inner.users) != 1 or self.chains.disturbed([inner, source, node]):
            return False
        call = self._sum(inner, grid, relu) or (None if relu else self._product(inner, grid) or self._mean(inner, grid))
        if call is not None:
            function, arguments, kind = call
            self.rewriter.become(node, "call_function", function, arguments)
        else:
            layer = submodule(self.module, str(inner.target)) if inner.op == "call_module" else None
            data = inner.args[0] if inner.args else None
            if type(layer) not in _BATCH_NORM or not isinstance(data, fx.Node) or data not in self.grids:
                return False
            assert isinstance(layer, nn.BatchNorm2d)
            if layer.running_mean is None:
                return False
            self.rewriter.put_module(str(inner.target), QuantizedBatchNorm(layer, self.grids[data], grid, relu=relu))
            self.rewriter.become(node, "call_module", str(inner.target), (data,))
            kind = "BatchNorms"
        node.meta.pop("mutates", None)
        for old in dict.fromkeys((source, inner)):
            self.rewriter.erase(old)
        self.lowered[kind] += 1
        return True

    def _sum(self, node: fx.Node, grid: ByteGrid, relu: bool) -> tuple[object, tuple[object, ...], str] | None:
        pair = addends(node)
        if pair is None or pair[0] not in self.grids or pair[1] not in self.grids:
            return None
        if self.shapes.get(pair[0].name) != self.shapes.get(pair[1].name):
            return None
        return integers.add, (*pair, self.grids[pair[0]], self.grids[pair[1]], grid, relu), "additions"

    def _product(self, node: fx.Node, grid: ByteGrid) -> tuple[object, tuple[object, ...], str] | None:
        if operation(self.module, node) not in ("mul", "imul") or len(node.args) != 2 or node.kwargs:
            return None
        a, b = node.args
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and a in self.grids and b in self.grids):
            return None
        return integers.multiply, (a, b, self.grids[a], self.grids[b], grid), "products"

    def _mean(self, node: fx.Node, grid: ByteGrid) -> tuple[object, tuple[object, ...], str] | None:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in self.grids:
            return None
        if not averages_all(self.module, node) or len(self.shapes[source.name]) != 4:
            return None
        if self.shapes[node.name][2:] != (1, 1):
            return None
        return integers.average, (source, (2, 3), self.grids[source], grid), "averages"

    # ---- floats --------------------------------------------------------------------------------------------------

    def _float(self, node: fx.Node) -> fx.Node:
        """The values of a node that gives integers."""
        if node not in self.floats:
            arguments = (node, self.grids[node])
            self.floats[node] = self.rewriter.insert_after(node, "call_function", integers.dequantize, arguments)
            self.readers.add(self.floats[node])
        return self.floats[node]

    def _convert(self) -> None:
        """Everybody else who reads integers is given values."""
        for node in list(self.grids):
            if node.name not in self.shapes:
                continue  # several tensors: whoever picks one of them is in the table
            for user in list(node.users):
                if user not in self.readers and not movement.asks_size(user):
                    self.rewriter.read(user, node, self._float(node))


def _only_relu(post: PostOp) -> bool:
    return post.name == "relu"


def max_pool_options(module: TracedModule, node: fx.Node) -> tuple[tuple[int, int], ...] | None:
    """Kernel, stride and padding of a 2-d max-pooling without dilation that rounds sizes down, or None."""
    if operation(module, node) != "maxpool2d":
        return None
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if node.op == "call_module":
        layer = submodule(module, str(node.target))
        given = {name: getattr(layer, name) for name in names[1:]}
    else:
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("ceil_mode") or given.get("return_indices") or integers.pair_of(given.get("dilation", 1)) != (1, 1):
        return None
    kernel = integers.pair_of(given["kernel_size"])
    stride = given.get("stride")
    options = (
        kernel,
        kernel if stride in (None, []) else integers.pair_of(stride),
        integers.pair_of(given.get("padding", 0)),
    )
    return options if all(type(size) is int for pair in options for size in pair) else None


def averages_all(module: TracedModule, node: fx.Node) -> bool:
    """Whether a node takes the mean over all positions of an image and keeps their dimensions."""
    name = operation(module, node)
    if name == "adaptiveavgpool2d":
        return True
    given: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    dims = given.get("dim")
    return name == "mean" and dims in ((2, 3), [2, 3], (-2, -1), [-2, -1]) and given.get("keepdim") is True
