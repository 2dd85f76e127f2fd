"""Models of transformers, as their users bring them: called by keyword, with padding, caches, and in other dtypes."""

import warnings
from typing import Any

import pytest
import torch
from removal import relative_gap
from torch import Tensor, nn

import fxcompress
from fxcompress import TracedModule, channel_groups, compress, masks
from fxcompress.compiling import compiling
from fxcompress.inputs import Inputs, other_batch
from fxcompress.passes import L1FilterPruner, Speedup
from fxcompress.verify import precise
from zoo.catalogue import build, prepared
from zoo.measure import removable_share
from zoo.sample import Sample, tokens
from zoo.transformers_models import MODELS, configured

#: What the default suite runs; `make zoo` runs the rest.
QUICK = frozenset(("bert", "gpt2", "llama", "t5", "clip", "wav2vec2"))
#: Where less than 95 % of the parameters of linear and convolution layers can go, the measured share: the encoder's
#: states are an output, embeddings tie them to the decoder's, and the tied head's other dimension is the vocabulary.
FLOORS = {"t5": 0.949, "bart": 0.949}
#: Grouped queries, or heads whose size is no multiple of much, and rotary positions.
ROTARY = ("llama", "mistral", "qwen2", "phi")
RATIOS = (0.3, 0.37, 0.61)


def marked(*values: Any, quick: bool) -> Any:
    return pytest.param(*values, marks=() if quick else pytest.mark.long)


def quietly_traced(sample: Sample) -> TracedModule:
    """The trace, which warns about nothing: no module stays as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fxcompress.trace(sample.model, sample.inputs)


def pruned(sample: Sample, ratio: float = 0.5) -> tuple[TracedModule, TracedModule]:
    """The masked and the removed model, which nothing in fxcompress has compared."""
    masked = compress(sample.model, [L1FilterPruner(ratio)], example_inputs=sample.inputs, verify=False)
    return masked, compress(masked, [Speedup()], example_inputs=sample.inputs, verify=False)


@torch.no_grad()
def gap(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    """The largest relative difference of the results, which must be of one type and shape."""
    call = Inputs.parse(inputs)
    expected, found = call.run(one), call.run(other)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    return relative_gap(expected, found)


def doubled(inputs: Inputs) -> Inputs:
    return inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def exact(masked: TracedModule, removed: TracedModule, calls: list[Inputs]) -> bool:
    one, other = precise(masked), precise(removed)
    return all(gap(one, other, doubled(call)) <= 1e-9 for call in calls)


def batches(sample: Sample) -> list[Inputs]:
    """The example's call, and one at another batch size."""
    call = Inputs.parse(sample.inputs)
    return [call, call.rebatched(other_batch(call.batch))]


@pytest.mark.parametrize("name", [marked(name, quick=name in QUICK) for name in MODELS])
def test_half_of_every_group_goes(name: str) -> None:
    sample = build(f"transformers/{name}")
    traced = quietly_traced(sample)
    assert not traced.meta["opaque"]
    assert all(gap(sample.model, traced, call) <= 1e-5 for call in batches(sample))
    groups = channel_groups(traced, sample.inputs)
    assert removable_share(traced, groups) >= FLOORS.get(name, 0.95), groups
    masked, removed = pruned(sample)
    assert exact(masked, removed, batches(sample))
    keys = list(sample.model.state_dict())
    assert list(removed.state_dict()) == keys
    assert list(masked.state_dict()) == keys + [f"_masks.{key}" for key in masks(masked)]
    before, after = (fxcompress.count(model, sample.inputs).macs for model in (sample.model, removed))
    assert after < 0.6 * before


@pytest.mark.parametrize(
    "name, ratio", [marked(name, ratio, quick=(name, ratio) == ("llama", 0.37)) for name in ROTARY for ratio in RATIOS]
)
def test_ratios_that_are_multiples_of_nothing(name: str, ratio: float) -> None:
    sample = build(f"transformers/{name}")
    masked, removed = pruned(sample, ratio)
    assert exact(masked, removed, batches(sample))
    size = {key: sum(p.numel() for p in model.parameters()) for key, model in (("m", masked), ("r", removed))}
    assert size["r"] < (1 - ratio / 2) * size["m"]


# ---- padding -------------------------------------------------------------------------------------------------------


def paddings() -> list[Tensor]:
    """Attention masks for 12 tokens that differ from the example's, which has three of padding in its second row."""
    kinds = {"none": [range(12)] * 2, "left": [range(5, 12), range(12)], "right": [range(4), range(11)]}
    kinds["three rows"] = [range(12), range(3, 12), range(6)]
    return [torch.tensor([[int(position in row) for position in range(12)] for row in rows]) for rows in kinds.values()]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", [marked(n, quick=n in ("bert", "llama")) for n in ("bert", "gpt2", "llama", "mistral")]
)
def test_padding_other_than_the_examples(name: str, implementation: str) -> None:
    sample = prepared(configured(name, attn_implementation=implementation))
    traced = quietly_traced(sample)
    masked, removed = pruned(sample)
    example = traced(**sample.inputs).logits
    for padding in paddings():
        ids = tokens(12, batch=len(padding))
        inputs = {"input_ids": ids, "attention_mask": padding}
        assert gap(sample.model, traced, inputs) <= 1e-5
        assert exact(masked, removed, [Inputs.parse(inputs)])
        if len(padding) == 2 and name == "bert":
            assert relative_gap(traced(**inputs).logits, example) > 1e-3, "the padding decides nothing"


def test_an_example_without_padding_still_reads_the_mask() -> None:
    sample = build("transformers/llama")
    sample.inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    traced = quietly_traced(sample)
    for padding in paddings():
        inputs = {"input_ids": tokens(12, batch=len(padding)), "attention_mask": padding}
        assert gap(sample.model, traced, inputs) <= 1e-5


# ---- the call ------------------------------------------------------------------------------------------------------


def test_the_result_is_called_and_read_like_the_model() -> None:
    sample = build("transformers/bert")
    _, removed = pruned(sample)
    ids, mask = sample.inputs["input_ids"], sample.inputs["attention_mask"]
    by_name, by_position = removed(attention_mask=mask, input_ids=ids), removed(ids, mask)
    assert type(by_name) is type(sample.model(**sample.inputs))
    assert by_name.loss is None
    assert torch.equal(by_name.logits, by_position.logits)
    assert torch.equal(by_name[0], by_name["logits"])
    with pytest.raises(fxcompress.InputError, match="missing a required argument: 'attention_mask'"):
        removed(input_ids=ids)
    with pytest.raises(fxcompress.InputError, match="unexpected keyword argument 'token_type_ids'"):
        removed(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))


def test_inputs_that_were_left_out_stay_left_out() -> None:
    sample = build("transformers/llama")
    sample.inputs = {"input_ids": tokens(12)}
    masked, removed = pruned(sample)
    assert exact(masked, removed, batches(sample))
    traced = quietly_traced(sample)
    assert gap(sample.model, traced, {"input_ids": tokens(12, batch=3)}) <= 1e-5


def test_a_loss_of_labels_trains_what_was_pruned() -> None:
    sample = build("transformers/llama")
    sample.inputs["labels"] = sample.inputs["input_ids"]
    masked, removed = pruned(sample)
    assert exact(masked, removed, batches(sample))
    removed.train()
    optimizer = torch.optim.SGD(removed.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = removed(**sample.inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", [marked(name, quick=name == "llama") for name in ("llama", "gpt2", "t5", "whisper")])
def test_a_cache_is_left_out_of_the_result(name: str) -> None:
    sample = prepared(configured(name, use_cache=True))
    with pytest.warns(UserWarning, match=r"past_key_values of the model's result is a \w+Cache.*use_cache=False"):
        masked = compress(sample.model, [L1FilterPruner(0.5)], example_inputs=sample.inputs)
    removed = compress(masked, [Speedup()], example_inputs=sample.inputs, verify=False)
    assert exact(masked, removed, batches(sample))
    expected, found = sample.model(**sample.inputs), removed(**sample.inputs)
    assert set(found) == set(expected) - {"past_key_values"}
    assert found.past_key_values is None
    small, large = (fxcompress.count(model, sample.inputs).macs for model in (removed, sample.model))
    assert small < 0.6 * large, "keys and values that nobody returns can go"


# ---- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [marked(n, quick=n == "llama") for n in ("llama", "clip", "bert", "gemma")])
def test_a_traced_model_moves_to_other_dtypes(name: str) -> None:
    sample = build(f"transformers/{name}")
    traced = quietly_traced(sample)
    masked, removed = pruned(sample)
    for dtype in (torch.bfloat16, torch.float64):  # from one straight to the other
        call = Inputs.parse(sample.inputs).map(lambda t, dtype=dtype: t.to(dtype) if t.is_floating_point() else t)
        with torch.no_grad():
            expected, found = call.run(sample.model.to(dtype)), call.run(traced.to(dtype))
            small = call.run(removed.to(dtype)), call.run(masked.to(dtype))
        logits = "logits_per_image" if name == "clip" else "logits"
        assert found[logits].dtype == expected[logits].dtype == small[0][logits].dtype == small[1][logits].dtype
        if dtype == torch.float64:
            for model in (sample.model, traced, masked, removed):  # bfloat16 has rounded the weights, alike
                model.to(torch.float64)
        tolerance = 8 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
        assert relative_gap(expected[logits].double(), found[logits].double()) <= tolerance
        assert relative_gap(small[0][logits].double(), small[1][logits].double()) <= 4 * tolerance


def test_a_loaded_state_dict_gives_the_same_function() -> None:
    sample = build("transformers/t5")
    _, removed = pruned(sample)
    _, fresh = pruned(sample)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    fresh.load_state_dict(removed.state_dict(), strict=True)
    assert gap(removed, fresh, sample.inputs) == 0


def test_the_compiling_flag_is_put_back() -> None:
    def fails() -> None:
        with compiling():
            assert torch.compiler.is_compiling()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not torch.compiler.is_compiling()
