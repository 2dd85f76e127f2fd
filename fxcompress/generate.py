"""Small random networks for property-based tests of graph rewrites.

A `Spec` is a frozen description of a network. Decoding is total: every sublist of its operations is a valid
network, because each operation adapts to the tensor that it finds and does nothing where it cannot apply. So
a failing example shrinks to the few operations that matter. The kinds of operation are the rows of
`fxcompress.motifs.MOTIFS`.

    @given(networks())
    def test_my_rewrite_keeps_the_function(spec):
        model, example = network(spec).eval(), inputs(spec)
        torch.testing.assert_close(rewrite(model)(*example), model(*example))
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from fxcompress.motifs import MOTIFS

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Builder", "Network", "Op", "Spec", "inputs", "motifs", "network", "networks"]

T = TypeVar("T")
Tap = Literal["none", "full", "mean"]
Step: TypeAlias = "Callable[[Network, Tensor], Tensor]"
Join: TypeAlias = "Callable[[Network, Tensor, Tensor], Tensor]"

MAX_OPS = 8
MAX_CHANNELS = 48
WIDTHS = (3, 4, 5, 6, 7, 8, 12)
INPUTS = (3, 1, 4, 5)
SIDES = (6, 7, 8, 9)
VARIANTS = 12  # a multiple of 2, 3, 4 and 6, so that a motif with so many forms draws each as often
_INPUT_SEED = 0x5EED_0000  # keeps the inputs apart from the weights; torch reads the low 32 bits of a seed


@dataclass(frozen=True)
class Op:
    """One operation of a generated network.

    kind: a row of `fxcompress.motifs.MOTIFS`.
    width: the number of channels to make, where the motif has a choice.
    variant: which of its forms the motif takes, modulo their number.
    tap: also return what the operation leaves, as it is ("full") or averaged over height and width ("mean").
    """

    kind: str
    width: int = WIDTHS[0]
    variant: int = 0
    tap: Tap = "none"

    def pick(self, *choices: T) -> T:
        return choices[self.variant % len(choices)]

    def __post_init__(self) -> None:
        if self.kind not in MOTIFS:
            raise ValueError(f"Op: unknown kind {self.kind!r}; expected one of {', '.join(MOTIFS)}")
        if self.width < 1 or self.variant < 0 or self.tap not in get_args(Tap):
            raise ValueError(f"{self}: expected width >= 1, variant >= 0 and tap one of {get_args(Tap)}")


@dataclass(frozen=True)
class Spec:
    """A generated network: its operations, the seed of its weights and inputs, and the shape of its input.

    channels: of the input.
    size: (height, width) of the input, at least 2 each, so that BatchNorm can train at batch 1.
    """

    ops: tuple[Op, ...]
    seed: int = 0
    channels: int = 3
    size: tuple[int, int] = (6, 7)

    def __post_init__(self) -> None:
        if self.channels < 1 or min(self.size) < 2 or self.seed < 0:
            raise ValueError(f"{self}: expected channels >= 1, height and width >= 2, seed >= 0")


@dataclass(frozen=True)
class Line:
    """One line of a plan: what runs on which of the values so far, and whether that is an output."""

    run: Callable[..., Tensor]
    reads: tuple[int, ...]
    emits: bool


class Network(nn.Module):
    """What `network` returns: an ordinary module whose forward is straight-line code.

    forward: float32 (batch, channels, height, width) -> Tensor, or a tuple of them where there are several
    outputs; each has the batch first. Deep-copies and pickles (the plan is decoded again from the spec).
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.plan: tuple[Line, ...] = ()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        values, outputs = [x], list[Tensor]()
        for line in self.plan:
            value = line.run(self, *(values[i] for i in line.reads))
            (outputs if line.emits else values).append(value)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def __getitem__(self, name: str) -> Callable[[Tensor], Tensor]:
        """The layer of this name. Steps hold names, not modules, so that a copy runs its own."""
        return cast("Callable[[Tensor], Tensor]", getattr(self, name))

    def tensor(self, *path: str) -> Tensor:
        """The parameter or buffer at this path: `tensor("scale0")`, `tensor("conv0", "weight")`."""
        return cast("Tensor", functools.reduce(getattr, path, self))

    def extra_repr(self) -> str:
        return repr(self.spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.plan = _build(self.spec).net.plan


class Builder:
    """What a motif builds with: it registers layers under readable names and appends steps to the plan.

    Each step runs once as it is appended, on a batch of two, so that the current tensor's shape is always
    known.
    """

    def __init__(self, spec: Spec) -> None:
        self.net = Network(spec)
        self.values = list(inputs(spec))
        self.applied: set[str] = set()
        self.generator = torch.Generator().manual_seed(spec.seed)
        self._lines: list[Line] = []
        self._counts: dict[str, int] = {}
        self._ends_in_head = False

    # -- the current tensor

    @property
    def x(self) -> Tensor:
        return self.values[-1]

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[2], self.x.shape[3]

    @property
    def can_shrink(self) -> bool:
        """Whether halving leaves at least two rows and columns."""
        return min(self.size) >= 4

    @property
    def can_grow(self) -> bool:
        """Whether doubling keeps the network quick."""
        return max(self.size) <= 9

    def fits(self, channels: int) -> bool:
        return 1 <= channels <= MAX_CHANNELS

    # -- layers and parameters; each returns the name to look up in the network

    def name(self, stem: str) -> str:
        count = self._counts.get(stem, 0)
        self._counts[stem] = count + 1
        return f"{stem}{count}"

    def layer(self, stem: str, module: nn.Module) -> str:
        """Registers a layer, its parameters and statistics drawn anew."""
        for child in module.modules():
            self._randomise(child)
        name = self.name(stem)
        self.net.add_module(name, module.eval())
        return name

    def conv(self, out: int, kernel: int = 3, *, inp: int | None = None, dilation: int = 1, **options: Any) -> str:
        """A Conv2d on `inp` channels (the current ones unless given), padded to keep the size."""
        padding = dilation * (kernel // 2)
        inp = self.channels if inp is None else inp
        return self.layer("conv", nn.Conv2d(inp, out, kernel, padding=padding, dilation=dilation, **options))

    def norm(self, channels: int) -> str:
        return self.layer("norm", nn.BatchNorm2d(channels))

    def linear(self, inp: int, out: int, *, bias: bool = True) -> str:
        return self.layer("linear", nn.Linear(inp, out, bias=bias))

    def weight(self, *shape: int) -> str:
        """A parameter (out, in, ...) scaled by its fan-in."""
        return self._parameter("weight", self._spread(shape, max(1, _numel(shape[1:]))))

    def scale(self, *shape: int) -> str:
        """A parameter away from one, of either sign."""
        return self._parameter("scale", self._signed(shape))

    def bias(self, *shape: int) -> str:
        return self._parameter("bias", self._normal(shape, 0.3))

    def buffer(self, stem: str, value: Tensor) -> str:
        name = self.name(stem)
        self.net.register_buffer(name, value)
        return name

    def permutation(self, length: int) -> list[int]:
        return cast("list[int]", torch.randperm(length, generator=self.generator).tolist())

    # -- steps

    def then(self, step: Step) -> None:
        """Appends a step: the current tensor becomes its result."""
        self._append(step, (len(self.values) - 1,))

    def choose(self, op: Op, *steps: Step) -> None:
        """Appends the step that the operation's variant names."""
        self.then(op.pick(*steps))

    def join(self, past: int, step: Join) -> None:
        """Appends a step on the current tensor and on `values[past]`."""
        self._append(step, (len(self.values) - 1, past))

    def head(self, step: Step) -> None:
        """Makes the step's result an output; where nothing follows, the current tensor is none."""
        self._lines.append(Line(step, (len(self.values) - 1,), emits=True))
        self._ends_in_head = True

    def multiple(self, of: int) -> None:
        """Makes the number of channels divisible, by a convolution where it is not."""
        if self.channels % of:
            conv = self.conv(-(-self.channels // of) * of, 1)
            self.then(lambda m, x: m[conv](x))

    def decode(self, op: Op) -> None:
        before = len(self._lines)
        MOTIFS[op.kind](self, op)
        if len(self._lines) > before:
            self.applied.add(op.kind)
        if op.tap != "none":
            step: Step = (lambda m, x: x) if op.tap == "full" else (lambda m, x: x.mean((2, 3)))
            self._lines.append(Line(step, (len(self.values) - 1,), emits=True))

    def finish(self) -> None:
        if not self._ends_in_head:
            self._lines.append(Line(lambda m, x: x, (len(self.values) - 1,), emits=True))
        self.net.plan = tuple(self._lines)
        self.net.train()

    def _append(self, run: Callable[..., Tensor], reads: tuple[int, ...]) -> None:
        self._lines.append(Line(run, reads, emits=False))
        self._ends_in_head = False
        self.values.append(run(self.net, *(self.values[i] for i in reads)))

    # -- random values: everything away from its default, activations of order one

    def _parameter(self, stem: str, value: Tensor) -> str:
        name = self.name(stem)
        self.net.register_parameter(name, nn.Parameter(value))
        return name

    def _normal(self, shape: Sequence[int], std: float) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator) * std

    def _uniform(self, shape: Sequence[int], low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tuple(shape), generator=self.generator)

    def _spread(self, shape: Sequence[int], fan_in: float) -> Tensor:
        bound = (3.0 / fan_in) ** 0.5  # of unit variance; bounded, so that no small layer amplifies by much
        return self._uniform(shape, -bound, bound)

    def _signed(self, shape: Sequence[int]) -> Tensor:
        return self._uniform(shape, 0.5, 1.5) * self._normal(shape, 1.0).sign()

    def _randomise(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name:
                parameter.copy_(self._normal(parameter.shape, 0.3))
            elif parameter.ndim == 1:
                parameter.copy_(self._signed(parameter.shape))
            else:
                parameter.copy_(self._spread(parameter.shape, _fan_in(module, parameter)))
        for name, value in module.named_buffers(recurse=False):
            if name == "running_mean":
                value.copy_(self._normal(value.shape, 0.3))
            elif name == "running_var":
                value.copy_(self._uniform(value.shape, 0.5, 2.0))


def _numel(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _fan_in(module: nn.Module, weight: Tensor) -> float:
    """How many products each output sums."""
    if isinstance(module, nn.ConvTranspose2d):
        return max(1.0, weight[:, 0].numel() / module.groups / _numel(module.stride))
    return weight[0].numel()


def _build(spec: Spec) -> Builder:
    # Layers draw default values before ours: the global generator is left as it was found.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        builder = Builder(spec)
        for op in spec.ops:
            builder.decode(op)
        builder.finish()
    return builder


def network(spec: Spec) -> nn.Module:
    """The network that a spec describes, in training mode; the same spec gives the same weights."""
    return _build(spec).net


def inputs(spec: Spec, batch: int = 2) -> tuple[Tensor, ...]:
    """Example inputs: one float32 tensor (batch, channels, height, width), seeded by the spec."""
    generator = torch.Generator().manual_seed(_INPUT_SEED + spec.seed)
    return (torch.randn(batch, spec.channels, *spec.size, generator=generator, dtype=torch.float32),)


def motifs(spec: Spec) -> frozenset[str]:
    """The kinds of operation that the network really has, without those that found nothing to apply to."""
    return frozenset(_build(spec).applied)


def networks(kinds: Sequence[str] = tuple(MOTIFS), max_ops: int = MAX_OPS) -> SearchStrategy[Spec]:
    """A strategy of networks of 1 to `max_ops` operations of these kinds, each kind one step.

    Where the kinds and the length allow it, half of the networks get a convolution in front and half a head
    behind, without which the first channels are the input's and the last ones the output's: not removable.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise ImportError(
            "fxcompress.generate.networks() needs hypothesis, which fxcompress itself does not install: "
            "pip install hypothesis"
        ) from error

    op = st.builds(
        Op,
        kind=st.sampled_from(list(kinds)),
        width=st.sampled_from(WIDTHS),
        variant=st.integers(0, VARIANTS - 1),
        tap=st.sampled_from(("none", "none", "none", "none", "full", "mean")),
    )
    # `unique`, and no strategy drawn from twice: else Hypothesis follows each new example by five in which it
    # copied one part over another of its like, and a kind of operation comes in bursts or not at all.
    body = st.lists(op, min_size=1, max_size=max_ops, unique=True)
    seeds, channels = st.integers(0, 999), st.sampled_from(INPUTS)
    sizes = st.sampled_from([(height, width) for height in SIDES for width in SIDES])

    def end(kind: str) -> SearchStrategy[Op | None]:
        ops = [Op(kind, width, variant) for width in WIDTHS for variant in range(4)] if kind in kinds else []
        return st.sampled_from([None] * max(1, len(ops)) + ops)

    stems, heads = end("conv_bn_relu"), end("head")

    @st.composite
    def spec(draw: st.DrawFn) -> Spec:
        ops, first, last = draw(body), draw(stems), draw(heads)
        if first and len(ops) < max_ops:
            ops = [first, *ops]
        if last and len(ops) < max_ops:
            ops = [*ops, last]
        return Spec(tuple(ops), draw(seeds), draw(channels), draw(sizes))

    return spec()
