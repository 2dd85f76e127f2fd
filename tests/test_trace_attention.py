"""Capture: `nn.MultiheadAttention` written out, and the Transformer layers that hold it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import L1FilterPruner, Speedup

DIM, HEADS, QUERIES, KEYS = 8, 2, 3, 5


class Attend(nn.Module):
    """One call of an attention layer: which of its inputs are one tensor, and the options of the call."""

    def __init__(self, layer: nn.MultiheadAttention, same: str, **call: Any) -> None:
        super().__init__()
        self.layer, self.same, self.call = layer, same, call

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.same == "qkv":
            k = v = q
        if self.same == "kv":
            v = k
        options = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, **self.call}
        result: tuple[Tensor, Tensor | None] = self.layer(q, k, v, **options)
        return result


def attend(same: str, call: dict[str, Any], **options: Any) -> Attend:
    """In float64, biases drawn away from their zero."""
    layer = nn.MultiheadAttention(DIM, HEADS, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return Attend(layer, same, **call).eval()


def inputs(model: Attend, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    keys = QUERIES if model.same == "qkv" else KEYS
    shapes = [(QUERIES, DIM), (keys, model.layer.kdim), (keys, model.layer.vdim)]
    made = [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]
    q, k, v = made if model.layer.batch_first else [tensor.transpose(0, 1) for tensor in made]
    return q, k, v


def close(expected: Any, found: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@contextmanager
def plain_attention() -> Iterator[None]:
    """The reference by torch's ordinary path: its fast path is another implementation with other defaults."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def check(model: Attend, extras: dict[int, dict[str, Tensor]]) -> fxcompress.TracedModule:
    """Equal at every batch size in ``extras``, the first of which is the one that is traced."""
    first = next(iter(extras))
    names = ("q", "k", "v")
    traced = fxcompress.trace(model, dict(zip(names, inputs(model, first), strict=True)) | extras[first])
    for batch, extra in extras.items():
        given = dict(zip(names, inputs(model, batch), strict=True)) | extra
        close(model(**given), traced(**given))
    assert not any(
        isinstance(traced.get_submodule(str(node.target)), nn.MultiheadAttention)
        for node in traced.graph.nodes
        if node.op == "call_module"
    )
    assert set(traced.state_dict()) == set(model.state_dict())
    return traced


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("same", ["qkv", "kv", ""])
def test_self_and_cross_attention(same: str, need_weights: bool, batch_first: bool) -> None:
    model = attend(same, {"need_weights": need_weights}, batch_first=batch_first)
    check(model, {2: {}, 5: {}, 1: {}})


@pytest.mark.parametrize(
    "options, call",
    [
        ({"bias": False}, {}),
        ({"add_bias_kv": True}, {}),
        ({"add_zero_attn": True}, {}),
        ({"add_bias_kv": True, "add_zero_attn": True}, {"need_weights": False}),
        ({"kdim": 6, "vdim": 10}, {}),
        ({"kdim": 6, "vdim": 10, "bias": False}, {"need_weights": False}),
        ({"kdim": 6, "vdim": 10, "add_bias_kv": True}, {}),
        ({}, {"average_attn_weights": False}),
        ({"dropout": 0.5}, {}),
        ({"dropout": 0.5}, {"need_weights": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_options(options: dict[str, Any], call: dict[str, Any], batch_first: bool) -> None:
    check(attend("", call, batch_first=batch_first, **options), {2: {}, 4: {}})


def masks(kind: str, batch: int) -> dict[str, Tensor]:
    """Masks that leave every query at least one key."""
    padding = torch.zeros(batch, KEYS, dtype=torch.bool)
    padding[0, 3:] = True
    pairs = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(2)
    made = {
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": padding.double() * -3},
        "pairs": {"attn_mask": pairs},
        "float pairs": {"attn_mask": torch.randn(QUERIES, KEYS, dtype=torch.float64)},
        "pairs by head": {"attn_mask": pairs.expand(batch * HEADS, QUERIES, KEYS)},
        "both": {"key_padding_mask": padding, "attn_mask": pairs},
    }
    return made[kind]


@pytest.mark.parametrize("kind", ["padding", "float padding", "pairs", "float pairs", "pairs by head", "both"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extended", [False, True])
def test_masks(kind: str, need_weights: bool, extended: bool) -> None:
    options = {"add_bias_kv": extended, "add_zero_attn": extended}
    model = attend("", {"need_weights": need_weights}, batch_first=True, **options)
    check(model, {2: masks(kind, 2), 3: masks(kind, 3)})


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_batch(need_weights: bool) -> None:
    model = attend("", {"need_weights": need_weights})
    given = tuple(tensor[:, 0] for tensor in inputs(model, 1))
    close(model(*given), fxcompress.trace(model, given)(*given))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_the_scores_is_switchable(need_weights: bool) -> None:
    model = attend("qkv", {"need_weights": need_weights}, dropout=0.5, batch_first=True)
    given = inputs(model, 2)
    traced = fxcompress.trace(model, given)
    close(model(*given)[0], traced(*given)[0])
    traced.train()
    assert not torch.equal(traced(*given)[0], traced(*given)[0])
    traced.eval()
    close(model(*given)[0], traced(*given)[0])


def encoder(**options: Any) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 12, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.eval()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layer(norm_first: bool, batch_first: bool) -> None:
    layer = encoder(norm_first=norm_first, batch_first=batch_first, activation="gelu")
    shapes = [(2, 4, DIM), (3, 6, DIM)] if batch_first else [(4, 2, DIM), (6, 3, DIM)]
    traced = fxcompress.trace(layer, torch.randn(shapes[0], dtype=torch.float64))
    with plain_attention():
        for shape in shapes:
            x = torch.randn(shape, dtype=torch.float64)
            close(layer(x), traced(x))
    leaves = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    assert {"self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"} <= leaves
    assert list(traced.state_dict()) == list(layer.state_dict())


def test_encoder_layer_with_padding() -> None:
    layer = encoder(batch_first=True)
    padding = torch.tensor([[False, False, False, True], [False, False, False, False]])
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    traced = fxcompress.trace(layer, {"src": x, "src_key_padding_mask": padding})
    with plain_attention():
        close(layer(x, src_key_padding_mask=padding), traced(x, src_key_padding_mask=padding))


def test_encoder_layer_trains_as_it_did() -> None:
    layer = encoder(batch_first=True, dropout=0.0)
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    traced = fxcompress.trace(layer, x)
    layer.train()(x).square().sum().backward()
    traced.train()(x).square().sum().backward()
    for name, parameter in traced.named_parameters():
        close(layer.get_parameter(name).grad, parameter.grad)


def test_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(DIM, HEADS, 12, batch_first=True).double().eval()
    target, memory = torch.randn(2, 3, DIM, dtype=torch.float64), torch.randn(2, 5, DIM, dtype=torch.float64)
    traced = fxcompress.trace(layer, (target, memory))
    target, memory = torch.randn(4, 6, DIM, dtype=torch.float64), torch.randn(4, 2, DIM, dtype=torch.float64)
    close(layer(target, memory), traced(target, memory))


def test_a_stack_of_encoder_layers() -> None:
    stack = nn.TransformerEncoder(encoder(batch_first=True), 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
    stack = stack.double().eval()
    traced = fxcompress.trace(stack, torch.randn(2, 4, DIM, dtype=torch.float64))
    x = torch.randn(3, 5, DIM, dtype=torch.float64)
    with plain_attention():
        close(stack(x), traced(x))


def test_the_fast_path_setting_is_as_before() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    fxcompress.trace(encoder(batch_first=True), torch.randn(2, 4, DIM, dtype=torch.float64))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_same_seed_drops_the_same_elements(norm_first: bool, batch_first: bool) -> None:
    layer = encoder(norm_first=norm_first, batch_first=batch_first, dropout=0.4).train()
    example = torch.randn(2, 4, DIM, dtype=torch.float64)
    traced = fxcompress.trace(layer, example)
    for training in (True, False):
        layer.train(training)
        traced.train(training)
        x = torch.randn(5, 3, DIM, dtype=torch.float64)
        torch.manual_seed(3)
        expected = layer(x)
        torch.manual_seed(3)
        close(expected, traced(x))
    with plain_attention():
        pruned: Any = fxcompress.compress(layer.train(), [L1FilterPruner(0.5), Speedup()], example_inputs=example)
    assert pruned.linear1.weight.shape[0] == 6


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_behind_attention_is_laid_out_alike(need_weights: bool, batch_first: bool) -> None:
    layer = attend("qkv", {"need_weights": need_weights}, dropout=0.3, batch_first=batch_first).layer
    model = Net(
        lambda n, x: n.drop(n.attention(x, x, x, need_weights=need_weights)[0]), attention=layer, drop=nn.Dropout()
    )
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    traced = fxcompress.trace(model.train(), x)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    close(expected, traced(x))
