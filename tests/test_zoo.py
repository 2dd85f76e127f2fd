"""Real models: how many of their channels can go, and that masked and removed are equal."""

import pytest
import torch
from model_zoo import NAMES, build
from removal import relative_gap
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress import Pass, channel_groups, compress
from fxcompress.passes import L1FilterPruner, L2FilterPruner, RandomFilterPruner, Speedup

#: Removable channels, measured; the numbers only go up.
FLOORS = {
    "resnet18": 2880,
    "resnet50": 11456,
    "resnext50_32x4d": 19008,
    "wide_resnet50_2": 19008,
    "vgg16_bn": 12416,
    "mobilenet_v2": 9128,
    "mobilenet_v3_small": 4872,
    "efficientnet_b0": 11404,
    "efficientnet_v2_s": 38784,
    "mnasnet0_5": 5744,
    "regnet_x_400mf": 12848,
    "regnet_y_400mf": 10288,
    "densenet121": 10240,
    "squeezenet1_1": 2944,
    "googlenet": 7280,
    "inception_v3": 17216,
    "shufflenet_v2_x1_0": 5630,
    "convnext_tiny": 27936,
    "alexnet": 9344,
    "deeplabv3_mobilenet_v3_large": 9208,
}
#: The mean over coupled layers: with the sum a ranking over all layers empties those that are alone first, until
#: nothing comes through and every two models are equal.
SETTINGS: dict[str, Pass] = {
    "layer": L1FilterPruner(0.5),
    "global": L2FilterPruner(0.3, scope="global", norm_by="layer", reduce="mean"),
    "random": RandomFilterPruner(0.5, seed=1),
}
#: What the default suite runs; `make zoo` runs the rest.
QUICK = {
    ("resnet18", "layer"),
    ("squeezenet1_1", "global"),
    ("mobilenet_v3_small", "random"),
    ("shufflenet_v2_x1_0", "layer"),
    ("mnasnet0_5", "global"),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def marked(*case: str, quick: bool) -> object:
    return pytest.param(*case, marks=() if quick else pytest.mark.long)


def trials(x: Tensor) -> list[Tensor]:
    """Inputs of the example's shape, at another batch size, and at another resolution that is not square."""
    side = x.shape[-1] + 32
    shapes = (tuple(x.shape), (3, *x.shape[1:]), (2, 3, side, side - 8))
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def variation(outputs: object) -> float:
    """How much the outputs of the first two rows differ, relative to their size: 0 if nothing comes through."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return max(((leaf[0] - leaf[1]).abs().max() / leaf.abs().max()).item() for leaf in leaves)


@pytest.mark.parametrize("name", [marked(name, quick=name in {n for n, _ in QUICK}) for name in NAMES])
def test_removable_channels(name: str) -> None:
    model, x = build(name)
    groups = channel_groups(model, x)
    assert groups.removable >= FLOORS[name]
    if name == "resnet18":
        assert groups.removable == 64 + 2 * 64 + 128 + 2 * 128 + 256 + 2 * 256 + 512 + 2 * 512
    frozen = [group for group in groups if not group.removable]
    assert all("output" in group.reason for group in frozen), [str(group) for group in frozen]


@pytest.mark.parametrize("name, setting", [marked(n, s, quick=(n, s) in QUICK) for n in NAMES for s in SETTINGS])
def test_masked_and_removed_are_equal(name: str, setting: str) -> None:
    model, x = build(name)
    masked = compress(model, [SETTINGS[setting]], example_inputs=x, verify=False)
    removed = compress(masked, [Speedup()], example_inputs=x, verify=False)
    assert not masked.meta["history"][-1].notes, "every channel that was chosen goes"
    assert sum(p.numel() for p in removed.parameters()) < 0.8 * sum(p.numel() for p in masked.parameters())
    for dtype, tolerance in TOLERANCE.items():
        one, two = masked.to(dtype), removed.to(dtype)
        for trial in trials(x):
            with torch.no_grad():
                expected, found = one(trial.to(dtype)), two(trial.to(dtype))
            assert relative_gap(expected, found) <= tolerance, f"{dtype}, inputs {tuple(trial.shape)}"
            assert variation(found) > 1e-6, "nothing comes through, so nothing is compared"
