"""Example inputs: a tensor, a tuple, or a dict of keyword arguments, parsed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxcompress.errors import InputError
from fxcompress.module import state_of


@dataclass(frozen=True)
class Inputs:
    """One call of a model: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, example_inputs: Any) -> Inputs:
        """What a user passes as ``example_inputs=``.

        Raises:
            InputError: neither tensor, tuple, list nor dict, or without a single tensor in it.
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,))
        if isinstance(example_inputs, (tuple, list)):
            made = cls(tuple(example_inputs))
        elif isinstance(example_inputs, dict) and all(isinstance(key, str) for key in example_inputs):
            made = cls((), dict(example_inputs))
        else:
            raise InputError(
                f"example_inputs is a {type(example_inputs).__name__}; expected a tensor, a tuple of the forward's "
                "positional arguments, or a dict of its keyword arguments."
            )
        values = pytree.tree_leaves((made.args, made.kwargs), is_leaf=lambda item: isinstance(item, PackedSequence))
        if any(isinstance(value, PackedSequence) for value in values):
            raise InputError(
                "example_inputs hold a PackedSequence, whose lengths decide what happens next; expected tensors. Give "
                "the model padded sequences and their lengths, and let a submodule pack them, run its layers and "
                "unpack them (pack_padded_sequence, pad_packed_sequence): it stays as it is, unpruned."
            )
        if not any(True for _ in made.tensors()):
            raise InputError("example_inputs holds no tensor; give the model something to run on.")
        return made

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor in the inputs, in order."""
        return (leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor))

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same inputs with ``function`` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def run(self, model: Callable[..., Any]) -> Any:
        """``model`` applied to fresh copies of these inputs, so that a forward that writes in place spoils nothing."""
        fresh = self.map(Tensor.clone)
        return model(*fresh.args, **fresh.kwargs)

    @property
    def batch(self) -> int:
        """Size of dimension 0 of the first tensor that has one: the batch size, if the inputs are batched."""
        return next((tensor.shape[0] for tensor in self.tensors() if tensor.dim()), 1)

    def sample(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of a sample: without dimension 0 where that is the batch."""
        batch = self.batch
        shapes = [tuple(tensor.shape) for tensor in self.tensors()]
        return tuple(shape[1:] if shape[:1] == (batch,) else shape for shape in shapes)

    def rebatched(self, batch: int) -> Inputs:
        """The inputs at another batch size: rows repeated, floating ones scaled so that no two rows are equal."""
        old = self.batch
        generator = torch.Generator().manual_seed(batch)

        def resize(tensor: Tensor) -> Tensor:
            if not tensor.dim() or tensor.shape[0] != old:
                return tensor
            rows = tensor[torch.arange(batch, device=tensor.device) % max(old, 1)]
            if not tensor.is_floating_point():
                return rows
            scale = 0.5 + torch.rand((batch, *[1] * (tensor.dim() - 1)), generator=generator)
            return rows * scale.to(rows)

        return self.map(resize)

    def shapes(self) -> str:
        """The shapes, for messages."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors())


def positional(module: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """The inputs in the order of a graph's placeholders."""
    rest = [node for node in module.graph.nodes if node.op == "placeholder"][len(inputs.args) :]
    named = [inputs.kwargs[node.target] if node.target in inputs.kwargs else node.args[0] for node in rest]
    return [*inputs.args, *named]


def other_batch(batch: int) -> int:
    """A second batch size that no size in the model is likely to equal by scaling."""
    return 3 if batch == 1 else batch + 1


def check_devices(model: nn.Module, inputs: Inputs) -> None:
    """Raise :class:`InputError` unless the model's tensors and the inputs are on one device."""
    expected = {tensor.device for tensor in inputs.tensors()}
    for name, tensor in state_of(model).items():
        if tensor.device not in expected:
            found = ", ".join(sorted(map(str, expected)))
            raise InputError(
                f"{name} is on {tensor.device} and the example inputs are on {found}; expected one device for all. "
                f"Move them together, for example with inputs.to('{tensor.device}')."
            )


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor in a nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return (value,)
    if type(value) in (tuple, list):  # most calls; pytree takes its time
        return [tensor for item in value if type(item) not in _PLAIN for tensor in tensors_in(item)]
    if not value and type(value) is dict:
        return ()
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))
