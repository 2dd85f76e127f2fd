"""How far an ONNX model in its runtime is from the simulation, rounding by rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.errors import VerificationError
from fxcompress.export.placement import Rounded
from fxcompress.export.session import OnnxModule
from fxcompress.export.signature import Slot
from fxcompress.inputs import Inputs, other_batch, positional
from fxcompress.module import TracedModule, evaluating
from fxcompress.quantization.fake_quantize import fake_quant_nodes, fake_quant_of
from fxcompress.verify import difference

#: Of a float result that is rounded nowhere: a step, were it rounded to 8 bits over ``[-max, max]``.
_RESULT_STEP = 1 / 127
#: Of a result: what is beyond it is a wrong kernel, not a value on a tie that other kernels round another way.
_OF_ITSELF = 0.5


@dataclass(frozen=True)
class Disagreement:
    """Of one fake-quant node, given what the runtime computed before it.

    Attributes:
        name: of the node.
        steps: largest difference in quantization steps.
        allowed: what the grids inside the block explain.
        different: how many integers differ.
        elements: how many were compared.
    """

    name: str
    steps: int
    allowed: int
    different: int
    elements: int


class _Following(fx.Interpreter):
    """Runs the simulation, going on behind each fake-quant node with what the runtime has there."""

    def __init__(self, simulated: TracedModule, rounded: Mapping[str, Rounded], integers: Mapping[str, Tensor]) -> None:
        super().__init__(simulated)
        self.simulated, self.rounded, self.integers = simulated, rounded, integers
        self.found: list[Disagreement] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.integers:
            return value
        item = fake_quant_of(self.simulated, n)
        assert item is not None
        grid = item.grid()
        assert grid is not None
        found = self.integers[n.name].int() + item.spec.quant_min
        away = (found - ((value / grid.scale).round().int() + grid.zero_point)).abs()
        steps, different = (int(away.max()), int((away > 0).sum())) if away.numel() else (0, 0)
        allowed = self.rounded[n.name].steps
        self.found.append(Disagreement(n.name, steps, allowed, different, away.numel()))
        return (found - grid.zero_point) * grid.scale


def compare(
    simulated: TracedModule, lowered: OnnxModule, inputs: Inputs, *, batched: bool, what: str
) -> tuple[float, str]:
    """Check every rounding of a model that runs in a runtime.

    Behind each fake-quant node the simulation goes on with the runtime's integers, so that what is found is the error
    of one block: over a whole network, one integer that is rounded the other way becomes several.

    Args:
        simulated: the module with fake-quant nodes.
        lowered: what it became.
        inputs: example inputs.
        batched: dimension 0 is a batch: a second size is compared too.
        what: the name of ``lowered`` in messages.

    Returns:
        The largest difference of a result, as a share of its largest value; and a line about all roundings.

    Raises:
        VerificationError: an integer is further away than one step and what a coarser grid inside its block makes of
            it, or a result further than a 127th of its largest value; or without the integers as further results the
            model, which then is fused in other ways, gives something else altogether.
    """
    runtime = tapped(lowered)
    trials = [inputs, inputs.rebatched(other_batch(inputs.batch))] if batched else [inputs]
    found: list[Disagreement] = []
    worst = 0.0
    for trial in trials:
        with torch.no_grad(), evaluating(simulated):
            result, integers = runtime(*positional(simulated, trial.map(Tensor.clone)))
            following = _Following(simulated, lowered.signature.rounded, integers)
            right = following.run(*positional(simulated, trial.map(Tensor.clone)))
        for item in following.found:
            if item.steps > item.allowed:
                raise VerificationError(
                    f"{what} differs from the simulation by {item.steps} quantization steps at node {item.name}, given "
                    f"the same values before it, at batch {trial.batch}; expected at most {item.allowed}. This is an "
                    "error in fxcompress or in the runtime; verify=False skips the check.",
                    node=item.name,
                )
        gap = difference(right, result)
        if not gap <= _RESULT_STEP:
            raise VerificationError(
                f"{what} differs from the simulation by {gap:.3g} of the largest value, given the same integers before "
                f"it, at batch {trial.batch}; expected at most {_RESULT_STEP:.3g}. This is an error in fxcompress or "
                "in the runtime; verify=False skips the check.",
                difference=gap,
            )
        own = difference(result, lowered(*positional(simulated, trial.map(Tensor.clone))))
        if not own <= _OF_ITSELF:
            raise VerificationError(
                f"{what} differs by {own:.3g} of the largest value from what the same model gives together with its "
                f"integers, at batch {trial.batch}; expected at most {_OF_ITSELF}. This is an error in the runtime; "
                "verify=False skips the check.",
                difference=own,
            )
        found += following.found
        worst = max(worst, gap)
    return worst, _summary(found, sum(item.spec.role == "activation" for _, item in fake_quant_nodes(simulated)))


def tapped(lowered: OnnxModule) -> OnnxModule:
    """The same model with the integers of every fake-quant node as a second result, by the node's name."""
    import onnx

    model, signature = onnx.load_from_string(lowered.file()), lowered.signature
    first = len(model.graph.output)
    for item in signature.rounded.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(item.value, onnx.TensorProto.UINT8, None))
    slots = {name: Slot(first + place) for place, name in enumerate(signature.rounded)}
    result = (signature.result, slots)
    return OnnxModule(model.SerializeToString(), replace(signature, result=result), lowered.runtime)


def _summary(found: list[Disagreement], nodes: int) -> str:
    """A line about every node."""
    compared, elements = len({item.name for item in found}), max(1, sum(item.elements for item in found))
    share = sum(item.different for item in found) / elements
    most = max((item.steps for item in found), default=0)
    coarse = len({item.name for item in found if item.allowed > 1})
    return (
        f"of {nodes} roundings of activations, {compared} compared with the simulation one by one: {share:.1e} of all "
        f"integers differ, by at most {most} (expected 1; more in {coarse} blocks with a coarser grid inside)"
    )
