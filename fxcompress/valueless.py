"""Running layers for the shapes of their results alone.

While a forward is recorded, what depends on the inputs decides nothing: whoever reads such a value cannot be recorded.
So the products, norms and activations inside a layer need not be computed, which is most of the time that a forward
takes; their results are memory that nobody has written to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxcompress.channels.operators import operator_name
from fxcompress.channels.stand_ins import BATCH_NORMS, PRODUCTS, SHAPE_KEEPING, fits_norm, product_shape


class Valueless(TorchDispatchMode):
    """Gives the results of operators that a layer runs on activations their shapes, and leaves their values open."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is ever compiled; guarding against that would double the price of an operator."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, inplace = operator_name(func)
        if name in PRODUCTS and not inplace:
            shape = product_shape(name, args)
            return func(*args, **(kwargs or {})) if shape is None else args[PRODUCTS[name][0]].new_empty(shape)
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not first.is_floating_point() or kwargs:
            return func(*args, **(kwargs or {}))
        if name in SHAPE_KEEPING and inplace:
            torch.autograd.graph.increment_version(first)  # the recorder sees writes by it
            return first
        if name in SHAPE_KEEPING:
            return torch.empty_like(first)
        if name in BATCH_NORMS and fits_norm(args):
            return torch.empty_like(first), first.new_empty(0), first.new_empty(0)
        return func(*args, **(kwargs or {}))
