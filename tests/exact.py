"""Equality for tests of capture: a traced model runs the operators that the model runs."""

from typing import Any

import torch


def assert_same(expected: Any, found: Any) -> None:
    """Bit for bit, in any nest of tensors."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
