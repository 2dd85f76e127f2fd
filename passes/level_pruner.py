"""Unstructured pruning: the weights of smallest magnitude, element by element."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.layers import opens
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule
from fxcompress.pipeline import Pass
from fxcompress.recurrent import operator_of
from fxcompress.select import Selection, Selectors, Sparsity


@dataclass(frozen=True)
class LevelPruner(Pass):
    """Masks the elements with the smallest ``abs(w)``: exactly ``int(N * s)`` of a layer's N, ties by index.

    Han et al. 2015, "Learning both Weights and Connections", arXiv 1506.02626, section 3. Any layer with a weight of
    two or more dimensions takes part, recurrent ones with all of theirs; biases, norms and layers without a functional
    form (``nn.Bilinear``) do not. The tensors keep their shapes.

    Args:
        sparsity: fraction of elements to mask, in [0, 1), or a mapping of name pattern to fraction (the last match
            counts; unmatched layers are not pruned).
        include: name patterns, module types or predicates that choose layers; all by default.
        exclude: layers to leave alone.
        scope: ``"layer"`` or ``"global"``: one ranking over all layers, each of which keeps its best weight (or block).
        pattern: ``"n:m"``: of every m consecutive weights along the input dimension the n largest stay; the sparsity
            is then 1 - n/m and must be left out. A remainder shorter than m keeps its n largest.
        block: (rows, columns): weights, as a matrix (outputs, everything else), are masked in blocks of this shape
            scored by their mean magnitude; blocks at the border may be smaller. N counts blocks.
    """

    sparsity: float | Mapping[str, float] | None = None
    include: Selectors | None = None
    exclude: Selectors | None = None
    scope: Literal["layer", "global"] = "layer"
    pattern: str | None = None
    block: tuple[int, int] | None = None

    idempotent: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    versioned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Selection(self.include, self.exclude)
        if self.scope not in ("layer", "global"):
            raise InputError(f"scope is {self.scope!r}; expected 'layer' or 'global'.")
        if self.pattern is not None:
            self._parse_pattern()
            if self.sparsity is not None or self.block is not None or self.scope == "global":
                raise InputError("pattern fixes what is masked; leave sparsity, block and scope out.")
            return
        if self.sparsity is None:
            raise InputError("sparsity is missing: give the fraction of weights to mask, in [0, 1), or a pattern.")
        Sparsity.parse(self.sparsity)
        if self.scope == "global" and isinstance(self.sparsity, Mapping):
            raise InputError("scope='global' ranks all weights at once; expected one sparsity, found a mapping.")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise InputError(f"block is {self.block!r}; expected (rows, columns), both at least 1.")

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Choose elements and mask them."""
        masking = context.masking or Masking()
        if masking.dead:
            masking = complete(module, masking, context.groups(module).channels)
        weights, layers = self.weights(module)
        masks = self.select({name: weight.detach().abs() for name, weight in weights.items()}, layers, masking)
        joined = masking.joined({name: mask for name, mask in masks.items() if not bool(mask.all())})
        if joined != masking:
            context.masking = joined
        return module

    def weights(self, module: TracedModule) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
        """The weights that the selection takes, by name, and all layers among which it selects."""
        weights = _weights(module)
        layers = {name.rpartition(".")[0]: module.get_submodule(name.rpartition(".")[0]) for name in weights}
        chosen = Selection(self.include, self.exclude).chosen(layers)
        return {name: weight for name, weight in weights.items() if name.rpartition(".")[0] in chosen}, layers

    def select(
        self, scores: Mapping[str, Tensor], layers: Mapping[str, nn.Module], masking: Masking
    ) -> dict[str, Tensor]:
        """The masks, True = keep, without the elements that score lowest; what is masked already goes first.

        Args:
            scores: for every element of every weight; see :meth:`weights`.
            layers: see there.
            masking: what is masked already.
        """
        ranked = {}
        for name, score in scores.items():
            mask = masking.elements.get(name)
            ranked[name] = score.double()
            if mask is not None:
                ranked[name] = ranked[name].masked_fill(~mask.to(score.device), -math.inf)
        return self._masks(ranked, layers)

    def _masks(self, scores: dict[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        if self.pattern is None and self.block is None:
            return {name: ~gone for name, gone in self._lowest_of(scores, layers).items()}
        holders = {name: layers[name.rpartition(".")[0]] for name in scores}
        lines = {name: _outputs_first(score, holders[name]) for name, score in scores.items()}
        if self.pattern is not None:
            kept, of = self._parse_pattern()
            made = {name: n_of_m(line, kept, of, 1) for name, line in lines.items()}
        else:
            assert self.block is not None
            gone = self._lowest_of({name: _to_blocks(line, self.block) for name, line in lines.items()}, layers)
            made = {name: ~_from_blocks(part, lines[name].shape, self.block) for name, part in gone.items()}
        return {name: _as_stored(mask, holders[name]) for name, mask in made.items()}

    def _lowest_of(self, scores: dict[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """True for what goes: single weights or blocks, scored in tensors of any shape."""
        assert self.sparsity is not None
        wanted = Sparsity.parse(self.sparsity).sparsities(layers)
        if self.scope == "layer" or not scores:
            return {name: _lowest(score, wanted.get(name.rpartition(".")[0], 0.0)) for name, score in scores.items()}
        flat = {name: score.reshape(-1) for name, score in scores.items()}
        for name, score in flat.items():  # the best of a layer never goes; the last one of equals
            flat[name] = score.index_fill(0, len(score) - 1 - score.flip(0).argmax(), math.inf)
        ranked = torch.cat(list(flat.values()))
        count = min(int(len(ranked) * next(iter(wanted.values()), 0.0)), len(ranked) - len(flat))
        gone = torch.zeros_like(ranked, dtype=torch.bool)
        gone[ranked.argsort(stable=True)[:count]] = True
        parts = gone.split([len(score) for score in flat.values()])
        return {name: part.reshape(scores[name].shape) for name, part in zip(flat, parts, strict=True)}

    def _parse_pattern(self) -> tuple[int, int]:
        kept, _, of = str(self.pattern).partition(":")
        if not (kept.isdigit() and of.isdigit() and 0 < int(kept) <= int(of)):
            raise InputError(f"pattern is {self.pattern!r}; expected 'n:m' with 0 < n <= m, such as '2:4'.")
        return int(kept), int(of)


def _outputs_first(weight: Tensor, layer: nn.Module) -> Tensor:
    """A weight as (outputs, inputs of a group, ...), which that of a transposed convolution is not."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight
    return weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def _as_stored(weight: Tensor, layer: nn.Module) -> Tensor:
    """The inverse of :func:`_outputs_first`."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight
    return weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1).contiguous()


def n_of_m(score: Tensor, kept: int, of: int, dim: int) -> Tensor:
    """True for the ``kept`` largest of every ``of`` consecutive elements along ``dim``; ties by index."""
    along = score.movedim(dim, -1)
    short = -along.shape[-1] % of
    padded = torch.nn.functional.pad(along, (0, short), value=-math.inf)
    runs = padded.reshape(*along.shape[:-1], -1, of)
    order = runs.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(runs, dtype=torch.bool).scatter(-1, order[..., :kept], True)
    return mask.reshape(padded.shape)[..., : along.shape[-1]].movedim(-1, dim).contiguous()


def _weights(module: TracedModule) -> dict[str, Tensor]:
    """Weights of two or more dimensions that the graph uses and that can be masked, by name, in its order."""
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    holders = [name for name in called if opens(module.get_submodule(name))]
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    used = {name: None for node in holders for name, _ in module.get_submodule(node).named_parameters(node)}
    parameters = dict(module.named_parameters())
    return {
        name: parameters[name]
        for name in parameters
        if (name in used or name in read) and parameters[name].dim() > 1 and _is_weight(module, name)
    }


def _is_weight(module: TracedModule, name: str) -> bool:
    """Whether a parameter is called a weight; a recurrent layer has several (``weight_ih_l0``)."""
    path, _, leaf = name.rpartition(".")
    return name.endswith("weight") or (leaf.startswith("weight_") and bool(operator_of(module.get_submodule(path))))


def _lowest(score: Tensor, sparsity: float) -> Tensor:
    """True for the ``int(N * sparsity)`` lowest elements of a tensor, ties by index."""
    gone = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    gone[score.reshape(-1).argsort(stable=True)[: int(score.numel() * sparsity)]] = True
    return gone.reshape(score.shape)


def _to_blocks(score: Tensor, block: tuple[int, int]) -> Tensor:
    """Mean magnitude of every block of the weight as a matrix (outputs, everything else)."""
    matrix = score.flatten(1)
    padding = (0, -matrix.shape[1] % block[1], 0, -matrix.shape[0] % block[0])
    padded = torch.nn.functional.pad(matrix, padding)
    counted = torch.nn.functional.pad(torch.ones_like(matrix), padding)
    shape = (padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    return padded.reshape(shape).sum(dim=(1, 3)) / counted.reshape(shape).sum(dim=(1, 3))


def _from_blocks(gone: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """What goes of a weight of that shape, given which of its blocks do."""
    full = gone.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return full[: shape[0], : math.prod(shape[1:])].reshape(shape)
