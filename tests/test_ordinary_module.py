"""What ``compress`` returns is an ordinary module: it saves, loads, copies, trains, moves and runs like any other."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ordinary_cases import FAST, FORMS, compressed, dense, every_case, example, images
from torch import Tensor, nn

import fxcompress
from fxcompress import masks
from fxcompress.module import TracedModule
from fxcompress.passes import FoldBatchNorm, L1FilterPruner, L2FilterPruner, LevelPruner, RandomFilterPruner, Speedup
from fxcompress.trace import Holder

ROOT = Path(__file__).parents[1]


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """The output in eval mode."""
    result = model.eval()(x)
    assert isinstance(result, Tensor)
    return result


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Something to descend, the mean over the batch."""
    target = torch.arange(len(x)) % 5
    return F.cross_entropy(model(x), target)


def train(model: nn.Module, name: str, steps: int, *, weight_decay: float = 0.0, momentum: float = 0.0) -> None:
    """Some steps of plain SGD in whatever mode the model is in."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=weight_decay)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, images(name, 6, seed=step)).backward()
        optimizer.step()


# ---- state -----------------------------------------------------------------------------------------------------


@every_case
def test_state_dict_keys_are_the_callers_and_the_masks(name: str, form: str) -> None:
    model = compressed(name, form)
    callers = list(dense(name).state_dict())
    assert list(model.state_dict()) == callers + [f"_masks.{key}" for key in masks(model)]
    assert bool(masks(model)) == (form == "masked")
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in dense(name).named_parameters()]


@every_case
def test_a_state_dict_saved_without_pickle_is_loaded_strictly(name: str, form: str, tmp_path: Path) -> None:
    model, fresh = compressed(name, form), compressed(name, form)
    train(model.train(), name, 2)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    x = images(name, 3)
    before = evaluated(fresh, x)
    result = fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(evaluated(fresh, x), evaluated(model, x), rtol=0, atol=0)
    assert not torch.equal(before, evaluated(fresh, x))


# ---- mode, dtype, structure ------------------------------------------------------------------------------------


@every_case
def test_mode_reaches_every_layer(name: str, form: str) -> None:
    model = compressed(name, form)
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}


@every_case
def test_dtype_moves_and_masks_do_not(name: str, form: str) -> None:
    model, x = compressed(name, form), images(name, 3)
    single = evaluated(model, x)
    kept = masks(model)
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {mask.dtype for mask in masks(model).values()} <= {torch.bool}
    double = evaluated(model, x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)
    model.to(torch.float32)
    torch.testing.assert_close(evaluated(model, x), single, rtol=0, atol=0)
    assert all(torch.equal(mask, kept[key]) for key, mask in masks(model).items())


@every_case
def test_layers_are_plain_and_agree_with_their_weights(name: str, form: str) -> None:
    model = compressed(name, form)
    originals = dict(dense(name).named_modules())
    for path, module in model.named_modules():
        if path.startswith("_"):
            continue  # what fxcompress keeps: buffers only
        if any(True for _ in originals[path].children()) or not type(originals[path]).__module__.startswith("torch.nn"):
            assert isinstance(module, Holder) or not path
            continue
        assert type(module) is type(originals[path])
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            assert tuple(module.weight.shape) == shape
            assert module.bias is None or len(module.bias) == module.out_channels
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert len(module.weight) == len(module.running_mean) == module.num_features
        elif isinstance(module, nn.LayerNorm):
            assert tuple(module.weight.shape) == tuple(module.normalized_shape)


def test_a_layer_can_be_called_by_itself() -> None:
    """The attributes say what the layer takes: its own call agrees with the graph's."""
    model, x = compressed("residual", "removed"), images("residual", 3)
    seen: list[Any] = []
    stem = model.get_submodule("stem")
    handle = stem.register_forward_hook(lambda module, args, output: seen.append(output))
    evaluated(model, x)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], stem(x), rtol=0, atol=0)
    assert seen[0].shape[1] == stem.get_parameter("weight").shape[0] == 7


@every_case
def test_hooks_of_the_whole_module_run(name: str, form: str) -> None:
    model, x = compressed(name, form), images(name, 3)
    before = evaluated(model, x)

    def plus_one(module: nn.Module, args: Any, output: Any) -> Any:
        return output + 1

    handles = [
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        model.register_forward_hook(plus_one),
    ]
    changed = evaluated(model, x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(changed, evaluated(model, x * 2) + 1, rtol=0, atol=0)
    torch.testing.assert_close(evaluated(model, x), before, rtol=0, atol=0)


# ---- training --------------------------------------------------------------------------------------------------


@every_case
def test_a_step_moves_live_weights_and_no_others(name: str, form: str) -> None:
    model = compressed(name, form).train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    kept = masks(model)
    train(model, name, 1)
    moved = 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} has no gradient"
        if key in kept:
            assert torch.equal(parameter[~kept[key]], before[key][~kept[key]])
        moved += int((parameter != before[key]).sum())
    total = sum(p.numel() for p in model.parameters())
    live = total - sum(int((~mask).sum()) for mask in kept.values())
    assert 0.5 * live < moved <= live  # dead units of ReLU have no gradient


@every_case
def test_masked_weights_stay_zero_through_momentum_and_decay(name: str, form: str) -> None:
    """Afterwards they may hold anything: what is masked is not read, and removing it changes nothing."""
    model, x = compressed(name, form).train(), images(name, 3)
    kept = masks(model)
    train(model, name, 12, momentum=0.9, weight_decay=0.05)
    after = masks(model)
    assert all(torch.equal(mask, kept[key]) for key, mask in after.items())
    assert after.keys() == kept.keys()
    expected = evaluated(model.double(), x.double())
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for key, mask in kept.items():
            noisy.get_parameter(key)[~mask] += 3
    torch.testing.assert_close(evaluated(noisy, x.double()), expected, rtol=0, atol=0)
    shipped = fxcompress.compress(model, [Speedup()], example_inputs=x.double())
    torch.testing.assert_close(evaluated(shipped, x.double()), expected, rtol=1e-9, atol=1e-9)
    assert not masks(shipped)


@pytest.mark.parametrize("name", ["residual", "shuffle"])
def test_batch_norm_statistics_are_those_of_the_model_with_zeroed_weights(name: str) -> None:
    masked, removed, zeroed = compressed(name, "masked"), compressed(name, "removed"), dense(name)
    kept = masks(masked)
    with torch.no_grad():
        for key, mask in kept.items():
            zeroed.get_parameter(key).mul_(mask)
    start = {key: buffer.clone() for key, buffer in zeroed.named_buffers()}
    for model in (masked, removed, zeroed):
        model.train()
        for seed in range(3):
            model(images(name, 5, seed))
    found, cut = dict(masked.named_buffers()), dict(removed.named_buffers())
    assert start
    for key, expected in zeroed.named_buffers():
        assert not torch.equal(expected, start[key])
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6)
        live = kept[f"{key.rpartition('.')[0]}.weight"] if expected.dim() else ...
        torch.testing.assert_close(cut[key], expected[live], rtol=1e-5, atol=1e-6)


# ---- copies ----------------------------------------------------------------------------------------------------


@every_case
def test_a_deep_copy_is_equal_and_independent(name: str, form: str) -> None:
    model, x = compressed(name, form), images(name, 3)
    before = evaluated(model, x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(evaluated(twin, x), before, rtol=0, atol=0)
    shared = {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in twin.state_dict().values()}
    assert not shared
    train(twin.train(), name, 2)
    assert not torch.equal(evaluated(twin, x), before)
    torch.testing.assert_close(evaluated(model, x), before, rtol=0, atol=0)
    assert str(twin.graph) == str(model.graph)
    for node in list(twin.graph.nodes):
        node.meta["seen"] = True
    assert not any("seen" in node.meta for node in model.graph.nodes)


@every_case
def test_a_shallow_copy_shares_its_tensors(name: str, form: str) -> None:
    model, x = compressed(name, form), images(name, 3)
    twin = copy.copy(model)
    for (key, one), (_, other) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert one.data_ptr() == other.data_ptr(), key
    train(twin.train(), name, 1)
    torch.testing.assert_close(evaluated(twin, x), evaluated(model, x), rtol=0, atol=0)
    assert twin.graph is not model.graph


_ELSEWHERE = """
import pickle, sys, torch
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*.model")):
    with path.open("rb") as file:
        pickled = pickle.load(file)
    saved = torch.load(path.with_suffix(".pt"), weights_only=False)
    x = torch.load(path.with_suffix(".x"))
    results = []
    for model in (pickled, saved):
        with torch.no_grad():
            results.append(model.eval()(x))
        model.train()
        torch.manual_seed(0)
        model(x).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    torch.save((results, list(pickled.state_dict()), str(pickled.graph)), path.with_suffix(".y"))
assert "ordinary_cases" not in sys.modules
"""


@pytest.mark.parametrize(
    "names", [FAST, pytest.param(("vit", "resnet18"), marks=pytest.mark.long)], ids=["fast", "large"]
)
def test_a_pickle_is_the_same_model_in_another_process(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        for form in FORMS:
            model = compressed(name, form)
            path = tmp_path / f"{name}-{form}.model"
            path.write_bytes(pickle.dumps(model))
            torch.save(model, path.with_suffix(".pt"))
            torch.save(images(name, 3), path.with_suffix(".x"))
    code = ["import torch; torch.set_num_threads(1)", _ELSEWHERE]
    subprocess.run([sys.executable, "-c", "\n".join(code), str(tmp_path)], check=True, cwd=ROOT, timeout=300)
    for name in names:
        for form in FORMS:
            model, x = compressed(name, form), images(name, 3)
            results, keys, graph = torch.load(tmp_path / f"{name}-{form}.y")
            expected = evaluated(model, x)
            model.train()(x).square().mean().backward()
            gradients = [p.grad for p in model.parameters()]
            for output, found in (results[:2], results[2:]):
                torch.testing.assert_close(output, expected, rtol=0, atol=0)
                torch.testing.assert_close(found, gradients, rtol=0, atol=0)
            assert keys == list(model.state_dict())
            assert graph == str(model.graph)


# ---- threads ---------------------------------------------------------------------------------------------------


@every_case
def test_several_threads_at_once_see_one_function(name: str, form: str) -> None:
    model = compressed(name, form)
    batches = [images(name, size, seed) for seed, size in enumerate((1, 3, 2, 5) * 2)]
    expected = [evaluated(model, x) for x in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda x: evaluated(model, x), batches))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


# ---- compressing what was compressed ---------------------------------------------------------------------------


def tensors() -> dict[int, Tensor]:
    """Every tensor that Python knows of, by id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking for the type of everything wakes what is deprecated
        return {id(item): item for item in gc.get_objects() if isinstance(item, Tensor)}


@pytest.mark.parametrize(
    "passes", [[FoldBatchNorm()], [LevelPruner(0.5)], [L1FilterPruner(0.5)], [L1FilterPruner(0.5), Speedup()]]
)
@pytest.mark.parametrize("name", FAST)
def test_what_nobody_holds_is_gone_at_once(name: str, passes: list[fxcompress.Pass]) -> None:
    """Without waiting for the garbage collector: nothing that a run leaves behind keeps a tensor."""
    model, x = dense(name), example(name)
    fxcompress.compress(model, passes, example_inputs=x)  # what is cached for good
    gc.collect()
    gc.disable()
    try:
        before = tensors().keys()
        result = fxcompress.compress(model, passes, example_inputs=x)
        assert len(tensors()) > len(before)
        gone = weakref.ref(result)
        del result
        assert gone() is None
        assert not tensors().keys() - before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", FAST)
def test_a_long_life(name: str) -> None:
    """Mask, train, mask more, remove, fold, prune again, remove again: each result is the next one's model."""
    x, y = example(name), images(name, 3).double()
    model: nn.Module = dense(name).train()
    sizes = []
    for passes in (
        [L1FilterPruner(0.3)],
        [L2FilterPruner(0.5), LevelPruner(0.2)],
        [Speedup()],
        [FoldBatchNorm()],
        [RandomFilterPruner(0.3)],
        [Speedup()],
    ):
        before = copy.deepcopy(model)
        made = fxcompress.compress(model, passes, example_inputs=x)
        assert made.training
        last = made.meta["history"][-1]
        assert last.name == passes[-1].name
        if passes[0].preserves:
            assert last.difference is not None
            bound = 1e-9 if passes[0].name == "Speedup" else 1e-5
            assert last.difference <= bound
            exact, expected = copy.deepcopy(made).double(), before.double()
            torch.testing.assert_close(evaluated(exact, y), evaluated(expected, y), rtol=1e-5, atol=1e-5)
        train(made, name, 3, momentum=0.9, weight_decay=0.01)
        sizes.append(sum(p.numel() for p in made.parameters()))
        model = made
    assert sizes[1] == sizes[0] > sizes[2] >= sizes[3] == sizes[4] > sizes[5]
    assert isinstance(made, TracedModule)
    assert [step.name for step in made.meta["history"]] == [
        "L1FilterPruner",
        "L2FilterPruner",
        "LevelPruner",
        "Speedup",
        "FoldBatchNorm",
        "RandomFilterPruner",
        "Speedup",
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_compressed_like_the_original(form: str, again: Callable[[nn.Module], nn.Module]) -> None:
    x = example("transformer")
    model = compressed("transformer", form)
    passes = [L1FilterPruner(0.6), Speedup()]
    one, other = (fxcompress.compress(item, passes, example_inputs=x) for item in (model, again(model)))
    assert str(one.graph) == str(other.graph)
    for (key, left), (_, right) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, msg=key)
