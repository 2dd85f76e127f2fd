"""A CNN, a ViT and a GQA transformer, small and with numbers away from their defaults, and tasks for them."""

from typing import Any

import torch
from nets import scatter
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import Task


class Residual(nn.Module):
    """A residual block, a transposed and a depthwise convolution, dropout, functions and methods as activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9)
        self.conv1, self.norm1 = nn.Conv2d(9, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.conv2, self.norm2 = nn.Conv2d(11, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9)
        self.drop, self.relu = nn.Dropout2d(0.3), nn.ReLU(inplace=True)
        self.up = nn.ConvTranspose2d(9, 8, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.fc1, self.fc2 = nn.Linear(8, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        y = self.drop(self.norm1(self.conv1(x))).relu()
        x = self.relu(x + self.norm2(self.conv2(y)))
        x = F.relu6(self.depthwise(F.relu(self.up(x)))).mean((2, 3))
        out: Tensor = self.fc2(self.relu(self.fc1(x)))
        return out


class Attention(nn.Module):
    """Causal attention in which several heads share keys and values; queries and keys are rotated."""

    def __init__(self, width: int, heads: int, shared: int, size: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, size
        self.q = nn.Linear(width, heads * size, bias=False)
        self.k = nn.Linear(width, shared * size, bias=False)
        self.v = nn.Linear(width, shared * size, bias=False)
        self.o = nn.Linear(heads * size, width, bias=False)
        angle = torch.arange(16.0)[:, None] * torch.tensor([1.0, 0.3])[: size // 2].repeat(2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def rotated(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        steps = x.shape[2]
        return x * self.get_buffer("cos")[:steps] + torch.cat((-right, left), -1) * self.get_buffer("sin")[:steps]

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        q, k, v = (
            layer(x).view(batch, steps, heads, self.size).transpose(1, 2)
            for layer, heads in ((self.q, self.heads), (self.k, self.shared), (self.v, self.shared))
        )
        repeats = self.heads // self.shared
        k, v = self.rotated(k).repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        x = F.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        out: Tensor = self.o(x.transpose(1, 2).reshape(batch, steps, -1))
        return out


class Decoder(nn.Module):
    """Two blocks with grouped-query attention and a gated feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.norms = nn.ModuleList(nn.RMSNorm(12) for _ in range(5))
        self.attentions = nn.ModuleList(Attention(12, 6, 2, 4) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(12, 20, bias=False) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(12, 20, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(20, 12, bias=False) for _ in range(2))
        self.head = nn.Linear(12, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i in range(2):
            x = x + self.attentions[i](self.norms[2 * i](x))
            y = self.norms[2 * i + 1](x)
            x = x + self.downs[i](F.silu(self.gates[i](y)) * self.ups[i](y))
        out: Tensor = self.head(self.norms[4](x))
        return out


class ViT(nn.Module):
    """Patches, a class token, positions, and two transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 20, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 20))
        self.positions = nn.Parameter(torch.randn(1, 5, 20))
        layer = nn.TransformerEncoderLayer(20, 5, 30, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(20), enable_nested_tensor=False)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        out: Tensor = self.head(self.layers(x)[:, 0])
        return out


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def _labelled(inputs: list[Tensor], labels: int) -> list[tuple[Tensor, Tensor]]:
    made = []
    for x in inputs:
        shape = x.shape if x.dim() == 2 else x.shape[:1]
        made.append((x, torch.arange(shape.numel()).reshape(shape) % labels))
    return made


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Task]:
    """A model, example inputs, and a task whose batches have other sizes than the example, and differ in size."""
    torch.manual_seed(3)
    model: nn.Module
    sizes = (4, 6, 2)
    if name == "gqa":
        model, labels = Decoder(), 17
        inputs = [torch.randint(0, 17, (size, 6)) for size in sizes]
    else:
        model, labels = (Residual(), 5) if name == "cnn" else (ViT(), 7)
        inputs = [torch.randn(size, 3, 8, 8, dtype=dtype) for size in sizes]
    scatter(model)
    example = inputs[0][:3]
    task = Task(batches=_labelled(inputs, labels), loss=cross_entropy)
    return model.eval().to(dtype), example, task


def dead_channels(masked: nn.Module, weight: str, dim: int = 0) -> set[int]:
    """The rows of a weight that are masked whole."""
    from fxcompress import masks

    found: Any = masks(masked).get(weight)
    if found is None:
        return set()
    lines = found.movedim(dim, 0).reshape(found.shape[dim], -1).any(1)
    return set((~lines).nonzero().flatten().tolist())
