"""Running a model to learn something about it, and leaving no trace of that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxcompress.errors import InputError
from fxcompress.inputs import Inputs, check_devices


def checked(model: nn.Module, example_inputs: Any) -> Inputs:
    """The example inputs, once it is clear that the model can run on them.

    Raises:
        InputError: as for :func:`fxcompress.count`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    inputs = Inputs.parse(example_inputs)
    if inputs.batch == 0:
        raise InputError(f"example_inputs hold an empty batch (shapes {inputs.shapes()}); give at least one sample.")
    if any(map(is_lazy, model.parameters())):
        raise InputError("the model has lazy parameters, whose shapes are not known; run it once first.")
    check_devices(model, inputs)
    return inputs


def run(model: Callable[..., Any], inputs: Inputs) -> Any:
    """The model applied to the inputs; whatever it raises becomes an :class:`InputError`."""
    try:
        return inputs.run(model)
    except Exception as error:
        raise InputError(
            f"the model failed on the example inputs (shapes {inputs.shapes()}): {error}. "
            "Expected inputs on which it runs in eval mode."
        ) from error


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards attributes, buffers and the random state are what they were."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer)
        for module in modules
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    devices = {each.device for each in (*model.parameters(), *model.buffers()) if each.device.type == "cuda"}
    with _attributes(modules):
        try:
            with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
                copies = {buffer: buffer.clone() for _, _, buffer in buffers}
                for module in modules:
                    module.training = False  # by .eval(), a model may do more than that
                for module, name, buffer in buffers:
                    setattr(module, name, copies[buffer])
                yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for module, name, buffer in buffers:
                setattr(module, name, buffer)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards the model is what it was, whatever was done to it: all values of parameters and buffers, too."""
    tensors = list(dict.fromkeys((*model.parameters(), *model.buffers())))
    with torch.no_grad():
        states = [(tensor.data, tensor.detach().clone(), tensor.requires_grad, tensor.grad) for tensor in tensors]
    with _attributes(list(model.modules())):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, (data, values, learns, gradient) in zip(tensors, states, strict=True):
                    tensor.data = data
                    if not torch.equal(data, values):  # an expanded buffer cannot be written to
                        data.copy_(values)
                    tensor.requires_grad_(learns)
                    tensor.grad = gradient


@contextmanager
def _attributes(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards the modules have the attributes, hooks and submodules that they had."""
    attributes = [dict(vars(module)) for module in modules]
    values = [value for own in attributes for value in own.values()]
    contents = [(held, held.copy()) for held in values if type(held) in (dict, OrderedDict, list)]
    try:
        yield
    finally:
        for held, content in contents:
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)
        for module, own in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(own)
