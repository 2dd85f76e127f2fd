"""A model and what it is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Sample:
    """A model with example inputs: a tuple of positional or a dict of keyword arguments, batch 2."""

    model: nn.Module
    inputs: Any


def images(*shape: int, batch: int = 2) -> tuple[Tensor]:
    """A batch of random images (or videos), [batch, *shape]."""
    return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)),)


def tokens(length: int, vocabulary: int = 90, batch: int = 2) -> Tensor:
    """Random token numbers, [batch, length]; none is 0 or 1, which are often padding."""
    return torch.randint(2, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
