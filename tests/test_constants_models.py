"""Masks from elsewhere on real models and on generated networks: removed equals masked by hand, in float64."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import build
from removal import PLAIN, framed, relative_gap
from test_zoo import trials, variation
from torch import Tensor, nn

import fxcompress
from fxcompress import InputError
from fxcompress.passes import Speedup
from fxcompress.testing import Spec, inputs, network


@pytest.fixture(autouse=True)
def _some_channels_stay() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*; its channels stay")
        yield


def multiplied(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with the masks multiplied into its parameters by hand, in float64 and eval mode."""
    made = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, mask in masks.items():
            made.get_parameter(name).mul_(mask)
    return made


# ---- real models ----------------------------------------------------------------------------------------------------


def masked_convolutions(model: nn.Module) -> dict[str, Tensor]:
    """The half of every convolution's output channels of smallest L1 norm masked: weights and biases, nothing else."""
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            norm = layer.weight.detach().abs().flatten(1).sum(1)
            keep = torch.ones(len(norm), dtype=torch.bool)
            keep[norm.argsort()[: len(norm) // 2]] = False
            masks[f"{name}.weight"] = keep[:, None, None, None].expand(layer.weight.shape).clone()
            if layer.bias is not None:
                masks[f"{name}.bias"] = keep
    return masks


def constant(model: nn.Module, conv: str, norm: str, masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """By hand: which channels of a convolution are masked, and what BatchNorm makes of zero."""
    bn = model.get_submodule(norm)
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    emitted = bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt()
    return ~masks[f"{conv}.weight"].flatten(1).any(1), emitted.detach()


def left_in_vgg(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """For every convolution how many channels stay, and how many of those hold a constant.

    relu makes a negative constant zero, which padding does not change; the last convolution is read by a Linear.
    """
    convs = [n for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    expected = {}
    for name in convs:
        gone, emitted = constant(model, name, name.replace(name.split(".")[1], str(int(name.split(".")[1]) + 1)), masks)
        stuck = gone & (emitted > 0) if name != convs[-1] else torch.zeros_like(gone)
        expected[name] = int((~gone | stuck).sum()), int(stuck.sum())
    return expected


def left_in_resnet18(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The same for what lies inside the blocks, which a zero-padded convolution reads."""
    expected = {}
    for name in [n for n, _ in model.named_modules() if n.endswith("conv1") and "." in n]:
        gone, emitted = constant(model, name, name.replace("conv1", "bn1"), masks)
        stuck = gone & (emitted > 0)
        expected[name] = int((~gone | stuck).sum()), int(stuck.sum())
    return expected


def left_in_mobilenet_v2(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The same for the expanded channels, which go as depthwise says: masked there they are constant for the 1x1
    convolution behind, whatever came before; else they must have been zero, as relu6 makes them, and its bias is."""
    expected = {}
    for i in range(2, 18):
        name = f"features.{i}.conv"
        gone, emitted = constant(model, f"{name}.0.0", f"{name}.0.1", masks)
        behind, _ = constant(model, f"{name}.1.0", f"{name}.1.1", masks)
        stuck = gone & ~behind & (F.relu6(emitted) != 0)
        expected[f"{name}.0.0"] = int((~(gone | behind) | stuck).sum()), int(stuck.sum())
    return expected


LEFT = {"resnet18": left_in_resnet18, "mobilenet_v2": left_in_mobilenet_v2, "vgg16_bn": left_in_vgg}


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("mobilenet_v2", marks=pytest.mark.long),
        pytest.param("vgg16_bn", marks=pytest.mark.long),
    ],
)
def test_masks_of_convolutions_alone(name: str) -> None:
    model, x = build(name)
    model, x = model.double(), x.double()
    masks = masked_convolutions(model)
    small = fxcompress.compress(model, [Speedup(masks=masks)], example_inputs=x, verify=False)
    twin, notes = multiplied(model, masks), small.meta["history"][-1].notes
    for layer, (width, stuck) in LEFT[name](model, masks).items():
        assert small.get_parameter(f"{layer}.weight").shape[0] == width, layer
        told = [note for note in notes if f" of {layer} stay" in note]
        assert sum(int(note.split()[0]) for note in told) == stuck, told
        assert all("enters the zero-padded convolution" in note for note in told)
    for trial in trials(x):
        with torch.no_grad():
            expected, found = twin(trial.double()), small(trial.double())
        assert relative_gap(expected, found) <= 1e-9
        assert variation(found) > 1e-6, "nothing comes through, so nothing is compared"


@pytest.mark.long
def test_the_approximation_of_a_real_model_is_measured() -> None:
    model, x = build("resnet18")
    masks = masked_convolutions(model)
    exact, rough = (
        fxcompress.compress(model, [Speedup(masks=masks, approximate=flag)], example_inputs=x) for flag in (False, True)
    )
    assert sum(p.numel() for p in rough.parameters()) < sum(p.numel() for p in exact.parameters())
    (line,) = [note for note in rough.meta["history"][-1].notes if "approximated" in note]
    with torch.no_grad():
        gap = relative_gap(exact(x), rough(x))
    assert gap > 1e-4
    assert float(line.split(" by ")[1].split()[0]) >= 0.99 * gap
    assert not any("zero-padded" in note for note in rough.meta["history"][-1].notes)


# ---- generated networks ---------------------------------------------------------------------------------------------


def random_masks(spec: Spec, seed: int) -> dict[str, Tensor]:
    """Masks of random rows, columns or elements of a random part of a network's parameters."""
    parameters = dict(network(spec).named_parameters())
    generator = torch.Generator().manual_seed(seed)
    masks: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        kind = _KINDS[int(torch.randint(len(_KINDS), (), generator=generator))]
        if kind == "none" or not parameter.dim():
            continue
        dim = min(int(kind == "columns"), parameter.dim() - 1)
        shape = [size if d == dim or kind == "elements" else 1 for d, size in enumerate(parameter.shape)]
        keep = torch.rand(shape, generator=generator) > 0.4
        masks[name] = keep.expand(parameter.shape).clone()
        bias = f"{name.rpartition('.')[0]}.bias"
        if parameter.dim() > 1 and kind == "rows" and bias in parameters:
            masks.setdefault(bias, keep.reshape(-1).clone())
    return {name: mask for name, mask in masks.items() if mask.shape == parameters[name].shape}


_KINDS = ("none", "rows", "rows", "rows", "columns", "elements")


def check_masks(spec: Spec, masks: dict[str, Tensor]) -> bool:
    """Removed equals multiplied by hand, at other batch sizes too; whether anything was removed."""
    model = network(spec).eval().double()
    (x,) = inputs(spec)
    try:
        small = fxcompress.compress(model, [Speedup(masks=masks)], example_inputs=x.double())
    except InputError as error:
        assert "mask every channel" in str(error)  # noqa: PT017 - an allowed end, not the one that is asked for
        return False
    twin = multiplied(model, masks)
    again = fxcompress.compress(small, [Speedup()], example_inputs=x.double())
    assert not again.meta["history"][-1].modified
    with torch.no_grad():
        for batch in (1, 5):
            (trial,) = inputs(spec, batch)
            gap = relative_gap(twin(trial.double()), small(trial.double()))
            assert gap <= 1e-9, f"removed and multiplied by hand differ by {gap:.3g} at batch {batch}"
    return sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@given(spec=framed(PLAIN, max_ops=4), seed=st.integers(0, 999))
def test_random_masks_given(spec: Spec, seed: int) -> None:
    check_masks(spec, random_masks(spec, seed))


@pytest.mark.long
@settings(max_examples=400)
@given(spec=framed(PLAIN, max_ops=6), seed=st.integers(0, 9999))
def test_random_masks_given_in_the_long_run(spec: Spec, seed: int) -> None:
    check_masks(spec, random_masks(spec, seed))
