"""What it is for: a trained network, half of its channels removed and trained on, is about as good as before.

Handwritten digits of scikit-learn, 8x8 in 17 grey levels: 1,397 to train on and 400 to test on.
"""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fxcompress import compress, count
from fxcompress.passes import L1FilterPruner, Speedup

TEST = 400


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 8, 8] in 0 .. 1 and their classes, shuffled."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 8, 8) / 16, torch.tensor(classes)[order]


class Rows(nn.Module):
    """The rows of an image as a sequence of 8 steps, read in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.lstm = nn.Linear(8, 24), nn.LSTM(24, 24, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.fc(self.lstm(F.relu(self.enter(x)))[0].amax(1)))


class Patches(nn.Module):
    """A vision transformer on 2x2 patches; a class token is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, stride=2)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32) * 0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x.unsqueeze(1)).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.size(0), -1, -1), x), 1) + self.places
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.fc(self.norm(x[:, 0])))


def train(model: nn.Module, images: Tensor, classes: Tensor, epochs: int, rate: float) -> None:
    """A plain loop: Adam, a cosine, cross entropy."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Percent."""
    return 100 * float((model(images).argmax(1) == classes).double().mean())


@pytest.mark.parametrize("kind, rate", [(Rows, 1e-2), pytest.param(Patches, 4e-3, marks=pytest.mark.long)])
def test_half_of_the_channels_after_fine_tuning(
    kind: type[nn.Module], rate: float, digits: tuple[Tensor, Tensor]
) -> None:
    images, classes = digits
    known, held = (images[:-TEST], classes[:-TEST]), (images[-TEST:], classes[-TEST:])
    model = kind()
    train(model, *known, epochs=20, rate=rate)
    dense = accuracy(model, *held)
    masked = compress(model, [L1FilterPruner(0.5)], example_inputs=images[:2])
    train(masked, *known, epochs=10, rate=rate)
    small = compress(masked, [Speedup()], example_inputs=images[:2])
    tuned = accuracy(small, *held)
    assert dense >= 90
    assert tuned >= dense - 2
    assert tuned == accuracy(masked, *held)
    assert count(small, images[:1]).macs < 0.5 * count(model, images[:1]).macs
