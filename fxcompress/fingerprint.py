"""Digests that tell one call's arguments from another's, the same in every process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterable, Mapping, Set

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.module import state_of

_PLAIN = bool, int, float, complex, str, bytes, type(None)


def fingerprint(*parts: object) -> str:
    """A digest of a run's arguments that is the same in another process.

    Tensors and arrays count with every bit, dataclasses with their fields, functions with their code, its constants,
    defaults and what they close over, modules with their weights, their plain attributes and the code of ``forward``.
    What has a ``repr`` of its own counts as it prints, all else with its attributes and, where it can be called, the
    functions of its class. What a function reads from its module's globals does not count.
    """
    digest = hashlib.sha256()
    waiting: list[object] = [*reversed(parts)]
    met: dict[int, tuple[int, object]] = {}  # which are kept alive, so that no other gets its id
    while waiting:
        part = waiting.pop()
        digest.update(f"{type(part).__module__}.{type(part).__qualname__};".encode())
        if isinstance(part, _PLAIN):
            digest.update(f"{part!r};".encode())
        elif isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray) and not part.dtype.hasobject:
            digest.update(f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        elif isinstance(part, Set):
            digest.update("".join(sorted(map(fingerprint, part))).encode())
        elif id(part) in met:  # it may hold itself
            digest.update(f"{met[id(part)][0]};".encode())
        else:
            if not isinstance(part, tuple):  # whether equal constants are one object is the interpreter's choice
                met[id(part)] = len(met), part
            inside = list(_inside(part))
            digest.update(f"{len(inside)};".encode())
            waiting += reversed(inside)
    return digest.hexdigest()


def _inside(part: object) -> Iterable[object]:
    """What an object consists of, each of which counts on its own."""
    if isinstance(part, nn.Module):
        return _of_module(part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return [getattr(part, each.name) for each in dataclasses.fields(part)]
    if isinstance(part, Mapping):
        return [item for pair in part.items() for item in pair]
    if isinstance(part, (list, tuple)):
        return part
    if isinstance(part, types.CodeType):
        return [part.co_code, part.co_names, part.co_varnames, part.co_consts]
    if isinstance(part, types.FunctionType):
        return _of_function(part)
    if isinstance(part, types.MethodType):
        return [part.__func__, part.__self__]
    if isinstance(part, functools.partial):
        return [part.func, part.args, part.keywords]
    if type(part).__repr__ is object.__repr__ and hasattr(part, "__dict__"):
        return [vars(part), _methods(type(part)) if callable(part) else ()]
    return [re.sub(r" at 0x[0-9a-f]+", "", repr(part))]


def _of_function(function: types.FunctionType) -> Iterable[object]:
    name = f"{function.__module__}.{function.__qualname__}"
    closed = [_content(cell) for cell in function.__closure__ or ()]
    return [name, function.__code__, function.__defaults__, function.__kwdefaults__, closed]


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been assigned yet
        return None


def _of_module(module: nn.Module) -> Iterable[object]:
    """Its weights, its plain attributes, and its code: the graph of a traced one, else each class' ``forward``."""
    items = list(module.modules())
    plain = [
        {name: value for name, value in vars(item).items() if isinstance(value, _PLAIN) and name != "training"}
        for item in items
    ]
    traced = module.code if isinstance(module, fx.GraphModule) else ""
    return [repr(module), traced, state_of(module), plain, [_forward(item) for item in items]]


def _forward(module: nn.Module) -> Callable[..., object] | None:
    return None if isinstance(module, fx.GraphModule) else type(module).forward


def _methods(kind: type) -> list[object]:
    return [item for each in kind.__mro__ for item in vars(each).values() if isinstance(item, types.FunctionType)]
