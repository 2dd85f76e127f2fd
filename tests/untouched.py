"""A picture of a model that differs whenever anything about the model does."""

from typing import Any

import torch
from torch import Tensor, nn


def picture(model: nn.Module) -> dict[str, Any]:
    """For every submodule its identity, its mode and everything in its ``__dict__``: tensors by identity, bits,
    gradient and version, containers item by item, anything else by identity."""
    return {
        name: (id(module), {key: _shown(value) for key, value in vars(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _shown(value: object) -> Any:
    if isinstance(value, Tensor):
        bits = b"" if value.is_meta else value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        grad = id(value.grad) if value.is_leaf else None
        return id(value), value.dtype, tuple(value.shape), value.device, bits, value.requires_grad, grad, value._version
    if isinstance(value, dict):
        return [(key, _shown(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    if isinstance(value, (set, frozenset, int, float, str, bool, type(None))):
        return type(value), value
    return id(value)
