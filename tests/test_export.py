"""What ``compress`` returns compiles, exports and runs in ONNX Runtime, at batch sizes it was not made with."""

import copy
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from ordinary_cases import cases, compressed, every_case, example, images
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxcompress
from fxcompress import masks
from fxcompress.module import TracedModule
from fxcompress.passes import Speedup

BATCH = torch.export.Dim("batch", min=1, max=64)


@torch.no_grad()
def evaluated(model: Any, x: Tensor) -> Tensor:
    result = model(x)
    assert isinstance(result, Tensor)
    return result


def close(found: Tensor, expected: Tensor) -> None:
    """Agreement to 1e-5 of the largest output: a backend may sum in another order."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# ---- torch.compile ---------------------------------------------------------------------------------------------


def check_compiled(model: TracedModule, name: str, backend: str) -> None:
    """One graph for the forward, at several batch sizes, and for a training step; what was trained is removed."""
    torch._dynamo.reset()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a backend draws other random numbers
    counter = CompileCounterWithBackend(backend)
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 5, 3, 7):
        close(evaluated(compiled, images(name, batch)), evaluated(model, images(name, batch)))
    assert counter.frame_count == 2, "the second batch size makes the batch dynamic, others need nothing new"
    assert compiled.state_dict().keys() == {f"_orig_mod.{key}" for key in model.state_dict()}
    eager, kept = copy.deepcopy(model).double().train(), masks(model)
    model.double().train()  # statistics over a few pixels magnify rounding
    optimizers = [torch.optim.SGD(item.parameters(), lr=0.05, momentum=0.9) for item in (compiled, eager)]
    for step in range(2):
        for item, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            item(images(name, 4, step).double()).square().mean().backward()
            optimizer.step()
    for (key, one), (_, other) in zip(model.state_dict().items(), eager.state_dict().items(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    assert all(torch.equal(mask, kept[key]) for key, mask in masks(model).items())
    x = example(name).double()
    removed = fxcompress.compress(model, [Speedup()], example_inputs=x)
    close(evaluated(removed.eval(), x), evaluated(model.eval(), x))


@cases(("transformer", "masked"))
def test_compiles_to_one_graph(name: str, form: str) -> None:
    check_compiled(compressed(name, form), name, "aot_eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@cases()
def test_compiles_to_machine_code(name: str, form: str) -> None:
    check_compiled(compressed(name, form), name, "inductor")


# ---- torch.export ----------------------------------------------------------------------------------------------


def check_exported(name: str, form: str, *, strict: bool) -> None:
    model = compressed(name, form)
    exported = torch.export.export(model, (example(name),), dynamic_shapes=({0: BATCH},), strict=strict)
    assert set(exported.state_dict) == set(model.state_dict())
    for batch in (1, 2, 7):
        x = images(name, batch)
        close(evaluated(exported.module(), x), evaluated(model, x))


@every_case
def test_exports_with_a_dynamic_batch(name: str, form: str) -> None:
    check_exported(name, form, strict=False)


@cases(("transformer", "masked"))
def test_exports_strictly_with_a_dynamic_batch(name: str, form: str) -> None:
    check_exported(name, form, strict=True)


def test_an_export_is_saved_and_loaded(tmp_path: Path) -> None:
    name, path = "shuffle", tmp_path / "model.pt2"
    model = compressed(name, "removed")
    torch.export.save(torch.export.export(model, (example(name),), dynamic_shapes=({0: BATCH},)), path)
    close(evaluated(torch.export.load(path).module(), images(name, 3)), evaluated(model, images(name, 3)))


# ---- ONNX ------------------------------------------------------------------------------------------------------


@cases(("transformer", "masked"))
def test_onnx_runtime_agrees(name: str, form: str, tmp_path: Path) -> None:
    model, path = compressed(name, form), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))  # the exporter's own
        program = torch.onnx.export(model, (example(name),), dynamic_shapes=({0: BATCH},), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert not isinstance(entry.shape[0], int)
    for batch in (2, 5):
        x = images(name, batch)
        (found,) = session.run(None, {entry.name: x.numpy()})
        close(torch.from_numpy(found), evaluated(model, x))
