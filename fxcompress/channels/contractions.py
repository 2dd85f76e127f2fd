"""Rules for operators that sum products: matrix products and convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from fxcompress.channels.labels import Labels, aligned, column_of, dims_of
from fxcompress.channels.ledger import Ledger
from fxcompress.channels.rules import Call, join, meet


def contract(
    call: Call,
    left: tuple[tuple[int, ...], Sequence[Tensor]],
    right: tuple[tuple[int, ...], Sequence[Tensor]],
    summed: frozenset[int],
    consts: tuple[Labels, Labels],
    repeats: int = 1,
) -> list[Tensor]:
    """``sum over summed of left * right`` in one index space, ``repeats`` times; returns the factors that remain.

    Labels along the summed dimensions are matched between the operands and end. Where neither operand is a weight
    whose columns can be masked, the sum runs over the live channels only.
    """
    ledger = call.ledger
    ending: dict[int, Tensor] = {}
    for (_, factors), labels in zip((left, right), consts, strict=True):
        inner = [f for f in factors if not summed.isdisjoint(dims_of(f))]
        ending.update((id(factor), factor) for factor in inner)
        if labels.const and not all(other.const for other in consts):
            outer = [f for f in factors if summed.isdisjoint(dims_of(f))]
            ledger.connect(inner, outer)
            ledger.produce(outer)
    kept = join(ledger, (left, right), "it is summed with a tensor without channels of its own")
    ledger.contract(map(max, left[0], right[0]), kept, repeats)
    ledger.end(ending.values())
    weighed = any(labels.direct for labels in consts)
    if ending and not weighed:
        ledger.live_only.add(ledger.node)
    remaining = [f for f in kept if summed.isdisjoint(dims_of(f))]
    rows: dict[tuple[int, ...], Tensor] = {}
    for factor in ending.values():
        rest = tuple(sorted(set(dims_of(factor)) - summed))
        if not rest:
            continue
        if weighed or column_of(factor) not in summed:
            ledger.pin(factor, rest, "its rows are not channels after the sum")
        elif rest in rows:
            ledger.stand_for(rows[rest], factor)
        elif any(factor is f for f in kept):
            rows[rest] = ledger.rows_along(factor, rest)
    return _with_rows(ledger, remaining, rows)


def _with_rows(ledger: Ledger, factors: Sequence[Tensor], rows: Mapping[tuple[int, ...], Tensor]) -> list[Tensor]:
    """What remains after a sum: the factors that did not end, and labels for the rows of those that did."""
    made = list(factors)
    for dims, row in rows.items():
        several = [other for more, other in rows.items() if set(dims) < set(more)]
        for other in several:  # one key head of several query heads: they go together
            ledger.stand_for(row, other)
        beside = [factor for factor in factors if not set(dims_of(factor)).isdisjoint(dims)]
        for factor in beside:
            if dims_of(factor) == dims:
                ledger.unite(factor, row)
            else:
                meet(ledger, row, factor)
        if not several and not any(set(dims) <= set(dims_of(factor)) for factor in beside):
            made.append(row)
    return made


def _spread(labels: Labels, places: Sequence[int], ndim: int) -> tuple[tuple[int, ...], list[Tensor]]:
    """A tensor's shape and factors with its dimension ``i`` put at ``places[i]`` of a space of ``ndim`` dimensions."""

    def put(shape: Sequence[int]) -> list[int]:
        sizes = [1] * ndim
        for place, size in zip(places, shape, strict=True):
            sizes[place] = size
        return sizes

    order = sorted(range(len(places)), key=lambda i: places[i])
    return tuple(put(labels.shape)), [f.permute(order).reshape(put(f.shape)) for f in labels.factors]


def _product(
    call: Call, first: str, second: str, left: Sequence[int], right: Sequence[int], summed: int
) -> list[Tensor]:
    a, b = call.labels(first), call.labels(second)
    ndim = max(*left, *right) + 1
    kept = contract(call, _spread(a, left, ndim), _spread(b, right, ndim), frozenset({summed}), (a, b))
    return [f.squeeze(summed) for f in kept]


def operands_of(call: Call) -> tuple[str, str, bool]:
    """The names of the arguments that a matrix product multiplies, and whether it adds ``self`` to the result."""
    names = [name for name in ("self", "mat1", "batch1", "mat2", "batch2", "vec", "tensor") if name in call.arguments]
    added = call.name.startswith(("add", "badd"))
    first, second = names[1:3] if added else names[:2]
    return first, second, added


def matmul(call: Call) -> Labels:
    """``mm``, ``bmm``, ``mv``, ``dot`` and their forms with an added bias."""
    first, second, added = operands_of(call)
    batched = call.arguments[first].dim() == 3
    shapes = call.arguments[first].dim(), call.arguments[second].dim()
    if batched:
        factors = _product(call, first, second, (0, 1, 2), (0, 2, 3), 2)
    elif shapes == (2, 2):
        factors = _product(call, first, second, (0, 1), (1, 2), 1)
    else:
        factors = _product(call, first, second, (0, 1) if shapes[0] == 2 else (0,), (shapes[0] - 1,), shapes[0] - 1)
    made = call.made(factors)
    if not added:
        return made
    bias = call.labels("self")
    ndim = call.result.dim()
    shape = (1,) * (ndim - len(bias.shape)) + bias.shape
    operands = ((made.shape, made.factors), (shape, [aligned(f, ndim) for f in bias.factors]))
    return call.made(join(call.ledger, operands, "its bias has no channels of its own"))


def convolution(call: Call) -> Labels:
    """Convolutions of every kind; a depthwise one is pointwise in its channels, a grouped one keeps rows apart."""
    ledger, groups = call.ledger, call.arguments["groups"]
    x, w = call.labels("input"), call.labels("weight")
    channel = 1
    entering, weighing = ([(f, dims_of(f)) for f in labels.factors] for labels in (x, w))
    through = [f for f, dims in entering if _untouched(call).issuperset(dims)]
    spatial = [f for f, dims in entering if max(dims) > channel and not any(f is other for other in through)]
    for factor in spatial:
        _tie_positions(ledger, factor, channel)
    inputs = [_at(f, channel) for f in spatial] + [f for f, dims in entering if dims == (channel,)]
    inputs = [f.reshape(-1) for f in inputs if f.shape[channel] > 1]
    ledger.freeze([f for f, dims in entering if 0 in dims], "it lies in the batch dimension")
    ledger.freeze([f for f, dims in weighing if max(dims) > 1], "it is a kernel position")
    rows = [f.reshape(-1) for f, dims in weighing if dims == (0,)]
    columns = [f.reshape(-1) for f, dims in weighing if dims == (1,)]
    columns += [f.reshape(w.shape[:2]) for f, dims in weighing if dims == (0, 1)]
    if call.arguments["transposed"]:
        out = _transposed(call, x, w, inputs, rows, columns, groups)
    elif groups == 1:
        out = _plain(call, x, w, inputs, rows, columns, through)
    else:
        out = _grouped(call, x, w, inputs, rows, columns, groups)
    bias = call.arguments.get("bias")
    if bias is not None and call.of(bias).factors:
        for factor in out:
            ledger.unite(factor, call.of(bias).factors[0])
    shape = [1, -1] + [1] * (call.result.dim() - 2)
    return call.made([*(f.reshape(shape) for f in out), *through])


def _untouched(call: Call) -> frozenset[int]:
    """Spatial dimensions along which every place of the result is made of the same place of the input."""
    arguments = call.arguments
    if arguments["transposed"] or arguments["groups"] > 1:
        return frozenset()
    sizes = arguments["weight"].shape[2:]
    steps, pads = (
        list(arguments[name]) * (1 if len(arguments[name]) > 1 else len(sizes)) for name in ("stride", "padding")
    )
    return frozenset(2 + i for i, size in enumerate(sizes) if size == steps[i] == 1 and not pads[i])


def _at(factor: Tensor, dim: int) -> Tensor:
    for other in range(factor.dim()):
        if other != dim:
            factor = factor.narrow(other, 0, 1)
    return factor


def _tie_positions(ledger: Ledger, factor: Tensor, channel: int) -> None:
    """A kernel slides over positions: channels that differ from position to position are tied."""
    if factor.shape[channel] == 1:
        ledger.freeze([factor], "it lies in a spatial dimension")
    else:
        ledger.unite(factor, _at(factor, channel))


def _one(call: Call, factors: list[Tensor]) -> Tensor | None:
    """The factor of a dimension, others on the same dimension tied to it."""
    for other in factors[1:]:
        for factor in factors[:1]:
            call.ledger.unite(factor.reshape(-1, 1) if factor.dim() == 1 and other.dim() == 2 else factor, other)
    return factors[0] if factors else None


def _positions(tensor: Tensor) -> int:
    """At how many places of a tensor [N, C, *space] a kernel is laid."""
    return tensor.shape[0] * math.prod(tensor.shape[2:])


def _plain(
    call: Call,
    x: Labels,
    w: Labels,
    inputs: list[Tensor],
    rows: list[Tensor],
    columns: list[Tensor],
    through: list[Tensor],
) -> list[Tensor]:
    """In a space (outputs, inputs, *space), of which dimensions without channels are counted as repeats."""
    counted = {d for f in through for d in dims_of(f)}
    space = tuple(size if d in counted else 1 for d, size in enumerate(call.result.shape) if d > 1)
    flat = (1,) * len(space)
    a, b = (
        ((1, x.shape[1], *space), [f.reshape(1, -1, *flat) for f in inputs] + through),
        (
            (*w.shape[:2], *flat),
            [f.reshape(1, -1, *flat) for f in columns] + [f.reshape(-1, 1, *flat) for f in rows],
        ),
    )
    repeats = _positions(call.result) * math.prod(w.shape[2:]) // math.prod(space)
    made = contract(call, a, b, frozenset({1}), (x, w), repeats)
    return [f.reshape(-1) for f in made if dims_of(f) == (0,)]


def _transposed(
    call: Call,
    x: Labels,
    w: Labels,
    inputs: list[Tensor],
    rows: list[Tensor],
    columns: list[Tensor],
    groups: int,
) -> list[Tensor]:
    """The weight is (inputs, outputs / groups, ...): its rows consume and its columns produce."""
    repeats = _positions(call.arguments["input"]) * math.prod(w.shape[2:])
    if groups == 1:
        a = ((x.shape[1], 1), [f.reshape(-1, 1) for f in inputs])
        b = (w.shape[:2], [f.reshape(-1, 1) for f in rows] + [f.reshape(1, -1) for f in columns])
        return [f.reshape(-1) for f in contract(call, a, b, frozenset({0}), (x, w), repeats)]
    ledger, each = call.ledger, w.shape[1]
    entering, consumed = _one(call, inputs), _one(call, rows)
    if entering is None or consumed is None:
        ledger.freeze([*inputs, *rows, *columns], "its input has no channels of its own")
        ledger.contract(w.shape[:2], [], repeats)
        return []
    ledger.unite(entering, consumed)
    if w.shape[0] == groups:  # depthwise: every input makes outputs of its own, which go with it
        ledger.freeze(columns, "which of the outputs of one channel it makes")
        if w.const:
            ledger.produce([consumed])
        ledger.contract(w.shape[:2], [consumed.reshape(-1, 1)], repeats)
        return [consumed.repeat_interleave(each)]
    made = _made_by_groups(call, w, columns, groups)
    if made is None:
        ledger.freeze([entering, *columns], "the weight of a grouped transposed convolution is computed")
        ledger.contract(w.shape[:2], [], repeats)
        return []
    out = made[:: w.shape[0] // groups].reshape(-1)  # the rows of one group make the same outputs
    if each == 1:
        ledger.freeze([out], "the only output of its convolution group")
    else:
        ledger.divide(out, groups, pinned=(0,))
    ledger.divide(entering, groups, pinned=(0,))
    ledger.connect([entering], [out])
    ledger.end([entering])
    ledger.contract(w.shape[:2], [consumed.reshape(-1, 1), *([made] if each > 1 else [])], repeats)
    return [out]


def _made_by_groups(call: Call, w: Labels, columns: list[Tensor], groups: int) -> Tensor | None:
    """Which output each element of a grouped transposed weight adds to: labels (inputs, outputs / groups).

    The outputs have no axis of their own in the weight: they get one, as if its groups lay side by side. None where the
    weight is no parameter.
    """
    ledger, weight = call.ledger, call.arguments["weight"]
    inputs, each = w.shape[:2]
    known = [column for column in columns if column.dim() == 2]
    if known:  # the weight has been used before
        rows = known[0].reshape(groups, inputs // groups, each)
        ledger.unite(rows, rows[:, :1])
        ledger.produce([rows[:, 0]])
        return known[0]
    name = call.name_of(weight)
    if name is None or not (w.direct and w.const):
        return None
    out = ledger.fresh_axis(name, 1, groups * each, "parameter")
    made = out.reshape(groups, each).repeat_interleave(inputs // groups, 0)
    ledger.produce([out])
    if each > 1:
        kept = tuple(f for f in w.factors if dims_of(f) != (1,))
        mine = made.reshape(tuple(made.shape) + (1,) * (weight.dim() - 2))
        call.relabel(weight, Labels(w.shape, (*kept, mine), w.const, w.direct, row_dims=frozenset({0})))
    return made


def _grouped(
    call: Call,
    x: Labels,
    w: Labels,
    inputs: list[Tensor],
    rows: list[Tensor],
    columns: list[Tensor],
    groups: int,
) -> list[Tensor]:
    ledger = call.ledger
    entering, out = _one(call, inputs), _one(call, rows)
    if out is None:
        ledger.freeze([*inputs, *columns], "a grouped convolution with one output")
        return []
    if w.const:
        ledger.produce([out])
    repeats = _positions(call.result) * math.prod(w.shape[2:])
    per_group = out.reshape(groups, -1)
    if w.shape[1] == 1:  # depthwise
        if entering is None:
            ledger.freeze([out], "its input has no channels of its own")
        else:
            ledger.unite(entering.reshape(groups, 1), per_group)
            if per_group.shape[1] > 1:
                ledger.constrain(per_group, rows=(0,))
        ledger.contract(w.shape[:2], [out.reshape(-1, 1)], repeats)
        return [out]
    if entering is None:
        if per_group.shape[1] == 1:
            ledger.freeze([out], "the only output of its convolution group")
        else:
            ledger.divide(out, groups, pinned=(0,))
        ledger.freeze(columns, "its input has no channels of its own")
        ledger.contract(w.shape[:2], [out.reshape(-1, 1)], repeats)
        return [out]
    ledger.connect([entering], [out])
    ledger.end([entering])
    sources = ledger.divide(entering, groups)
    whole = ledger.rows_along(sources, (0,))  # a group goes with all that enters and all that leaves it
    ledger.stand_for(whole, ledger.divide(out, groups))
    taken = sources.repeat_interleave(per_group.shape[1], 0)  # (outputs, inputs / groups)
    ledger.contract(w.shape[:2], [out.reshape(-1, 1), taken], repeats)
    for column in columns:
        if column.dim() == 2 or not _regroup(call, taken):
            ledger.unite(column if column.dim() == 2 else column.reshape(1, -1), taken)
    return [out]


def _regroup(call: Call, taken: Tensor) -> bool:
    """Let a grouped weight's columns carry the labels of the inputs that each row sees."""
    weight = call.arguments["weight"]
    labels = call.of(weight)
    if not labels.direct or not labels.const:
        return False
    mine = taken.reshape(tuple(taken.shape) + (1,) * (weight.dim() - 2))
    kept = tuple(f for f in labels.factors if dims_of(f) != (1,))
    return bool(
        call.relabel(weight, Labels(labels.shape, (*kept, mine), labels.const, labels.direct, row_dims=frozenset({0})))
    )
