"""What libraries do in a forward: ask whether they are traced, return objects of their own, keep idle names."""

import copy
import gc
import pickle
import warnings
import weakref
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.modeling_outputs import BaseModelOutput

import fxcompress
from fxcompress.passes import L1FilterPruner, RandomFilterPruner, Speedup
from fxcompress.verify import difference

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def same(model: nn.Module, traced: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(traced(*inputs), model(*inputs))


# ---- the compiling flag --------------------------------------------------------------------------------------------


class Masking(nn.Module):
    """Skips a mask that masks nothing, unless told not to look."""

    def __init__(self, asks: bool = True) -> None:
        super().__init__()
        self.asks, self.a = asks, nn.Linear(5, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.a(x).relu()
        if not (self.asks and torch.compiler.is_compiling()) and bool(mask.all()):
            return h
        return h * mask[:, None]


class Masked(nn.Module):
    def __init__(self, asks: bool = True) -> None:
        super().__init__()
        self.inner, self.head = Masking(asks), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.inner(x, mask))


@pytest.mark.parametrize("example", [torch.tensor([1, 1]), torch.tensor([0, 1])])
def test_values_that_a_compiler_would_not_read_are_not_read(example: Tensor) -> None:
    model = Masked().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = fxcompress.trace(model, (X, example))
        small: Any = fxcompress.compress(model, [L1FilterPruner(0.5), Speedup()], example_inputs=(X, example))
    assert traced.meta["opaque"] == ()
    assert small.inner.a.out_features == 3
    for mask in ([1, 1], [0, 1], [0, 0]):
        same(model, traced, X, torch.tensor(mask))
    same(model, traced, torch.randn(4, 5), torch.tensor([0, 1, 1, 0]))
    assert not torch.compiler.is_compiling()


def test_a_module_that_does_not_ask_stays_as_it_is() -> None:
    model = Masked(asks=False).eval()
    with pytest.warns(UserWarning, match="inner stays as it is") as caught:
        traced = fxcompress.trace(model, (X, torch.tensor([1, 1])))
    assert len(caught) == 1, "what the recording under the flag met is nobody's business"
    assert traced.meta["opaque"] == ("inner",)
    same(model, traced, X, torch.tensor([0, 1]))


def test_a_forward_that_fails_under_the_flag_is_recorded_without() -> None:
    class Fails(Masking):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                raise NotImplementedError
            return super().forward(x, mask)

    model = Masked().eval()
    model.inner = Fails().eval()
    with pytest.warns(UserWarning, match="inner stays as it is"):
        traced = fxcompress.trace(model, (X, torch.tensor([1, 1])))
    same(model, traced, X, torch.tensor([0, 1]))
    assert not torch.compiler.is_compiling()


def test_a_model_that_is_one_module_is_recorded_under_the_flag() -> None:
    model = Masking().eval()
    traced = fxcompress.trace(model, (X, torch.tensor([1, 1])))
    same(model, traced, X, torch.tensor([1, 0]))


class Other(nn.Module):
    """Computes something else for compilers, and reads values for nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.fc(x) * 1.1
        out: Tensor = self.fc(x) if bool((x == 7).all()) else self.fc(x).relu()
        return out


def test_a_path_for_compilers_that_computes_something_else_is_not_taken() -> None:
    model = nn.Sequential(nn.Linear(5, 5), Other(), nn.Linear(5, 2)).eval()
    with pytest.warns(UserWarning, match=r"^1 stays as it is: bool\(\) reads"):
        traced = fxcompress.trace(model, X)
    assert traced.meta["opaque"] == ("1",)
    same(model, traced, X)
    with pytest.raises(fxcompress.TraceError, match=r"bool\(\) reads"):
        fxcompress.trace(Other(), X)


def test_a_first_attempt_that_failed_keeps_nothing_alive() -> None:
    gc.collect()
    gc.disable()
    try:
        for make in (Masking, Masked):
            model = make().eval()
            gone = weakref.ref(model), weakref.ref(fxcompress.trace(model, (X, torch.tensor([1, 1]))))
            del model
            assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


# ---- results -------------------------------------------------------------------------------------------------------


class Cache:
    """Holds tensors, and no graph can hold it."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors


@dataclass
class Result:
    logits: Tensor | Cache
    hidden: Tensor | None = None
    cache: Cache | None = None


def returning(make: Any) -> Net:
    return Net(lambda n, x: make(n.b(n.a(x).relu()), n.a(x)), a=nn.Linear(5, 8), b=nn.Linear(8, 3))


def test_channels_in_a_dataclass_are_outputs() -> None:
    groups = fxcompress.channel_groups(returning(lambda y, h: Result(y, hidden=h)), X)
    assert [group.reason for group in groups] == ["it is an output of the model (output)"] * 2
    small: Any = fxcompress.compress(
        returning(lambda y, h: Result(y)), [L1FilterPruner(0.5), Speedup()], example_inputs=X
    )
    assert small(X).logits.shape == (2, 3)
    assert small.a.out_features == 4


def test_dataclasses_are_compared_field_by_field() -> None:
    y = torch.randn(2, 3)
    assert difference(Result(y), Result(y)) == 0
    assert difference(Result(y), Result(y + 1)) > 0
    assert difference(Result(y), Result(y, hidden=y)) == float("inf")
    assert difference({"a": y, "b": -y}, {"b": -y, "a": y}) == 0
    assert difference((y, [y]), (y, [2 * y])) == pytest.approx(1)


def test_an_optional_field_that_no_graph_can_hold_is_left_out() -> None:
    model = returning(lambda y, h: Result(y, cache=Cache(h)))
    with pytest.warns(UserWarning, match=r"cache of the model's result is a Cache.*leaves it None"):
        small: Any = fxcompress.compress(model, [L1FilterPruner(0.5), Speedup()], example_inputs=X)
    found = small(X)
    assert type(found) is Result
    assert found.cache is None
    assert small.a.out_features == 4, "what only the cache holds can go"


@pytest.mark.parametrize(
    "make", [lambda y, h: Result(Cache(y)), lambda y, h: (y, Cache(h)), lambda y, h: {"c": Cache(h)}]
)
def test_a_part_that_a_result_cannot_do_without_is_refused(make: Any) -> None:
    with pytest.raises(fxcompress.TraceError, match=r"returns a Cache, which a graph cannot hold.*use_cache=False"):
        fxcompress.trace(returning(make), X)


@dataclass
class Derived:
    """Fields that its class makes, and that it changes when it is called again."""

    logits: Tensor
    scores: Tensor = field(init=False)
    kind: str = field(default="linear", init=False)

    def __post_init__(self) -> None:
        self.logits = self.logits + 1
        self.scores = self.logits.softmax(-1)


@dataclass(frozen=True, slots=True)
class Doubled:
    logits: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", self.logits * 2)


class Named(OrderedDict[str, Tensor]):
    """Asks for keywords, and holds something else than it was given."""

    def __init__(self, **items: Tensor) -> None:
        super().__init__({f"{name}_": item * 2 for name, item in items.items()})
        self.number = len(items)


class Shouting(dict[str, Tensor]):
    """Changes what is put into it, whoever does."""

    def __init__(self, **items: Tensor) -> None:
        for name, item in items.items():
            self[name] = item

    def __setitem__(self, key: str, value: Tensor) -> None:
        super().__setitem__(key, value + 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda y, h: defaultdict(list, logits=y, hidden=[h]),
        lambda y, h: Derived(y),
        lambda y, h: Doubled(y),
        lambda y, h: (Named(logits=y), {"inner": Derived(h)}),
        lambda y, h: BaseModelOutput(last_hidden_state=y, hidden_states=(h,)),
    ],
)
def test_a_result_is_of_the_models_type_and_holds_the_same(make: Any) -> None:
    model = returning(make).eval()
    traced = fxcompress.trace(model, X)
    xs = X, torch.randn(4, 5)
    for again in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        for x in xs:
            with torch.no_grad():
                expected, found = model(x), again(x)
            assert type(found) is type(expected)
            assert difference(expected, found) == 0
            assert getattr(found, "__dict__", {}).keys() == getattr(expected, "__dict__", {}).keys()
            assert getattr(found, "default_factory", None) is getattr(expected, "default_factory", None)
            if isinstance(found, tuple):
                assert (found[0].number, found[1]["inner"].kind) == (1, "linear")


def test_a_result_that_nothing_makes_anew_is_refused() -> None:
    with pytest.raises(fxcompress.TraceError, match=r"returns a Shouting.*Return a dict or a tuple"):
        fxcompress.trace(returning(lambda y, h: Shouting(logits=y)), X)


# ---- parameters under several names --------------------------------------------------------------------------------


class Shared(nn.Module):
    """A table that nobody calls, the same one that is used, and a projection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.embed = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.spare = nn.Linear(2, 2)
        self.embed.weight = self.shared.weight
        self.fc = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.embed(tokens))


def test_idle_names_of_a_parameter_stay() -> None:
    model, tokens = Shared().eval(), torch.randint(0, 9, (2, 4))
    small: Any = fxcompress.compress(model, [L1FilterPruner(0.5), Speedup()], example_inputs=tokens)
    assert list(small.state_dict()) == ["shared.weight", "embed.weight", "fc.weight", "fc.bias"]
    assert small.meta["unreached"] == ("spare",)
    assert small.shared.weight is small.embed.weight
    assert small.embed.weight.shape == (9, 4)
    assert small.embed.embedding_dim == 4
    twin: Any = copy.deepcopy(small)
    assert twin.shared.weight is twin.embed.weight


# ---- operators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("groups", [1, 2])
def test_weight_norm_over_what_lives(dim: Any, groups: int) -> None:
    convolution = nn.Conv1d(8, 12, 3, groups=groups, padding=1)
    model = Net(
        lambda n, x: n.c(n.b(n.a(x).relu()).relu()),
        a=nn.Conv1d(3, 8, 3),
        b=weight_norm(convolution, dim=dim),
        c=nn.Conv1d(12, 4, 1),
    )
    x = torch.randn(2, 3, 9)
    masked = fxcompress.compress(model, [L1FilterPruner(0.37)], example_inputs=x, verify=False)
    removed: Any = fxcompress.compress(masked, [Speedup()], example_inputs=x, verify=False)
    assert removed.a.out_channels == 6
    assert removed.c.in_channels == 8
    for trial in (x, torch.randn(3, 3, 11)):
        with torch.no_grad():
            expected, found = masked.double()(trial.double()), removed.double()(trial.double())
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_rows_are_read_by_computed_positions_and_casts_pass_channels() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None].repeat(len(x), 1)
        h = net.a(x) + net.table[positions].type_as(x)
        return net.b((h.float() * 2).type_as(h))

    model = Net(step, a=nn.Linear(5, 8), b=nn.Linear(8, 3), table=nn.Parameter(torch.zeros(9, 8)))
    x = torch.randn(2, 4, 5)
    masked = fxcompress.compress(model, [L1FilterPruner(0.5)], example_inputs=x)
    small: Any = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    assert small.table.shape == (9, 4)
    for trial in (x, torch.randn(3, 7, 5)):
        same(masked, small, trial)


def test_a_slice_of_heads_that_keep_other_columns() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        heads = net.a(x).unflatten(-1, (3, 8))
        turned = heads[..., :2] * net.scale  # the same two of every head, as rotary positions have it
        return net.b(torch.cat((turned, heads[..., 2:]), -1).flatten(-2))

    model = Net(step, a=nn.Linear(5, 24), b=nn.Linear(24, 3), scale=nn.Parameter(torch.zeros(2)))
    x = torch.randn(2, 4, 5)
    for seed in range(4):
        masked = fxcompress.compress(model, [RandomFilterPruner(0.5, seed=seed)], example_inputs=x)
        small: Any = fxcompress.compress(masked, [Speedup()], example_inputs=x)
        assert small.a.out_features <= 15  # the warning that something cannot be rewritten would be an error
        same(masked, small, torch.randn(3, 6, 5))
