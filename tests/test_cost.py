"""MACs, parameters, bytes and latency, against counts by hand and those that torchvision publishes."""

import contextlib
from collections.abc import Callable
from typing import Any

import model_zoo
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress.cost import Cost, byte_count, count


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def macs(function: Callable[..., Any], *args: Any) -> int:
    return count(function if isinstance(function, nn.Module) else Call(function), args).macs


def row(cost: Cost, name: str, kind: str | None = None) -> Any:
    (found,) = [each for each in cost.table if each.name == name and kind in (None, each.kind)]
    return found


# ---- MACs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.Linear(7, 5), (2, 7), 35),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 3 * 35),
        (nn.Linear(7, 5), (2, 3, 4, 7), 12 * 35),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7), 35 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2), (2, 4, 9, 9), 16 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 9), 25 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (1, 5), padding="same"), (2, 4, 3, 9), 27 * 6 * 4 * 5),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 9 * 6 * 2 * 9),
        (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5), 9 * 8 * 9),  # depthwise, two outputs per channel
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 5), 24 * 3 * 2 * 8),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 10), 10 * 4 * 6 * 3),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1), (2, 4, 5, 5), 25 * 4 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 5), 25 * 4 * 3 * 4),
        (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 4, 5), 60 * 2 * 3 * 8),
        (nn.BatchNorm2d(4), (2, 4, 5, 5), 0),
        (nn.GELU(), (2, 4), 0),
    ],
    ids=repr,
)
def test_layers(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    found = count(layer, torch.randn(shape))
    assert found.macs == expected
    assert found.params == sum(parameter.numel() for parameter in layer.parameters())


CONVOLUTIONS = (
    (nn.Conv1d, nn.ConvTranspose1d),
    (nn.Conv2d, nn.ConvTranspose2d),
    (nn.Conv3d, nn.ConvTranspose3d),
)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    cls: Any = draw(st.sampled_from(CONVOLUTIONS[dims - 1]))
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    layer = cls(*channels, kernel, stride=stride, dilation=dilation, groups=groups, bias=False)
    space = [draw(st.integers(5, 7)) for _ in range(dims)]
    return layer, torch.ones(draw(st.integers(1, 3)), channels[0], *space, dtype=torch.float64)


@given(drawn=convolutions())
def test_with_ones_everywhere_a_convolution_adds_up_its_own_macs(drawn: tuple[nn.Module, Tensor]) -> None:
    """Without padding every product of ones adds 1 to some output."""
    layer, x = drawn
    layer = layer.double()
    with torch.no_grad():
        nn.init.ones_(layer.get_parameter("weight"))
        assert count(layer, x).macs == layer(x).sum().item() / len(x)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    "function, args",
    [
        (lambda a, b: a @ b, (ones(1, 3, 4), ones(4, 5))),
        (lambda a, b: a @ b, (ones(1, 2, 3, 4), ones(2, 4, 5))),
        (lambda a, b: a[0] @ b, (ones(1, 3, 4), ones(4))),  # mv
        (lambda a, b: a[0] @ b, (ones(1, 4), ones(4, 5))),
        (lambda a, b: a[0] @ b, (ones(1, 4), ones(4))),  # dot
        (torch.bmm, (ones(1, 3, 4), ones(1, 4, 5))),
        (lambda a, b: torch.addmm(torch.zeros(5), a[0], b), (ones(1, 3, 4), ones(4, 5))),
        (lambda a, b: torch.addmv(torch.zeros(3), a[0], b), (ones(1, 3, 4), ones(4))),
        (lambda a, b: torch.baddbmm(torch.zeros(2, 3, 5), a[0], b), (ones(1, 2, 3, 4), ones(2, 4, 5))),
        (lambda a, b: torch.zeros(2, 3, 5).baddbmm_(a[0], b), (ones(1, 2, 3, 4), ones(2, 4, 5))),
        (lambda a, b: torch.addbmm(torch.zeros(3, 5), a[0], b), (ones(1, 2, 3, 4), ones(2, 4, 5))),
        (lambda a, b: torch.mm(a[0], b, out=torch.empty(3, 5)), (ones(1, 3, 4), ones(4, 5))),
        (lambda a, b: torch.einsum("bij,jk->bik", a, b), (ones(1, 3, 4), ones(4, 5))),
        (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), (ones(1, 2, 3, 4), ones(1, 2, 5, 4))),
        (lambda a, b: torch.einsum("hik,khj->ij", a[0], b), (ones(1, 3, 6, 4), ones(4, 3, 5))),
        (F.linear, (ones(1, 3, 4), ones(5, 4))),
        (F.conv2d, (ones(1, 3, 4, 4), ones(5, 3, 2, 2))),
    ],
)
def test_matrix_products_of_ones_add_up_their_own_macs(
    function: Callable[..., Tensor], args: tuple[Tensor, ...]
) -> None:
    assert macs(function, *args) == function(*args).sum().item()


HEADS, LENGTH, OTHER, WIDTH, VALUES = 3, 5, 7, 8, 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "key_heads, value_width, options",
    [
        (HEADS, WIDTH, {}),
        (HEADS, WIDTH, {"is_causal": True}),
        (HEADS, WIDTH, {"attn_mask": torch.ones(LENGTH, OTHER, dtype=torch.bool)}),
        (HEADS, WIDTH, {"attn_mask": torch.zeros(LENGTH, OTHER)}),
        (HEADS, VALUES, {}),  # this one has no fused kernel on the CPU
        (1, WIDTH, {"enable_gqa": True}),
    ],
    ids=["plain", "causal", "bool mask", "float mask", "narrow values", "grouped queries"],
)
def test_attention_is_two_matrix_products(
    dtype: torch.dtype, key_heads: int, value_width: int, options: dict[str, Any]
) -> None:
    query = torch.randn(2, HEADS, LENGTH, WIDTH, dtype=dtype)
    key = torch.randn(2, key_heads, OTHER, WIDTH, dtype=dtype)
    value = torch.randn(2, key_heads, OTHER, value_width, dtype=dtype)
    if isinstance(mask := options.get("attn_mask"), Tensor) and mask.is_floating_point():
        options = {"attn_mask": mask.to(dtype)}
    found = count(Call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)), (query, key, value))
    assert found.macs == HEADS * LENGTH * OTHER * (WIDTH + value_width)
    assert [(each.kind, each.output) for each in found.table if each.macs] == [
        ("attention", (2, HEADS, LENGTH, value_width))
    ]


class Attention(nn.Module):
    """The attention block of a ViT, as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


VIT_TINY = (197 * 192 * 576, 2 * 197 * 197 * 192, 197 * 192 * 192)


def test_the_attention_block_of_vit_tiny() -> None:
    found = count(Attention(192, 3), torch.randn(2, 197, 192))
    assert [(each.name, each.kind, each.macs) for each in found.table if each.macs] == [
        ("", "attention", VIT_TINY[1]),
        ("qkv", "Linear", VIT_TINY[0]),
        ("proj", "Linear", VIT_TINY[2]),
    ]
    assert found.macs == 43_951_488


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights: bool) -> None:
    x = torch.randn(1, 197, 192)
    inputs = {"query": x, "key": x, "value": x, "need_weights": need_weights}
    assert count(nn.MultiheadAttention(192, 3, batch_first=True), inputs).macs == sum(VIT_TINY)


def test_transformer_layers_count_as_their_parts() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    found = count(layer, torch.randn(3, 5, 16))
    assert row(found, "linear1").macs == 5 * 16 * 32
    assert found.macs == 5 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("cls, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(
    cls: Callable[..., nn.Module], gates: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = cls(6, 5, **options).to(dtype)
    x = torch.randn(4, 4, 6, dtype=dtype)  # as many steps as samples
    inner = {"num_layers": 5 * 5 + 5 * 5, "bidirectional": 6 * 5 + 5 * 5}
    expected = 4 * gates * (6 * 5 + 5 * 5 + sum(inner[name] for name in options if name in inner))
    assert count(layer, x).macs == expected


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projected_lstm_and_a_cell() -> None:
    layer = nn.LSTM(6, 5, proj_size=2, batch_first=True)
    assert count(layer, torch.randn(3, 4, 6)).macs == 4 * (4 * (6 * 5 + 2 * 5) + 5 * 2)
    assert count(nn.LSTMCell(6, 5), torch.randn(3, 6)).macs == 4 * (6 * 5 + 5 * 5)


@pytest.mark.parametrize(
    "kernel, extra",
    [
        ("_scaled_dot_product_flash_attention", ()),
        ("_scaled_dot_product_efficient_attention", (None, False)),
        ("_scaled_dot_product_cudnn_attention", (None, False)),
        ("_scaled_dot_product_fused_attention_overrideable", ()),
    ],
)
def test_attention_kernels_of_other_devices(kernel: str, extra: tuple[Any, ...]) -> None:
    operator = getattr(torch.ops.aten, kernel)
    q, k = (torch.empty(2, HEADS, length, WIDTH, device="meta") for length in (LENGTH, OTHER))
    v = k[..., :VALUES] if "efficient" in kernel else k  # the others want equal widths
    expected = HEADS * LENGTH * OTHER * (WIDTH + v.shape[-1])
    assert macs(lambda *qkv: operator(*qkv, *extra), q, k, v) == expected


def test_recurrent_kernel_of_cuda() -> None:
    weights = [torch.empty(shape, device="meta") for shape in ((20, 6), (20, 5), (20,), (20,))]
    hidden = torch.empty(1, 3, 5, device="meta")
    options: tuple[Any, ...] = (2, 5, 0, 1, True, 0.0, False, False, [], None)

    def run(x: Tensor) -> Any:
        return torch.ops.aten._cudnn_rnn(x, weights, 4, None, hidden, hidden, *options)

    assert macs(run, torch.empty(3, 4, 6, device="meta")) == 4 * (20 * 6 + 20 * 5)


@pytest.mark.skipif("mkldnn" not in torch.__config__.show().lower(), reason="torch was built without oneDNN")
def test_fused_onednn_operators() -> None:
    weight = torch.randn(6, 4, 3, 3)
    fused = torch.ops.mkldnn._convolution_pointwise
    args: tuple[Any, ...] = ([0, 0], [1, 1], [1, 1], 1, "relu", [], "")
    assert macs(lambda x: fused(x, weight, None, *args), torch.randn(2, 4, 5, 5)) == 9 * 6 * 4 * 9
    matrix = torch.randn(5, 7)
    linear = torch.ops.mkldnn._linear_pointwise
    assert macs(lambda x: linear(x, matrix, None, "relu", [], ""), torch.randn(2, 3, 7)) == 3 * 35


# ---- per sample ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_figures_are_per_sample(batch: int) -> None:
    model, x = model_zoo.build("squeezenet1_1", batch=3)
    expected = count(model, x)
    found = count(model, torch.randn(batch, 3, 64, 64))
    assert (found.macs, found.elementwise) == (expected.macs, expected.elementwise)
    assert [(each.name, each.macs) for each in found.table] == [(each.name, each.macs) for each in expected.table]


def test_work_on_weights_is_shared_by_the_samples_and_rounded_up() -> None:
    left, right = torch.randn(4, 3), torch.randn(3, 5)

    def run(x: Tensor) -> Tensor:
        return x @ (left @ right)  # 20 for each sample, and 60 for all

    assert macs(run, torch.randn(1, 4)) == 80
    assert macs(run, torch.randn(2, 4)) == 50
    assert macs(run, torch.randn(7, 4)) == 29


def test_the_batch_is_that_of_the_first_tensor() -> None:
    def run(scale: Tensor, x: Tensor, *, y: Tensor) -> Tensor:
        return scale * (x @ y)

    scale, x, y = torch.tensor(2.0), torch.randn(4, 3), torch.randn(3, 6)
    assert count(Call(run), {"scale": scale, "x": x, "y": y}).macs == 18


# ---- where the work belongs ------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer used twice, a function of the model itself, and a layer that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.body = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.body(self.body(x)) + x) @ self.weight
        return y


def test_rows_of_a_module() -> None:
    found = count(Twice(), torch.randn(5, 4))
    assert [(r.name, r.kind, r.macs, r.params, r.bytes, r.output, r.elementwise) for r in found.table] == [
        ("", "Twice", 8, 8, 32, (5, 2), 4),
        ("unused", "Linear", 0, 12, 48, (), 0),
        ("body.0", "Linear", 32, 16, 64, (5, 4), 0),
        ("body.1", "ReLU", 0, 0, 0, (5, 4), 8),
    ]
    assert (found.macs, found.params, found.bytes, found.elementwise) == (40, 36, 144, 12)


def test_rows_of_a_graph_module() -> None:
    found = count(fx.symbolic_trace(Twice()), torch.randn(5, 4))
    assert [(r.name, r.kind, r.macs, r.params, r.output, r.elementwise) for r in found.table] == [
        ("", "Twice", 0, 8, (5, 2), 0),
        ("body.0", "Linear", 32, 16, (5, 4), 0),
        ("body.1", "ReLU", 0, 0, (5, 4), 8),
        ("add", "add", 0, 0, (5, 4), 4),
        ("matmul", "matmul", 8, 0, (5, 2), 0),
    ]


def test_a_graph_module_has_the_totals_of_its_model() -> None:
    model, x = model_zoo.build("mobilenet_v3_small")
    plain, traced = count(model, x), count(fx.symbolic_trace(model), x)
    for figure in ("macs", "params", "bytes", "elementwise"):
        assert getattr(plain, figure) == getattr(traced, figure)


def test_an_exported_graph() -> None:
    x = torch.randn(2, 197, 192)
    exported = torch.export.export(Attention(192, 3).eval(), (x,)).module()
    found = count(exported, x)
    assert [each.kind for each in found.table if each.macs] == ["linear", "attention", "linear"]
    assert tuple(each.macs for each in found.table if each.macs) == VIT_TINY


def test_a_graph_module_takes_keywords_and_defaults() -> None:
    class Options(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0, y: Any = None) -> Tensor:
            return torch.matmul(x * scale, y)

    graph, x, y = fx.symbolic_trace(Options()), torch.randn(1, 3, 4), torch.randn(4, 2)
    assert count(graph, {"x": x, "y": y}).macs == 24
    assert count(graph, (x, 1.0, y)).macs == 24


def test_a_failure_that_the_model_handles_spoils_no_names() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    class Handles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Sequential(Fails()), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.first(x)
            y: Tensor = self.second(x) @ self.second.weight
            return y

    model = Handles()
    model.second.register_forward_pre_hook(lambda _, args: args[0] @ torch.ones(4, 4))
    found = count(model, torch.randn(2, 4))
    assert [(each.name, each.macs) for each in found.table] == [("", 12), ("second", 12 + 16)]


def test_scripted_layers_count_where_they_are_used() -> None:
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    found = count(nn.Sequential(scripted, nn.Linear(3, 2)), torch.randn(5, 4))
    assert (found.macs, found.params) == (12 + 6, 15 + 8)
    assert scripted.training


def test_element_wise_work() -> None:
    x = torch.randn(2, 3, 4, 4)
    for layer in (
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.Hardswish(),
        nn.Hardswish(inplace=True),
        nn.PReLU(3),
        nn.GELU(),
    ):
        assert count(layer, x).elementwise == 48, layer
    assert count(Call(lambda x: x.permute(0, 2, 3, 1).contiguous()), x).elementwise == 0
    assert count(Call(lambda x: x.masked_fill(torch.tensor(True), 0.0)), x).elementwise == 48
    assert count(Call(lambda x: x * 2 + x), x).elementwise == 96
    assert count(Call(lambda x: x * torch.ones(5, 1, 1, 1, 1)), x).elementwise == 5 * 48


# ---- parameters and bytes --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(x))
        return y


def test_tied_weights_count_once_and_buffers_only_as_bytes() -> None:
    found = count(Tied(), torch.zeros(2, 5, dtype=torch.long))
    assert (found.macs, found.params, found.bytes) == (5 * 40, 40, 160 + 24)
    assert [(each.name, each.params, each.bytes) for each in found.table] == [
        ("", 0, 24),
        ("embedding", 40, 160),
        ("head", 0, 0),
    ]


def test_bytes_follow_the_dtype() -> None:
    assert count(Tied().half(), torch.zeros(1, 5, dtype=torch.long)).bytes == 80 + 6
    norm = nn.BatchNorm1d(6)
    assert byte_count(norm) == 4 * 6 * 4 + 8  # num_batches_tracked is an int64


def test_shared_storage_counts_once() -> None:
    def holding(*buffers: Tensor) -> int:
        module = nn.Module()
        for index, buffer in enumerate(buffers):
            module.add_module(f"m{index}", nn.Module())
            module.get_submodule(f"m{index}").register_buffer("b", buffer)
        return byte_count(module)

    base = torch.zeros(6, 5)
    assert holding(base, base.view(30)) == 120
    assert holding(base, base[:2]) == 120
    assert holding(base[:2], base[2:]) == 120  # parts of one storage, as cuDNN keeps the weights of an LSTM
    assert holding(torch.zeros(5).expand(6, 5)) == 20
    assert holding(base, base.clone()) == 240
    assert holding(torch.zeros(6, 5, device="meta"), torch.zeros(6, 5, device="meta")) == 240
    assert holding(torch.zeros(0), torch.zeros(0)) == 0


def test_the_text_of_a_cost_is_a_table_with_totals() -> None:
    found = count(torchvision.models.resnet18(), torch.randn(1, 3, 224, 224))
    lines = str(found).splitlines()
    (conv,) = [line.split() for line in lines if line.split()[:1] == ["conv1"]]
    assert conv == ["conv1", "Conv2d", "1x64x112x112", "118,013,952", "9,408", "37,632", "0"]
    assert lines[-1].split()[:4] == ["total", "1,814,073,344", "11,689,512", f"{found.bytes:,}"]
    assert "(model)" in str(count(nn.Linear(3, 2), torch.randn(1, 3)))
