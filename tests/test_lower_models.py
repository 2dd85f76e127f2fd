"""Ten models in int8 agree with their simulations, over a thousand inputs, and are a quarter as large."""

import pytest
import torch
from lowered_models import MODELS, measure

from fxcompress.lower.features import has_int8_instructions

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not has_int8_instructions(), reason="no 8-bit multiply-accumulate instructions"),
]


@pytest.mark.parametrize("name", MODELS)
def test_lowered_equals_simulated(name: str) -> None:
    with torch.no_grad():
        row = measure(name)
    assert row.steps <= 1
    assert row.share < 0.01
    assert row.gap < 1e-5
    assert row.clear >= 500
    assert row.agree >= min(0.995, row.control)  # nobody agrees more with the simulation than it does with itself
    assert row.bytes <= 0.27
