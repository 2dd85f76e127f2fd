"""Fake-quant nodes on embedding tables: a scale for each row."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantized_cases import module_of, values
from torch import Tensor, nn

from fxcompress import Pass, compress
from fxcompress.passes import L1FilterPruner, LSQQuantizer, PTQQuantizer, QATQuantizer, Speedup
from fxcompress.quantization.fake_quantize import ROLE, AffineFakeQuantize, fake_quant_nodes
from fxcompress.quantization.settle import settle


class Tables(nn.Module):
    """A table as a layer and one that a function reads, both of odd sizes, in front of a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.words = nn.Embedding(13, 7, padding_idx=0, **options)
        self.places = nn.Parameter(values(5, 7, seed=7))
        self.mix, self.out = nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        places = F.embedding(torch.arange(tokens.shape[1], device=tokens.device), self.places)
        return self.out(self.mix(self.words(tokens) + places).relu())


TOKENS = torch.arange(15).reshape(3, 5) % 13
ROUNDING = [QATQuantizer, PTQQuantizer, LSQQuantizer]


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("item", [QATQuantizer(3), PTQQuantizer(3, per_channel=False)], ids=lambda item: item.name)
def test_rows_of_a_table_have_a_scale_each(item: Any, bits: int) -> None:
    model = Tables().eval()
    made = compress(model, [replace(item, weight_bits=bits, embeddings=True)], example_inputs=TOKENS)
    for name in ("words.weight", "places"):
        table = model.get_parameter(name).detach().numpy()
        scale = np.abs(table).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        scale[scale == 0] = 1  # the row of the padding
        expected = np.round(table / scale) * scale
        np.testing.assert_allclose(module_of(made, name)(model.get_parameter(name)).detach(), expected, atol=1e-6)
        assert name == "places" or np.unique(scale).size == 13


@pytest.mark.parametrize("item", ROUNDING, ids=lambda item: item.name)
def test_tables_bring_no_node_for_activations(item: Any) -> None:
    model = Tables().eval()
    plain, made = (compress(model, [item(embeddings=given)], example_inputs=TOKENS) for given in (False, True))
    nodes, before = ({str(n.target): spec.spec for n, spec in fake_quant_nodes(each)} for each in (made, plain))
    assert nodes.keys() - before.keys() == {"_quant.words.weight", "_quant.places"}
    assert {name: nodes[name] for name in before} == before
    assert nodes["_quant.words.weight"].axis == nodes["_quant.places"].axis == 0
    again = compress(made, [item(embeddings=True)], example_inputs=TOKENS)
    assert str(again.graph) == str(made.graph)
    settled = copy.deepcopy(made)
    settle(settled)
    torch.testing.assert_close(settled(TOKENS), made(TOKENS))
    assert all(
        isinstance(each, AffineFakeQuantize) for n, each in fake_quant_nodes(settled) if n.meta[ROLE] == "weight"
    )


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_tables_that_are_written_or_have_sparse_gradients_stay_float(options: dict[str, Any]) -> None:
    made = compress(Tables(**options).eval(), [QATQuantizer(embeddings=True)], example_inputs=TOKENS)
    names = {n.target for n, _ in fake_quant_nodes(made)}
    assert "_quant.places" in names
    assert "_quant.words.weight" not in names


@pytest.mark.parametrize("item", ROUNDING, ids=lambda item: item.name)
def test_a_table_learns_behind_its_node(item: Any) -> None:
    made = compress(Tables().eval(), [item(embeddings=True)], example_inputs=TOKENS).train()
    made(TOKENS[:1]).square().sum().backward()
    gradient = made.get_parameter("words.weight").grad
    assert gradient is not None
    assert set(gradient.abs().sum(1).nonzero().flatten().tolist()) == {1, 2, 3, 4}, "what is read, without the padding"


@pytest.mark.parametrize("order", ["pruned first", "quantized first"])
def test_columns_of_a_table_go_and_the_scales_of_its_rows_stay(order: str) -> None:
    passes: list[Pass] = [L1FilterPruner(0.4, include=["words"]), PTQQuantizer(embeddings=True)]
    made = compress(Tables().eval(), passes if order == "pruned first" else passes[::-1], example_inputs=TOKENS)
    small = compress(made, [Speedup()], example_inputs=TOKENS)  # verified in float64
    assert small.get_parameter("words.weight").shape == (13, 5)
    assert small.get_parameter("places").shape == (5, 5)
    for name in ("words.weight", "places"):
        assert torch.equal(module_of(small, name).grid()[0], module_of(made, name).grid()[0])  # type: ignore[index]
    torch.testing.assert_close(small(TOKENS), made(TOKENS))
