"""How sparse a model is: measured on its tensors and masks, per parameter, per layer and in total."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor, nn

from fxcompress.errors import InputError
from fxcompress.masking import masks
from fxcompress.text import as_text


@dataclass(frozen=True)
class Count:
    """Elements of some parameters.

    Attributes:
        elements: how many there are (in the dense model, if it was given).
        gone: how many of them are masked, are zeros of a weight, or are no longer there.
    """

    elements: int
    gone: int

    @property
    def sparsity(self) -> float:
        """The fraction that is gone; 0 of nothing."""
        return self.gone / self.elements if self.elements else 0.0


class Sparsities(Mapping[str, float]):
    """The fraction of every parameter and layer that is gone, by name; :attr:`total` of all. Prints as a table.

    Attributes:
        parameters: the counts by parameter.
        layers: those of all parameters of a module together, by the module's name.
    """

    def __init__(self, parameters: Mapping[str, Count]) -> None:
        self.parameters = dict(parameters)
        self.layers: dict[str, Count] = {}
        for name, count in self.parameters.items():
            layer = name.rpartition(".")[0]
            before = self.layers.get(layer, Count(0, 0))
            self.layers[layer] = Count(before.elements + count.elements, before.gone + count.gone)

    @property
    def total(self) -> float:
        """The fraction of all parameters that is gone."""
        counts = self.parameters.values()
        return Count(sum(c.elements for c in counts), sum(c.gone for c in counts)).sparsity

    def __getitem__(self, name: str) -> float:
        found = self.parameters.get(name) or self.layers.get(name)
        if found is None:
            raise KeyError(f"{name!r} is no parameter and no layer with parameters of its own")
        return found.sparsity

    def __iter__(self) -> Iterator[str]:
        return iter([*self.parameters, *(name for name in self.layers if name not in self.parameters)])

    def __len__(self) -> int:
        return len({*self.parameters, *self.layers})

    def __rich__(self) -> Table:
        table = Table(title=f"{self.total:.1%} of the parameters are gone")
        for column in ("layer", "parameters", "gone", "sparsity"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name, count in self.layers.items():
            table.add_row(name, f"{count.elements:,}", f"{count.gone:,}", f"{count.sparsity:.1%}")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def sparsity(module: nn.Module, dense: nn.Module | None = None) -> Sparsities:
    """How sparse a model is, measured.

    An element counts as gone if a mask removes it, or if it is a zero of a weight (a parameter of two or more
    dimensions): masks that ``Speedup`` multiplied in are such zeros. Zeros of biases and norms are values like any
    other. Tied parameters count once. Channels that were removed leave no trace in a model: they count only in
    comparison with the dense one.

    Args:
        module: any model; masks are known of those that fxcompress made.
        dense: the model that it was made of. Elements that it has and ``module`` has not count as gone, and what
            ``module`` alone has (a bias that was added) does not count.

    Raises:
        InputError: a parameter of ``module`` is larger than that of ``dense``, so that it was not made of it.
    """
    found = masks(module)
    here = {name: _count(parameter, found.get(name)) for name, parameter in module.named_parameters()}
    if dense is None:
        return Sparsities(here)
    made = {}
    for name, parameter in dense.named_parameters():
        whole, left = parameter.numel(), here.get(name, Count(0, 0))
        if left.elements > whole:
            raise InputError(
                f"{name} has {left.elements} elements, and {whole} in the dense model; expected at most as many. Give "
                "the model that this one was made of."
            )
        made[name] = Count(whole, whole - left.elements + left.gone)
    return Sparsities(made)


def _count(parameter: Tensor, mask: Tensor | None) -> Count:
    gone = parameter.detach() == 0
    if parameter.dim() < 2:
        gone = gone.new_zeros(gone.shape)
    if mask is not None:
        gone = gone | ~mask.to(gone.device)
    return Count(parameter.numel(), int(gone.sum()))
