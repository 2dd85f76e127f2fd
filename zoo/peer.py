"""What torch-pruning makes of one model.

The same ratio and criterion, without hints, but for the layers that make the model's outputs, which it would prune.

It has no masked model to compare with. Where a slice went is followed in the gradients, which it cuts along with the
parameters: they are made to hold every element's place. The model with zeros in all other places is the reference.
"""

from __future__ import annotations

import copy
import resource
import time
import warnings
from dataclasses import dataclass

import torch
import torch_pruning
from torch import Tensor, nn

import fxcompress
from fxcompress.inputs import Inputs
from fxcompress.verify import difference

#: Bytes that a model may take, dense and pruned: on some, the peer's index maps take all there is.
MEMORY = 12 * 2**30


@dataclass
class PeerRecord:
    """One row beside ours.

    Attributes:
        name: ``library/model``.
        works: it pruned something, and the result runs on the example inputs with outputs of the same shapes.
        exact: the result equals the model with zeros in place of what was pruned, to 1e-9 in float64.
        macs: share of the multiply-accumulates that went.
        seconds: of building its graph and pruning.
        error: what stopped it, or nothing.
    """

    name: str
    works: bool = False
    exact: bool = False
    macs: float = 0.0
    seconds: float = float("nan")
    error: str = ""


def measure(name: str) -> PeerRecord:
    """Prune half the channels of a model with torch-pruning and check what is left."""
    from zoo.catalogue import build

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sample = build(name)
    record = PeerRecord(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _measure(record, sample.model, Inputs.parse(sample.inputs))
        except Exception as error:  # whatever the peer meets is what is to be found out
            record.error = f"{type(error).__name__}: {error}"
    return record


def _measure(record: PeerRecord, model: nn.Module, inputs: Inputs) -> None:
    before = fxcompress.count(model, inputs).macs
    outputs = _output_layers(model, inputs)
    model, inputs = model.double(), inputs.map(lambda t: t.double() if t.is_floating_point() else t)
    torch.set_default_dtype(torch.float64)
    reference = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
    example = inputs.kwargs if inputs.kwargs else inputs.args if len(inputs.args) > 1 else inputs.args[0]
    start = time.process_time()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[model.get_submodule(path) for path in outputs],
    )
    pruner.step()
    record.seconds = time.process_time() - start
    with torch.no_grad():
        found = inputs.run(model)
        shapes = difference(inputs.run(reference), found) < float("inf")
        after = fxcompress.count(model, inputs).macs
        record.macs = 1 - after / before
        record.works = shapes and after < before
        if not shapes:
            record.error = "outputs have other shapes than before"
        zeroed = _zeroed(reference, model)
        record.exact = record.works and difference(inputs.run(zeroed), found) <= 1e-9


def _output_layers(model: nn.Module, inputs: Inputs) -> set[str]:
    """Layers whose channels are outputs of the model."""
    try:
        groups = fxcompress.channel_groups(model, inputs)
    except fxcompress.FxCompressError:
        return set()
    return {layer for group in groups if "output of the model" in group.reason for layer in group.layers}


def _zeroed(reference: nn.Module, pruned: nn.Module) -> nn.Module:
    """The dense model with zeros in every place that the pruned one has not."""
    left = dict(pruned.named_parameters())
    for name, parameter in reference.named_parameters():
        keep = torch.zeros(parameter.numel(), dtype=torch.bool)
        if name in left:
            places = left[name].grad
            assert isinstance(places, Tensor), f"{name} was replaced"
            keep[places.long().reshape(-1)] = True
        parameter.detach().reshape(-1)[~keep] = 0
    return reference
