"""Fake-quant nodes: modules under ``_quant.`` whose output lies on the grid of their spec (design 6)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import GraphError, PassError
from fxcompress.module import submodule
from fxcompress.processes import widest
from fxcompress.quantization.observers import extremes
from fxcompress.quantization.spec import SMALLEST_STEP, Grid, QuantSpec
from fxcompress.rewrite import describe

QUANT = "_quant"
#: ``node.meta`` of a fake-quant node: its role.
ROLE = "quant"
#: In steps: the end of a range, divided by the scale in float32, may come out as slightly more than the last integer.
_SLACK = 1e-3
#: A smaller factor is as good as none: what it folds is zero.
_SMALLEST = 1e-12


class FakeQuantize(nn.Module, ABC):
    """Rounds a tensor to the grid of a spec, with the straight-through gradient: 1 inside the range, 0 outside.

    Whoever lowers a graph reads ``spec``, :meth:`grid` and :meth:`integers`, and nothing else.

    Attributes:
        spec: the grid and how its range is found.
        calls: at how many nodes the module is called in one forward (more than one where scales are shared).
        keeps_zero: zero lies on the grid: what is masked in front stays zero behind.
        observing: ranges follow what goes by in train mode. In eval mode they never change.
        quantizing: values are rounded; without, they pass as they are.
    """

    def __init__(self, spec: QuantSpec, *, calls: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.calls = calls
        self.keeps_zero = True
        self.observing = True
        self.quantizing = True

    def grid(self) -> Grid | None:
        """Scale and zero point now, detached; None where values do not lie on one fixed grid."""
        return None

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """``x`` on the grid."""

    def observe(self, x: Tensor, place: int) -> None:
        """See a tensor go by in train mode; nothing by default."""

    def forward(self, x: Tensor, factor: Tensor | None = None, place: int = 0) -> Tensor:
        """``x`` on the grid; with a ``factor``, ``quantize(x * factor) / factor``.

        Args:
            x: a weight (behind its mask) or an activation.
            factor: broadcastable to ``x``; what a BatchNorm that is to be folded multiplies the weight with. The grid
                is that of the folded weight.
            place: which of the nodes that share the module this is, counted in the order of the graph.
        """
        if factor is not None:  # a channel that BatchNorm multiplies with zero is zero on any grid
            factor = torch.where(factor.abs() < _SMALLEST, _SMALLEST, factor)
        scaled = x if factor is None else x * factor
        if self.training and self.observing:
            self.observe(scaled.detach(), place)
        if not self.quantizing:
            return x
        made = self.quantize(scaled)
        return made if factor is None else made / factor

    def integers(self, x: Tensor) -> Tensor:
        """What an integer kernel is given for ``x``: int32, ``quantize(x) / scale + zero_point``.

        Raises:
            GraphError: there is no grid.
        """
        grid = self.grid()
        if grid is None:
            raise GraphError(f"the values of {self} lie on no fixed grid, so that there are no integers for them.")
        scale, zero_point = grid
        scale, zero_point = (along(item, x, self.spec.axis) for item in (scale, zero_point))
        with torch.no_grad():
            return (self.quantize(x) / scale).round().to(torch.int32) + zero_point

    def agree(self) -> None:
        """Called after channels were removed from the tensors: what is remembered per channel follows them."""

    def extra_repr(self) -> str:
        """The spec in a line."""
        spec = self.spec
        kind = "symmetric" if spec.symmetric else "affine"
        where = "per tensor" if spec.axis is None else f"per index of dimension {spec.axis}"
        return f"{spec.role}, {spec.bits} bits [{spec.quant_min}, {spec.quant_max}], {kind}, {where}"


class AffineFakeQuantize(FakeQuantize):
    """``clamp(round(x / scale) + zero_point, quant_min, quant_max)``, minus the zero point, times the scale.

    Buffers ``scale``, ``zero_point`` and ``seen``, the number of forwards of the model in train mode; with a running
    observer of activations also ``low`` and ``high``, the range. Where several nodes share the module, what they see in
    one forward is one batch: ``earlier`` is the range before it, ``batch`` its extremes so far, and ``last`` the node
    that was called last. A forward begins with a node that does not come behind that one.

    Args:
        spec: the grid.
        channels: length of the spec's axis; 0 per tensor.
        calls: at how many nodes it is called.
        start_step: in train mode, values pass as they are for this many steps (forwards of the model).
        freeze_step: after this many steps ranges no longer change.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    seen: Tensor
    last: Tensor
    earlier: Tensor
    batch: Tensor

    def __init__(
        self, spec: QuantSpec, channels: int = 0, *, calls: int = 1, start_step: int = 0, freeze_step: int | None = None
    ) -> None:
        super().__init__(spec, calls=calls)
        self.start_step, self.freeze_step = start_step, freeze_step
        shape = (channels,) if spec.axis is not None else ()
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape))  # an integer, in a dtype that has channels
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        if calls > 1:
            self.register_buffer("last", torch.full((), calls, dtype=torch.int64))
        if self.remembers:
            nothing = torch.full(shape, torch.inf)
            self.register_buffer("low", nothing)
            self.register_buffer("high", -nothing)
            if calls > 1:
                self.register_buffer("earlier", torch.stack((nothing, -nothing)))
                self.register_buffer("batch", torch.stack((nothing, -nothing)))

    @property
    def remembers(self) -> bool:
        """Whether a range depends on earlier batches; that of a weight is always the current one."""
        return self.spec.observer is not None and self.spec.observer.running and self.spec.role == "activation"

    def grid(self) -> Grid:
        return Grid(self.scale.detach(), self.zero_point.to(torch.int32))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take a range that was found elsewhere."""
        scale, zero_point = self.spec.grid(low, high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def observe(self, x: Tensor, place: int) -> None:
        begins = None
        if self.calls > 1:
            begins = self.last >= place
            self.last.fill_(place)
        self.seen += 1 if begins is None else begins
        if self.spec.observer is None or not self.spec.observer.running or not (self.remembers or x.numel()):
            return
        going = None if self.freeze_step is None else self.seen <= self.freeze_step
        if self.remembers:
            low, high = self._remembered(x, begins, going)
        else:
            low, high = (item.to(self.scale.dtype) for item in extremes(x, self.spec.axis))
        scale, zero_point = self.spec.grid(low, high)
        known = low <= high if self.remembers else None  # an empty range, of which nothing was seen yet, says nothing
        for buffer, value in ((self.scale, scale), (self.zero_point, zero_point)):
            _update(buffer, value, going, known)

    def _remembered(self, x: Tensor, begins: Tensor | None, going: Tensor | None) -> tuple[Tensor, Tensor]:
        """The range with one batch more; the first one sets it, and one that is not finite is passed over."""
        low, high = torch.full_like(self.low, torch.inf), torch.full_like(self.high, -torch.inf)
        if x.numel():
            lowest, highest = (item.to(low.dtype) for item in extremes(x, self.spec.axis))
            fine = torch.isfinite(lowest) & torch.isfinite(highest)
            low, high = torch.where(fine, lowest, low), torch.where(fine, highest, high)
        low, high = widest(low, high)  # of all processes: every one has its part of the batch
        before = torch.stack((self.low, self.high))
        if begins is not None:
            before = torch.where(begins, before, self.earlier)
            low = torch.where(begins, low, torch.minimum(self.batch[0], low))
            high = torch.where(begins, high, torch.maximum(self.batch[1], high))
            _update(self.earlier, before, going)
            _update(self.batch, torch.stack((low, high)), going)
        assert self.spec.observer is not None
        first, nothing, seen = before[0] > before[1], low > high, torch.stack((low, high))
        followed = self.spec.observer.follow(torch.where(first, seen, before), seen)
        low, high = torch.where(first, seen, torch.where(nothing, before, followed))
        _update(self.low, low, going)
        _update(self.high, high, going)
        return low, high

    def quantize(self, x: Tensor) -> Tensor:
        made = quantize(x, self.scale, self.zero_point, self.spec)
        if self.training and self.start_step:
            return torch.where(self.seen > self.start_step, made, x)
        return made

    def agree(self) -> None:
        """What was remembered of each channel becomes what its scale and zero point stand for."""
        if self.remembers and self.low.shape != self.scale.shape:
            self.low = (self.spec.quant_min - self.zero_point) * self.scale
            self.high = (self.spec.quant_max - self.zero_point) * self.scale


def _update(buffer: Tensor, value: Tensor, *conditions: Tensor | None) -> None:
    """Write a value, where all conditions hold; None always does."""
    value = value.to(buffer.dtype)
    for condition in conditions:
        if condition is not None:
            value = torch.where(condition, value, buffer)
    buffer.copy_(value)


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """One value for each index of a dimension, broadcastable to ``x``."""
    if axis is None:
        return values
    return values.reshape([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``x`` on a grid that does not learn; straight-through inside the range, no gradient outside."""
    scale = along(scale, x, spec.axis)
    zero_point = along(zero_point, x, spec.axis)
    result: Tensor = _Round.apply(x, scale, spec.quant_min - zero_point, spec.quant_max - zero_point)
    return result


class _Round(torch.autograd.Function):
    """Rounding to multiples of ``scale`` between ``low`` and ``high`` steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        steps = x / scale
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((steps >= low - _SLACK) & (steps <= high + _SLACK))
        return (steps.round().clamp(low, high) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class LearnedFakeQuantize(FakeQuantize):
    """The same grid with a step that is learned (LSQ, Esser et al. 2020, arXiv 1902.08153, equations 1 to 5).

    Parameter ``scale``; where the spec is affine also ``offset``, the value that integer 0 would stand for, from which
    the zero point follows as ``round(quant_min - offset / scale)`` (LSQ+, Bhalgat et al. 2020, arXiv 2004.09576,
    equations 3 to 5; rounded, so that zero stays exact). Both gradients are scaled by ``1 / sqrt(numel * quant_max)``.

    Args:
        spec: the grid.
        scale: where learning starts, positive: 0-d, or ``[channels]`` along the spec's axis.
        offset: likewise; for an affine spec.
        calls: at how many nodes it is called.
    """

    def __init__(self, spec: QuantSpec, scale: Tensor, offset: Tensor | None = None, *, calls: int = 1) -> None:
        super().__init__(spec, calls=calls)
        self.scale = nn.Parameter(scale.detach().clone())
        self.offset = (
            None
            if spec.symmetric
            else nn.Parameter(torch.zeros_like(scale) if offset is None else offset.detach().clone())
        )

    def grid(self) -> Grid:
        scale = self.scale.detach().abs().clamp(min=SMALLEST_STEP)
        if self.offset is None:
            return Grid(scale, torch.zeros_like(scale, dtype=torch.int32))
        spec = self.spec
        zero_point = (spec.quant_min - self.offset.detach() / scale).round().clamp(spec.quant_min, spec.quant_max)
        return Grid(scale, zero_point.to(torch.int32))

    def quantize(self, x: Tensor) -> Tensor:
        scale, zero_point = (along(item, x, self.spec.axis) for item in self.grid())
        step = along(self.scale, x, self.spec.axis)
        offset = torch.zeros_like(step) if self.offset is None else along(self.offset, x, self.spec.axis)
        result: Tensor = _LearnedRound.apply(x, step, offset, scale, zero_point, self.spec)
        return result


class _LearnedRound(torch.autograd.Function):
    """Rounding whose step and offset have gradients; ``scale`` and ``zero_point`` are what they stand for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec
    ) -> Tensor:
        ctx.save_for_backward(x, step, scale, zero_point)
        ctx.spec = spec
        low, high = (end - zero_point for end in (spec.quant_min, spec.quant_max))
        steps = x / scale
        return (steps.round().clamp(low.to(steps.dtype), high.to(steps.dtype)) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, step, scale, zero_point = ctx.saved_tensors
        (gradient,) = gradients
        spec: QuantSpec = ctx.spec
        steps = x / scale
        below, above = steps <= spec.quant_min - zero_point, steps >= spec.quant_max - zero_point
        inside = ~(below | above)
        # Outside, the result is offset + quant_min (quant_max) * scale, counted from the offset (LSQ+, equation 4).
        of_step = torch.where(inside, steps.round() - steps, torch.where(below, spec.quant_min, spec.quant_max))
        per_step = x.numel() // step.numel()
        rate = 1 / math.sqrt(per_step * spec.quant_max)
        of_scale = (gradient * of_step).sum_to_size(step.shape) * rate * torch.where(step < 0, -1, 1)
        of_offset = (gradient * ~inside).sum_to_size(step.shape) * rate
        return gradient * inside, of_scale, of_offset, None, None, None


class Quantizing(Protocol):
    """A rule of one's own: what :class:`TransformedFakeQuantize` calls."""

    #: ``quantize`` is differentiable as its author wants it; otherwise the gradient is 1 everywhere.
    own_gradient: ClassVar[bool]

    def quantize(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """``x`` on a grid of the spec's bits."""
        ...

    def step(self, x: Tensor, spec: QuantSpec) -> Tensor | None:
        """The distance of neighbouring values on the grid of a weight ``x``, 0-d or per channel; None if irregular."""
        ...


class TransformedFakeQuantize(FakeQuantize):
    """Values from a rule of one's own, ``quantize(x, spec)``. Of a weight, :func:`settle` makes an affine one.

    Masks are laid in front of it and behind it: zero need not be one of its values. Once a mask was multiplied into
    the weight (:func:`keep_zeros`), what is zero in front is zero behind.
    """

    def __init__(self, spec: QuantSpec, rule: Quantizing, *, calls: int = 1) -> None:
        super().__init__(spec, calls=calls)
        self.rule = rule
        self.keeps_zero = False

    def quantize(self, x: Tensor) -> Tensor:
        if self.rule.own_gradient:
            made = self.rule.quantize(x, self.spec)
        else:
            made = _StraightThrough.apply(x, self.rule, self.spec)
        return torch.where(x == 0, 0.0, made) if self.keeps_zero else made


class _StraightThrough(torch.autograd.Function):
    """A rule with gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Quantizing, spec: QuantSpec) -> Tensor:
        made = rule.quantize(x, spec)
        return made.clone() if made is x else made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


def round_through(x: Tensor) -> Tensor:
    """``x.round()`` (halves to even) with gradient 1."""
    result: Tensor = _RoundThrough.apply(x)
    return result


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def fake_quant_of(module: fx.GraphModule, node: fx.Node) -> FakeQuantize | None:
    """The fake-quant module that a node calls; None if it calls none."""
    found = submodule(module, str(node.target)) if node.op == "call_module" else None
    return found if isinstance(found, FakeQuantize) else None


def fake_quant_nodes(module: fx.GraphModule) -> list[tuple[fx.Node, FakeQuantize]]:
    """The nodes that call fake-quant modules, with these."""
    found = ((node, fake_quant_of(module, node)) for node in module.graph.nodes)
    return [(node, item) for node, item in found if item is not None]


def require_kernels(
    module: fx.GraphModule, runner: str, limit: Callable[[fx.Node, FakeQuantize, Grid], str | None]
) -> None:
    """Every fake-quant node with a fixed grid is one that 8-bit kernels can follow.

    Args:
        module: with fake-quant nodes.
        runner: whose kernels, for messages.
        limit: what it can run in place of a node, where it asks for more than 8 bits, one scale for an activation and
            zero point 0 for a weight; None if it can run that.

    Raises:
        PassError: it cannot run a spec; names the node, the spec, and what it can run.
    """
    for node, item in fake_quant_nodes(module):
        grid, spec = item.grid(), item.spec
        if grid is None:
            continue
        can = limit(node, item, grid)
        if can is None and spec.bits > 8:
            can = "at most 8 bits"
        elif can is None and spec.role == "activation" and spec.axis is not None:
            can = "one scale per activation tensor (axis=None)"
        elif can is None and spec.role == "weight" and bool((grid.zero_point != 0).any()):
            can = "weights with zero point 0 (symmetric=True)"
        if can is not None:
            raise PassError(
                f"{describe(node)} has the spec {item.extra_repr()!r}, which {runner} cannot run; it can run {can}."
            )
