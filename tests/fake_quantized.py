"""Models with fake-quant nodes whose ranges are those of the given inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.inputs import Inputs
from fxcompress.passes import FoldBatchNorm
from fxcompress.pipeline import run_pass
from fxcompress.quantization.edges import LayerSpecs
from fxcompress.quantization.fake_quantize import AffineFakeQuantize
from fxcompress.quantization.insert import insert
from fxcompress.quantization.observers import MinMax
from fxcompress.quantization.sites import find_sites
from fxcompress.quantization.spec import QuantSpec, activation_spec, weight_spec

WEIGHT, ACTIVATION = weight_spec(8), activation_spec(8, MinMax())


def fake_quantized(
    model: nn.Module,
    *inputs: Tensor,
    weight: QuantSpec | None = WEIGHT,
    activation: QuantSpec | None = ACTIVATION,
    where: Callable[[str], bool] = lambda name: True,
) -> fxcompress.TracedModule:
    """A traced copy in eval mode, BatchNorm folded, with min-max ranges of `inputs`.

    `where` chooses layers by name.
    """
    example = Inputs.parse(inputs)
    context = fxcompress.Context(inputs=example, verify=False)
    module = fxcompress.trace(copy.deepcopy(model).eval(), inputs)
    module = run_pass(FoldBatchNorm(), module, context).module
    specs = {site.layer: LayerSpecs(weight, activation) for site in find_sites(module) if where(site.layer)}
    facts = context.groups(module).channels.facts
    for slot in insert(module, specs, facts, "test", folds=False, kernels=True):
        path, _, leaf = slot.name.rpartition(".")
        made = AffineFakeQuantize(slot.spec, slot.channels, calls=slot.calls)
        module.get_submodule(path)._modules[leaf] = made.train()
    module.recompile()
    with torch.no_grad():
        example.run(module)
    return module.eval()
