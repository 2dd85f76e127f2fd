"""Capture: what a forward takes."""

from typing import Any

import pytest
import torch
from exact import assert_same
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fxcompress
from fxcompress import InputError


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self, a: Tensor, b: Tensor | None = None, *rest: Tensor, scale: float = 2.0, extra: Any = None
    ) -> Tensor:
        a = self.fc(a) * scale
        for item in (b, *rest):
            a = a if item is None else a + item
        return a if extra is None else a * extra["gate"][0]


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.ones(2, 4),),
        (torch.ones(2, 4), torch.ones(2, 4)),
        (torch.ones(2, 4), None),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4), torch.ones(4)),
        [torch.ones(2, 4), torch.ones(2, 4)],
        {"a": torch.ones(2, 4)},
        {"b": torch.ones(2, 4), "a": torch.ones(2, 4)},
        {"a": torch.ones(2, 4), "scale": 3.0},
        {"a": torch.ones(2, 4), "extra": {"gate": [torch.full((2, 4), 0.5)]}},
    ],
    ids=["one", "two", "none", "star", "list", "keyword", "other order", "number", "nested"],
)
def test_inputs(inputs: Any) -> None:
    model = Takes().eval()
    traced = fxcompress.trace(model, inputs)

    def call(run: nn.Module, batch: int) -> Any:
        def grown(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[:1].repeat(batch, 1) * 0.3 if value.dim() == 2 else value * 0.3
            if isinstance(value, dict):
                return {key: grown(item) for key, item in value.items()}
            return [grown(item) for item in value] if isinstance(value, list) else value

        if isinstance(inputs, dict):
            return run(**{key: grown(value) for key, value in inputs.items()})
        return run(*(grown(value) for value in inputs))

    for batch in (2, 5):
        assert_same(call(model, batch), call(traced, batch))


def test_nested_tensors_as_one_input() -> None:
    class Model(nn.Module):
        def forward(self, pair: tuple[Tensor, dict[str, Tensor]], flag: bool = True) -> Tensor:
            x, named = pair
            return x + named["y"] if flag else x

    model, x, y = Model(), torch.randn(2, 3), torch.randn(2, 3)
    traced = fxcompress.trace(model, ((x, {"y": y}),))
    assert_same(x[:1] + y[:1], traced((x[:1], {"y": y[:1]})))


@pytest.mark.parametrize(
    "inputs, part",
    [
        ("abc", "str"),
        (3, "int"),
        ((1, 2), "no tensor"),
        ({}, "no tensor"),
        ((torch.ones(2, 4),) * 2 + ("x",), "str"),
        ({"q": torch.ones(2, 4)}, "q"),
    ],
)
def test_inputs_that_fit_no_forward(inputs: Any, part: str) -> None:
    with pytest.raises(InputError, match=part):
        fxcompress.trace(Takes(), inputs)


@pytest.mark.parametrize(
    "args, kwargs, part",
    [
        ((), {}, "missing a required argument: 'x'.*expected x, which"),
        ((1,), {"mask": torch.ones(2, 3)}, "unexpected keyword argument 'mask'.*trace the model again"),
        ((1, 2), {}, "too many positional arguments"),
    ],
)
def test_calls_with_other_inputs_than_the_examples(args: Any, kwargs: Any, part: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x * 2 if mask is None else x * mask

    traced = fxcompress.trace(Model(), torch.randn(2, 3))
    with pytest.raises(InputError, match=part):
        traced(*args, **kwargs)


def test_packed_sequences_are_packed_by_a_submodule() -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            last: Tensor = self.layer(pack_padded_sequence(x, lengths, True, enforce_sorted=False))[1][0]
            return last

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Packing(), nn.Linear(4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x, lengths))
            return out

    packed = pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    with pytest.raises(InputError, match=r"PackedSequence.*let a submodule pack them"):
        fxcompress.trace(nn.GRU(3, 4), (packed,))
    model = Model().eval()
    with pytest.warns(UserWarning, match="body stays as it is"):
        traced = fxcompress.trace(model, (torch.randn(2, 3, 3), torch.tensor([2, 3])))
    given = torch.randn(3, 4, 3), torch.tensor([2, 4, 1])
    assert_same(model(*given), traced(*given))


class ValueInFront(nn.Module):
    """A required input without tensors in front of a required tensor."""

    def forward(self, scale: float, x: Tensor, left: Tensor | None, right: Tensor, flag: bool = False) -> Tensor:
        made = x * scale if left is None else x + left
        return made - right if flag else made + right


def test_values_in_front_of_tensors_have_to_be_given() -> None:
    x, right = torch.randn(2, 3), torch.randn(2, 3)
    traced = fxcompress.trace(ValueInFront(), (2.0, x, None, right, True))
    assert [node.args for node in traced.graph.find_nodes(op="placeholder")] == [(), (), (), (), (True,)]
    assert torch.equal(traced(2.0, x, None, right), x * 2 - right)
    with pytest.raises(InputError, match="do not fit the call: missing a required argument: 'left'"):
        traced(2.0, x, right=right)
