"""Dtypes in a recording: what the forward read off its tensors moves with the module, what its author wrote stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import L1FilterPruner, Speedup


class Plain(nn.Module):
    """Tokens to logits, in whatever dtype the parameters have."""

    def __init__(self, step: Callable[["Plain", Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(9, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.step = step

    def forward(self, tokens: Tensor) -> Tensor:
        return self.step(self, tokens)


def follows(net: Plain, tokens: Tensor) -> Tensor:
    """A mask of the parameters' dtype, as text models make it, and an upcast that is undone."""
    dtype = net.fc.weight.dtype
    keep = (tokens > 2).to(dtype)
    hidden = net.fc(net.table(tokens))
    squares = hidden.to(torch.float32).square().mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(squares + 1e-3).to(hidden.dtype)
    scores = hidden + ((1 - keep) * torch.finfo(dtype).min)[..., None]
    return net.head(scores.softmax(1).to(dtype=dtype) * hidden)


def written(net: Plain, tokens: Tensor) -> Tensor:
    """Computed in single precision whatever the parameters are."""
    hidden = net.fc(net.table(tokens)).to(torch.float32)
    return hidden.exp().to(dtype=torch.float32) * torch.finfo(torch.float32).eps


def computed(net: Plain, tokens: Tensor) -> Tensor:
    """What is computed of limits: halves, multiples, roots, sums; and numbers that are none of them."""
    limits = torch.finfo(net.fc.weight.dtype)
    hidden = net.fc(net.table(tokens)) * 1.5
    hidden = hidden.clamp(limits.min / 2, limits.max * 0.25)
    hidden = hidden / (hidden.norm(dim=-1, keepdim=True) + limits.eps * 4).clamp_min(limits.eps / 3)
    return hidden.add(limits.eps**0.5).clamp_min(limits.eps + 0.125) + 1e-4


TOKENS = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0))


def built(step: Callable[[Plain, Tensor], Tensor]) -> Plain:
    torch.manual_seed(0)
    return Plain(step).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [follows, written, computed])
def test_what_was_read_off_a_tensor_follows_the_module(
    step: Callable[[Plain, Tensor], Tensor], dtype: torch.dtype
) -> None:
    model = built(step)
    traced = fxcompress.trace(model, TOKENS)
    with torch.no_grad():
        for moved in (dtype, torch.float32, dtype):
            expected, found = model.to(moved)(TOKENS), traced.to(moved)(TOKENS)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            assert found.isfinite().all()
    assert expected.dtype == (torch.float32 if step is written else dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_in_another_dtype_when_it_is_traced(dtype: torch.dtype) -> None:
    model = built(follows).to(dtype)
    traced = fxcompress.trace(model, TOKENS)
    with torch.no_grad():
        for moved in (torch.float32, dtype):
            assert torch.equal(traced.to(moved)(TOKENS), model.to(moved)(TOKENS))


def test_masked_and_removed_models_follow_too() -> None:
    masked = fxcompress.compress(built(follows), [L1FilterPruner(0.5)], example_inputs=TOKENS)
    removed: Any = fxcompress.compress(masked, [Speedup()], example_inputs=TOKENS)
    assert removed.fc.weight.shape == (3, 4)
    for dtype in (torch.float64, torch.float16):
        with torch.no_grad():
            expected, found = masked.to(dtype)(TOKENS), removed.to(dtype)(TOKENS)
        assert expected.dtype == found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-3)


def test_what_names_no_dtype_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[nn.Module] = []
    module = __import__("sys").modules["fxcompress.trace"]
    original = module._record
    monkeypatch.setattr(module, "_record", lambda *given: recorded.append(given[0]) or original(*given))
    fxcompress.trace(Net(lambda n, x: n.a(x).float().relu(), a=nn.Linear(3, 4)), torch.randn(2, 3))
    assert len(recorded) == 1
    fxcompress.trace(built(follows), TOKENS)
    assert [next(model.parameters()).dtype for model in recorded[1:]] == [torch.float32, torch.float64]


def test_no_key_is_added_to_the_state_dict() -> None:
    model = built(follows)
    assert list(fxcompress.trace(model, TOKENS).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("moved", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_two_dtypes(moved: torch.dtype) -> None:
    def step(net: Plain, tokens: Tensor) -> Tensor:
        hidden = net.fc(net.table(tokens)).clamp(torch.finfo(net.fc.weight.dtype).min / 2)
        return net.head(hidden.to(net.head.weight.dtype)) + torch.finfo(net.head.weight.dtype).eps

    model = built(step)
    model.head.to(torch.bfloat16)
    traced = fxcompress.trace(model, TOKENS)
    with torch.no_grad():
        assert torch.equal(traced(TOKENS), model(TOKENS))
        assert traced(TOKENS).dtype == torch.bfloat16
        for dtype in (moved, torch.float32):
            expected, found = model.to(dtype)(TOKENS), traced.to(dtype)(TOKENS)
            assert found.dtype == expected.dtype == dtype
            assert torch.equal(found, expected)
