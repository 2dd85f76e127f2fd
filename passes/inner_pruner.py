"""A pruner inside another pass, which says how much it takes, and when."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from fxcompress.context import Context
from fxcompress.errors import InputError, PassError
from fxcompress.module import TracedModule
from fxcompress.pipeline import Pass
from fxcompress.task import Need

#: What a pass needs that trains.
TRAINING: tuple[Need, ...] = ("batches", "loss", "optimizer")


def require_pruner(inner: Any, who: str, *, scaled: bool = True) -> None:
    """Raise :class:`InputError` unless ``inner`` is a pruner (``scaled``: whose sparsity can be changed)."""
    expected = f"expected a pruner, such as {who}(L1FilterPruner(0.5))"
    if isinstance(inner, type) and issubclass(inner, Pass):
        raise InputError(f"inner is the class {inner.__name__}; {expected}.")
    if not isinstance(inner, Pass):
        raise InputError(f"inner is {inner!r}, a {type(inner).__name__}; {expected}.")
    if "sparsity" not in {field.name for field in dataclasses.fields(inner)}:
        raise InputError(f"inner is {inner!r}, which has no sparsity; {expected}.")
    if scaled and getattr(inner, "sparsity", None) is None:
        raise InputError(
            f"inner is {inner!r}, whose sparsity is not given, so that {who} cannot lead up to it; expected a fraction "
            "or a mapping of pattern to fraction. A fixed pattern, or an inner pruner's, is masked at once: run that "
            "pass on its own."
        )


class AroundPruner(Pass):
    """A pass that trains a module and lets a pruner mask it."""

    lifts: ClassVar[bool] = True

    @property
    @abstractmethod
    def pruner(self) -> Pass:
        """What masks."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What training needs, and the pruner."""
        return tuple(dict.fromkeys((*TRAINING, *self.pruner.needs)))

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]  # it depends on the pruner
        """Whether the pruner looks at channels."""
        return self.pruner.needs_inputs

    def requires(self, module: TracedModule, context: Context) -> None:
        """Raise if training or the pruner cannot run."""
        super().requires(module, context)
        self.pruner.requires(module, context)


def sparsities_of(inner: Pass) -> tuple[float, ...]:
    """The sparsities that a pruner was given: one, or those of a mapping."""
    given: Any = getattr(inner, "sparsity", None)
    return tuple(given.values()) if isinstance(given, Mapping) else (given,)


def with_sparsity(inner: Pass, change: Callable[[float], float]) -> Pass:
    """The pruner with each of its sparsities changed."""
    pruner: Any = inner  # that it has a sparsity was checked
    given = pruner.sparsity
    made = {pattern: change(of) for pattern, of in given.items()} if isinstance(given, Mapping) else change(given)
    changed: Pass = dataclasses.replace(pruner, sparsity=made)
    return changed


def prune(inner: Pass, module: TracedModule, context: Context) -> None:
    """Run a pruner on a module whose masks are lifted, in place.

    Raises:
        PassError: it returned another module.
    """
    if inner.lifts:
        result = inner.run(module, context)
    else:
        with context.laid(module, inner.name):
            result = inner.run(module, context)
    if result is not module:
        raise PassError(f"{inner.name} returned another module; expected a pruner that masks the one it is given.")
    inner.ensures(module, context)
