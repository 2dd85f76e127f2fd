"""How an ONNX model is called: which values of a call its inputs are, and how its outputs make a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.errors import InputError
from fxcompress.export.placement import Rounded

#: Dtypes and shapes that are remembered to fit.
_SEEN = 256


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among the inputs or outputs of an ONNX model."""

    index: int


def slotted(tree: Any) -> Any:
    """The same, with a :class:`Slot` for each tensor: a ``TreeSpec`` cannot be pickled without a warning."""
    places = count()
    return pytree.tree_map_only(Tensor, lambda _: Slot(next(places)), tree)


@dataclass(frozen=True)
class Signature:
    """How an ONNX model is called, and what is where in it.

    Attributes:
        given: the positional inputs, with a :class:`Slot` for each tensor, which the model takes; other values are
            written into it.
        shapes: for each of the tensors, its shape, with None where any size goes.
        dtypes: for each of the tensors.
        result: what the model returns, with a :class:`Slot` for each tensor.
        rounded: where it computes what the fake-quant nodes of activations compute, by their names.
    """

    given: tuple[Any, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    result: Any
    rounded: Mapping[str, Rounded]

    def tensors(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Those of a call, in the order of the model's inputs.

        Raises:
            InputError: a shape, a dtype, or what is no tensor, differs from what was written into the model.
        """
        tensors = list(inputs) if self._plain and all(map(_is_tensor, inputs)) else self._found(inputs)
        if torch.compiler.is_compiling():
            self._check(tensors)
            return tensors
        kinds = tuple([(tensor.dtype, tensor.shape) for tensor in tensors])
        if kinds not in self._accepted:
            self._check(tensors)
            if len(self._accepted) < _SEEN:
                self._accepted.add(kinds)
        return tensors

    def _found(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The tensors of a call with something beside them, or around them."""
        expected, structure = self._expected
        try:
            leaves = structure.flatten_up_to(tuple(inputs))
        except ValueError as error:
            raise InputError(
                f"the inputs are nested in another way than this model was written for: {error} Lower or export it "
                "with example inputs like these."
            ) from None
        pairs = list(zip(expected, leaves, strict=True))
        if any(isinstance(leaf, Tensor) != isinstance(slot, Slot) for slot, leaf in pairs) or any(
            leaf != slot for slot, leaf in pairs if not isinstance(slot, Slot)
        ):
            raise InputError(
                f"the inputs beside tensors are {_printed(leaves)}; this model was written for {_printed(expected)}, "
                "which are part of it. Lower or export it with example inputs like these."
            )
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _check(self, tensors: Sequence[Tensor]) -> None:
        dtypes = tuple(tensor.dtype for tensor in tensors)
        if dtypes != self.dtypes:
            raise InputError(
                f"the inputs are of {', '.join(map(str, dtypes))}; this model was written for "
                f"{', '.join(map(str, self.dtypes))}. Convert them, or lower or export it with example inputs like "
                "these."
            )
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if not all(map(_fits, self.shapes, shapes)):
            expected = ", ".join(str(tuple(size or "any" for size in shape)) for shape in self.shapes)
            raise InputError(
                f"the inputs have the shapes {', '.join(map(str, shapes))}; this model was written for "
                f"{expected.replace(repr('any'), 'any')}. Lower or export it with example inputs of these sizes, or "
                "use Lower(backend='torch'), which takes others."
            )

    def packed(self, outputs: Sequence[Tensor]) -> Any:
        """The result that outputs of the ONNX model make."""
        slots, structure = self._structure
        if structure.is_leaf():
            return outputs[slots[0].index]
        return pytree.tree_unflatten(
            [outputs[item.index] if isinstance(item, Slot) else item for item in slots], structure
        )

    @cached_property
    def _expected(self) -> tuple[list[Any], pytree.TreeSpec]:
        return pytree.tree_flatten(self.given)

    @cached_property
    def _plain(self) -> bool:
        """Whether a call is tensors alone."""
        return all(isinstance(item, Slot) for item in self.given)

    @cached_property
    def _structure(self) -> tuple[list[Any], pytree.TreeSpec]:
        return pytree.tree_flatten(self.result)

    @cached_property
    def _accepted(self) -> set[tuple[Any, ...]]:
        """Dtypes and shapes that were found to fit."""
        return set()

    def __getstate__(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _printed(leaves: Sequence[Any]) -> str:
    """Values, with a word for each tensor."""
    return f"({', '.join('a tensor' if isinstance(leaf, (Tensor, Slot)) else repr(leaf) for leaf in leaves)})"


def _fits(expected: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(expected) == len(shape) and all(
        size in (None, found) for size, found in zip(expected, shape, strict=True)
    )
