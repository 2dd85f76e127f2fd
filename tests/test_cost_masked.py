"""What masked models cost: as they are, and once what is masked has been removed."""

import model_zoo
import pytest
import torch
from torch import nn

from fxcompress import compress, masks
from fxcompress.cost import Cost, count
from fxcompress.errors import InputError
from fxcompress.passes import L1FilterPruner, LevelPruner, Speedup


def test_a_masked_model_costs_what_the_dense_one_does_and_less_after() -> None:
    model, x = model_zoo.build("squeezenet1_1")
    dense = count(model, x)
    assert dense.after is None
    masked = compress(model, [L1FilterPruner(0.5)], example_inputs=x, verify=False)
    state, code = {name: value.clone() for name, value in masked.state_dict().items()}, masked.code
    found = count(masked, x)
    assert (found.macs, found.params, found.bytes) == (dense.macs, dense.params, dense.bytes)
    removed = count(compress(masked, [Speedup()], example_inputs=x, verify=False), x)
    assert found.after == removed
    assert removed.macs < 0.5 * dense.macs
    assert removed.after is None
    assert masked.code == code
    assert all(torch.equal(value, state[name]) for name, value in masked.state_dict().items())
    assert found.symbolic.evaluate(found.symbolic.current) == (removed.macs, removed.params, removed.bytes)


def test_masks_of_single_weights_cost_nothing_and_remove_what_holds_a_constant() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    masked = compress(model, [LevelPruner({"0": 0.5})], example_inputs=x)
    rows = int(masks(masked)["0.weight"].any(1).sum())
    assert rows < 6, "some row of the first layer is masked as a whole"
    found = count(masked, x)
    assert (found.macs, found.params, found.bytes) == (36, 44, 176)
    assert found.after is not None
    assert found.after.macs == rows * (4 + 2)
    assert found.after == count(compress(masked, [Speedup()], example_inputs=x), x)
    scattered = compress(model, [LevelPruner(pattern="2:4", include="0")], example_inputs=x)
    kept = count(scattered, x).after
    assert kept is not None
    assert kept.macs == 36, "no slice is masked as a whole"


def test_a_model_that_has_changed_since_is_not_priced() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 4)
    found = count(model, x)
    model[1] = nn.Linear(6, 3)
    with pytest.raises(InputError, match=r"1\.weight is \(3, 6\) and was \(2, 6\) when the model was counted"):
        _ = found.symbolic
    with pytest.raises(InputError, match=r"not made by count\(\)"):
        _ = Cost(found.table).symbolic


def test_the_text_of_a_masked_model_shows_both_figures() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 4)
    lines = str(count(compress(model, [L1FilterPruner(0.5)], example_inputs=x), x)).splitlines()
    assert "after Speedup" in lines[0]
    assert lines[2].split() == "layer kind macs after params after bytes after elementwise after".split()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert rows["0"] == ["Linear", "24", "12", "30", "15", "120", "60", "0", "0"]
    assert rows["1"] == ["Linear", "12", "6", "14", "8", "56", "32", "0", "0"]
    assert rows["total"] == ["36", "18", "44", "23", "176", "92", "0", "0"]
