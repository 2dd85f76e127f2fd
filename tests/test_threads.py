"""Compressing in several threads at once: torch's modes, default dtype and generator belong to the whole process."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

import fxcompress
from fxcompress.passes import L1FilterPruner, Speedup


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 9, 1), nn.Flatten(), nn.Linear(324, 5)]
    return nn.Sequential(*layers).eval()


def process_state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "generator": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
    }


def test_compressing_in_threads_leaves_the_process_as_it_was() -> None:
    x = torch.randn(2, 3, 8, 8)
    models = [network(seed) for seed in range(12)]
    passes = [L1FilterPruner(0.5), Speedup()]
    torch.manual_seed(5)
    before = process_state()

    def work(model: nn.Module) -> tuple[fxcompress.TracedModule, int, int]:
        small = fxcompress.compress(model, passes, example_inputs=x)
        return small, fxcompress.count(small, x).macs, fxcompress.channel_groups(model, x).removable

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, models))
    assert process_state() == before
    for model, (small, macs, removable) in zip(models, together, strict=True):
        alone, expected_macs, expected = work(model)
        assert (macs, removable) == (expected_macs, expected)
        assert torch.equal(alone(x), small(x))
