"""Small models of structures that are drawn seldom: every channel counted by hand, halved, and exact at other sizes."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import scatter
from removal import relative_gap
from torch import Tensor, nn

import fxcompress
from fxcompress import compress, count, masks
from fxcompress.passes import L1FilterPruner, Speedup


def halved(model: nn.Module, x: Any, others: Sequence[Any], removable: int) -> nn.Module:
    """Half of all channels removed: verified by `compress`, and equal to the masked model and to one zeroed by hand."""
    scatter(model)
    model = model.double().eval()
    assert fxcompress.channel_groups(model, x).removable == removable
    masked = compress(model, [L1FilterPruner(0.5)], example_inputs=x)
    small = compress(masked, [Speedup()], example_inputs=x)
    zeroed, kept = copy.deepcopy(model), masks(masked)
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            parameter *= kept.get(name, torch.ones_like(parameter, dtype=torch.bool))
        for given in (x, *others):
            args = given if isinstance(given, tuple) else (given,)
            wanted = small(*args)
            assert relative_gap(wanted, masked(*args)) <= 1e-9
            assert relative_gap(wanted, zeroed(*args)) <= 1e-9
    assert count(masked, x).after == count(small, x)
    return small


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Double(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """Down twice, up twice by transposed convolutions (one grouped), skips concatenated in front."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = Double(3, 7), Double(7, 11), Double(11, 14)
        self.up2, self.up1 = nn.ConvTranspose2d(14, 10, 2, 2, groups=2), nn.ConvTranspose2d(11, 7, 2, 2)
        self.left2, self.left1, self.out = Double(21, 11), Double(14, 7), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.up2(self.middle(F.max_pool2d(second, 2)))
        y = self.left2(torch.cat((second, F.interpolate(y, size=second.shape[2:])), 1))
        y = self.left1(torch.cat((first, F.interpolate(self.up1(y), size=first.shape[2:])), 1))
        return self.out(y)


def test_unet() -> None:
    # both convolutions of every Double: 2 * (7 + 11 + 14 + 11 + 7), and the two that enlarge: 10 + 7
    small = halved(UNet(), rand(2, 3, 18, 13), [rand(1, 3, 16, 16), rand(3, 3, 21, 26)], 2 * 50 + 17)
    up2, up1 = small.get_submodule("up2"), small.get_submodule("up1")
    assert [(m.in_channels, m.out_channels, m.groups) for m in (up2, up1)] == [(8, 6, 2), (6, 4, 1)]


class Pyramid(nn.Module):
    """Three scales of a backbone, brought to one width, added from the top down, a head at each."""

    def __init__(self) -> None:
        super().__init__()
        widths = (6, 9, 13)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.SiLU())
            for i, o in zip((3, *widths), widths, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, 11, 1) for width in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(11, 11, 3, padding=1) for _ in widths)
        self.head = nn.Conv2d(11, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            scales.append(lateral(x))
        for i in (1, 0):
            scales[i] = scales[i] + F.interpolate(scales[i + 1], size=scales[i].shape[-2:], mode="nearest")
        return [self.head(F.relu(smooth(scale))) for smooth, scale in zip(self.smooth, scales, strict=True)]


def test_feature_pyramid() -> None:
    # 6 + 9 + 13 of the backbone, 11 that the laterals share, 11 that the smoothing convolutions share by the one head
    halved(Pyramid(), rand(2, 3, 33, 26), [rand(3, 3, 32, 32)], 28 + 11 + 11)


class Audio(nn.Module):
    """A waveform through strided, dilated, depthwise and transposed 1d convolutions; a class and a reconstruction."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv1d(1, 9, 7, stride=2, padding=3), nn.BatchNorm1d(9)
        self.wide, self.norm2 = nn.Conv1d(9, 9, 3, padding=4, dilation=4), nn.BatchNorm1d(9)
        self.depth, self.point = nn.Conv1d(9, 9, 5, padding=2, groups=9), nn.Conv1d(9, 15, 1)
        self.act, self.fc = nn.PReLU(15), nn.Linear(15, 4)
        self.rise, self.back = nn.ConvTranspose1d(15, 15, 4, 2, 1, groups=15), nn.Conv1d(15, 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.norm1(self.stem(x)))
        x = x + F.relu(self.norm2(self.wide(x)))
        x = self.act(self.point(self.depth(x)))
        return self.fc(x.mean(-1)), self.back(self.rise(x))


def test_audio() -> None:
    # 9 on the residual stream, passed on by the depthwise convolution, and 15 behind `point`, enlarged each by itself
    small = halved(Audio(), rand(2, 1, 61), [rand(5, 1, 100), rand(1, 1, 33)], 9 + 15)
    assert small.get_submodule("rise").groups == 8  # type: ignore[comparison-overlap]


class Video(nn.Module):
    """Clips through 3d convolutions, spatial and temporal ones apart, a GroupNorm, a transposed one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.norm = nn.Conv3d(3, 10, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(10)
        self.time = nn.Conv3d(10, 12, (3, 1, 1), padding=(1, 0, 0))
        self.group, self.mix = nn.GroupNorm(3, 12), nn.Conv3d(12, 12, 3, padding=1, groups=3)
        self.grow, self.fc = nn.ConvTranspose3d(12, 9, (1, 2, 2), (1, 2, 2), groups=3), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.space(x)))
        x = F.gelu(self.group(self.time(x)))
        x = F.avg_pool3d(F.relu(self.mix(x)), 2)
        return self.fc(self.grow(x).amax((2, 3, 4)))


def test_video() -> None:
    # 10, 12 behind `time` (4 in each of 3 groups), 12 behind `mix`, 9 behind `grow`; a norm masked is no norm zeroed
    model = Video()
    scatter(model)
    model = model.double().eval()
    x = rand(2, 3, 4, 9, 8)
    assert fxcompress.channel_groups(model, x).removable == 10 + 12 + 12 + 9
    masked = compress(model, [L1FilterPruner(0.5)], example_inputs=x)
    small = compress(masked, [Speedup()], example_inputs=x)
    layers = [small.get_submodule(name) for name in ("space", "time", "mix", "grow")]
    assert [layer.out_channels for layer in layers] == [5, 6, 6, 6]
    with torch.no_grad():
        for other in (rand(3, 3, 5, 7, 12), rand(1, 3, 2, 6, 6)):
            assert relative_gap(small(other), masked(other)) <= 1e-9


class Sequences(nn.Module):
    """Words through an embedding and an LSTM in both directions to a class."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 13)
        self.lstm = nn.LSTM(13, 11, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.hidden, self.fc = nn.Linear(22, 9), nn.Linear(9, 3)

    def forward(self, words: Tensor) -> Tensor:
        _, (state, _) = self.lstm(self.words(words))
        return self.fc(F.relu(self.hidden(torch.cat((state[-2], state[-1]), 1))))


def test_sequence_classifier() -> None:
    # 13 of the embedding, 11 units in each of 2 layers and directions, 9
    x, other = torch.randint(0, 50, (2, 7)), torch.randint(0, 50, (5, 12))
    small = halved(Sequences(), x, [other, other[:1, :3]], 13 + 4 * 11 + 9)
    lstm: Any = small.get_submodule("lstm")
    assert (type(lstm), lstm.input_size, lstm.hidden_size) == (nn.LSTM, 7, 6)


class Translator(nn.Module):
    """A GRU that reads, and one that writes, started from its state, with attention over what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(30, 8), nn.Embedding(20, 10)
        self.reader = nn.GRU(8, 7, batch_first=True, bidirectional=True)
        self.bridge, self.keys = nn.Linear(14, 13), nn.Linear(14, 13, bias=False)
        self.writer = nn.GRU(10, 13, batch_first=True)
        self.join, self.out = nn.Linear(13 + 14, 15), nn.Linear(15, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read, last = self.reader(self.source(source))
        start = torch.tanh(self.bridge(last.transpose(0, 1).flatten(1)))
        written, _ = self.writer(self.target(target), start.unsqueeze(0))
        scores = written @ self.keys(read).transpose(1, 2)
        context = scores.softmax(-1) @ read
        return self.out(torch.tanh(self.join(torch.cat((written, context), -1))))


def test_translator() -> None:
    # embeddings 8 and 10, 7 units in both directions, 13 that start, write and attend, 15 that join
    x = (torch.randint(0, 30, (2, 6)), torch.randint(0, 20, (2, 5)))
    other = (torch.randint(0, 30, (3, 9)), torch.randint(0, 20, (3, 4)))
    small = halved(Translator(), x, [other], 8 + 10 + 2 * 7 + 13 + 15)
    reader: Any = small.get_submodule("reader")
    writer: Any = small.get_submodule("writer")
    assert [(m.input_size, m.hidden_size) for m in (reader, writer)] == [(4, 4), (5, 7)]


# ---- transposed convolutions in groups -------------------------------------------------------------------------------

KINDS: dict[int, Any] = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


class Enlarged(nn.Module):
    """A convolution, a transposed one in groups, a norm and a convolution."""

    def __init__(self, dims: int, out: int, groups: int, **options: Any) -> None:
        super().__init__()
        convolution, transposed, norm = KINDS[dims]
        self.a, self.d = convolution(3, 12, 1), transposed(12, out, 3, stride=2, groups=groups, **options)
        self.norm, self.c = norm(out), convolution(out, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.norm(self.d(F.relu(self.a(x))))))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "out, groups, removable, left",
    [
        (15, 3, 12 + 15, (6, 9, 3)),  # 4 inputs and 5 outputs in each group, of which 2 and 2 go
        (12, 12, 12, (6, 6, 6)),  # depthwise
        (24, 12, 12, (6, 12, 6)),  # two outputs of each input, which go with it
        (4, 4, 12, (8, 4, 4)),  # the only output of its group stays; of 3 inputs 1 goes
    ],
)
def test_transposed_in_groups(
    dims: int, bias: bool, out: int, groups: int, removable: int, left: tuple[int, int, int]
) -> None:
    x, other = rand(2, 3, *[5, 4, 3][:dims]), rand(3, 3, *[4, 6, 2][:dims])
    small = halved(Enlarged(dims, out, groups, bias=bias, output_padding=1), x, [other], removable)
    layer: Any = small.get_submodule("d")
    assert (layer.in_channels, layer.out_channels, layer.groups) == left


def test_channels_of_a_grouped_transposed_weight_are_its_own() -> None:
    """Output j of group g is made by the rows of group g alone: its score is theirs."""
    model = Enlarged(2, 15, 3).double().eval()
    with torch.no_grad():
        model.d.weight.fill_(1.0)
        for group, index in ((0, 4), (1, 0), (2, 2)):
            model.d.weight[4 * group : 4 * group + 4, index] = 0.1
    x = rand(2, 3, 5, 4)
    groups = fxcompress.channel_groups(model, x)
    assert groups["d"].rows == 3
    assert ("d.weight", 1) in groups["d"].members
    masked = compress(model, [L1FilterPruner(0.2, include="d")], example_inputs=x)
    assert (~masks(masked)["d.bias"]).nonzero().flatten().tolist() == [4, 5, 12]
    assert groups.grouped["d"] == 3


def test_functional_and_repeated() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(20, 2, 1)
            self.d, self.w = nn.ConvTranspose2d(12, 12, 3, groups=3), nn.Parameter(torch.ones(12, 5, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.d(F.relu(self.d(self.a(x))))
            return self.c(F.conv_transpose2d(x, self.w, stride=2, groups=4))

    # 12, the same before and behind a layer that is called twice, and 20
    halved(Twice(), rand(2, 3, 5, 4), [rand(3, 3, 4, 7)], 12 + 20)


def test_a_computed_weight_of_a_grouped_transposed_convolution_keeps_its_channels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(15, 2, 1)
            self.w, self.s = nn.Parameter(torch.ones(12, 5, 2, 2)), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.conv_transpose2d(self.a(x), self.w * self.s, groups=3))

    groups = fxcompress.channel_groups(Scaled(), torch.randn(2, 3, 5, 4))
    assert groups.removable == 0
    assert "weight of a grouped transposed convolution is computed" in groups["a"].reason
