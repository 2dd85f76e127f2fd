"""Capture: modules, their state and their modes, and the parts of a forward that no graph can hold."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from exact import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxcompress
from fxcompress import InputError, TraceError
from fxcompress.testing import portrait


class Block(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(self.norm(x))
        return out


def traced_and_equal(model: nn.Module, *xs: Tensor) -> fxcompress.TracedModule:
    model.eval()
    traced = fxcompress.trace(model, xs[0])
    for x in xs:
        assert_same(model(x), traced(x))
    return traced


def calls(traced: fxcompress.TracedModule) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


X, Y = torch.randn(3, 4), torch.randn(5, 4)


# ---- values -------------------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Tensor], Tensor]] = {
    "branch": lambda x: x * 2 if x.sum() > 0 else x - 1,
    "item": lambda x: x * x.max().item(),
    "tolist": lambda x: x + sum(x[0].tolist()),
    "float": lambda x: x / float(x.detach().abs().max()),
    "int": lambda x: x[:, : 1 + int(x[0, 0] > 0)].repeat(1, 4)[:, :4],
    "bool mask": lambda x: x + x[x > 0].sum(),
    "nonzero": lambda x: x + len(x[:, 0].nonzero()),
    "where": lambda x: x + torch.where(x > 0)[0].float().mean(),
    "unique": lambda x: x + x.sign().unique().sum(),
    "numpy": lambda x: x + torch.from_numpy(x.detach().numpy().copy()),
    "masked_select": lambda x: x + x.masked_select(x > 0).sum(),
    "index": lambda x: torch.stack([x, x + 1])[x[0, 0] > 0],
    "repeat": lambda x: x.repeat_interleave((x[:, 0] > -9).long() + 1, 0)[::2],
    "equal": lambda x: x + 1 if torch.equal(x, x.abs()) else x,
    "not": lambda x: x + 1 if not x.any() else x * 3,
}


class Reading(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


@pytest.mark.parametrize("function", READS.values(), ids=READS)
def test_a_submodule_that_reads_values_stays_as_it_is(function: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Block(Reading(function)), nn.Linear(4, 2)).eval()
    with pytest.warns(UserWarning, match=r"^1\.body .*test_trace_modules\.py:\d+") as caught:
        traced = fxcompress.trace(model, X)
    assert len(caught) == 1
    assert calls(traced) == ["0", "1.norm", "1.body", "2"]
    assert traced.meta["opaque"] == ("1.body",)
    assert list(traced.state_dict()) == list(model.state_dict())
    for x in (X, -X, Y):
        assert_same(model(x), traced(x))


def test_several_opaque_submodules_are_named_one_by_one() -> None:
    model = nn.Sequential(Reading(READS["branch"]), nn.Linear(4, 4), Reading(READS["item"]))
    with pytest.warns(UserWarning, match="stays as it is") as caught:
        traced = fxcompress.trace(model, X)
    assert [str(each.message).split()[0] for each in caught] == ["0", "2"]
    assert traced.meta["opaque"] == ("0", "2")
    assert calls(traced) == ["0", "1", "2"]


def test_an_opaque_submodule_trains_and_switches_mode() -> None:
    class Noisy(Reading):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    model = nn.Sequential(Noisy(READS["branch"]), nn.Linear(4, 2)).eval()
    with pytest.warns(UserWarning, match="0"):
        traced = fxcompress.trace(model, X).train()
    model.train()
    torch.manual_seed(3)
    expected = model(X)
    torch.manual_seed(3)
    assert_same(expected, traced(X))
    traced(X).sum().backward()
    assert traced.get_parameter("0.inner.weight").grad is not None


def root_branch(x: Tensor) -> Tensor:
    y = x + 1
    if y.sum() > 0:
        return y
    return x


def root_item(x: Tensor) -> Tensor:
    y = x + 1
    return y * y.mean().item()


@pytest.mark.parametrize("function, line, what", [(root_branch, 2, "bool"), (root_item, 2, "item")])
def test_a_model_that_reads_values_itself_is_an_error_with_the_line(
    function: Callable[[Tensor], Tensor], line: int, what: str
) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    where = f"{Path(__file__).name}:{inspect.getsourcelines(function)[1] + line}"
    with pytest.raises(TraceError, match=what) as caught:
        fxcompress.trace(Model(), X)
    assert where in str(caught.value)
    assert "submodule" in str(caught.value)  # what to do


def test_values_of_parameters_and_buffers_are_constants() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.tensor(3.0))
            self.register_buffer("steps", torch.tensor([2, 1]))

        def forward(self, x: Tensor) -> Tensor:
            steps = self.get_buffer("steps")
            for _ in range(int(steps[0])):
                x = self.fc(x)
            if self.scale > 1 and (self.fc.weight.abs().max() < 100):
                x = x * self.scale.item()
            return x.split([*steps.tolist(), 1], 1)[0]

    traced = traced_and_equal(Model(), X, Y)
    assert calls(traced) == ["fc", "fc"]
    assert traced.meta["opaque"] == ()


# ---- state --------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 6, 1)
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}) for _ in range(2)])
        self.tokens = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(2)])
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("table", torch.randn(6))
        self.register_buffer("cache", torch.randn(6), persistent=False)
        self.aux = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x[..., None]).squeeze(-1)
        for block, token in zip(self.blocks, self.tokens, strict=True):
            assert isinstance(block, nn.ModuleDict)
            x = x + block["norm"](block["a"](x + token)) * self.gain
        x = self.frozen(x * self.get_buffer("table") + self.get_buffer("cache"))
        return (x, self.aux(x)) if self.training else x


def test_state_dict_keys_and_gradients_are_the_models() -> None:
    model = Deep()
    traced = traced_and_equal(model, X, Y)
    expected = {key for key in model.state_dict() if not key.startswith("aux.")}
    assert set(traced.state_dict()) == expected
    assert [key for key in model.state_dict() if key in expected] == list(traced.state_dict())
    assert traced.meta["unreached"] == ("aux",)
    assert {n for n, p in traced.named_parameters() if not p.requires_grad} == {"frozen.weight"}
    model(X).sum().backward()
    traced(X).sum().backward()
    for name, parameter in traced.named_parameters():
        grad = model.get_parameter(name).grad
        assert (grad is None) == (parameter.grad is None), name
        assert_same(grad, parameter.grad)
    traced.load_state_dict({key: value for key, value in Deep().state_dict().items() if key in expected})


def test_the_mode_at_the_call_decides_which_path_is_recorded() -> None:
    model = Deep().train()
    with pytest.warns(UserWarning, match=r"asks for self\.training, at .*test_trace_modules\.py:\d+.*train mode"):
        traced = fxcompress.trace(model, X)
    assert traced.meta["unreached"] == ()
    assert set(traced.state_dict()) == set(model.state_dict())
    assert_same(model(X), traced(X))
    assert isinstance(traced.eval()(X), tuple)


def test_a_layer_under_two_names_and_called_twice() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.c = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(F.relu(self.a(self.c(x)))))

    model = Model()
    traced = traced_and_equal(model, X, Y)
    assert traced.get_submodule("a") is traced.get_submodule("b")
    assert list(traced.state_dict()) == list(model.state_dict())
    assert calls(traced) == ["c", "a", "a", "c"]


def test_tied_weights_stay_tied() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model = Model()
    traced = traced_and_equal(model, torch.tensor([[1, 2]]), torch.tensor([[0, 8], [3, 3]]))
    for copied in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert copied.get_parameter("head.weight") is copied.get_parameter("embed.weight")
        assert list(copied.state_dict()) == ["embed.weight", "head.weight"]


def test_parametrized_modules() -> None:
    class Skew(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu(1) - weight.triu(1).mT

    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    )
    parametrize.register_parametrization(model[2], "weight", Skew())
    traced = traced_and_equal(model, X, Y)
    assert list(traced.state_dict()) == list(model.state_dict())
    traced(X).sum().backward()
    assert traced.get_parameter("2.parametrizations.weight.original").grad is not None


def test_modules_with_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2

    def less(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output - 1

    model[0].register_forward_hook(doubled)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[1].register_forward_hook(lambda module, args, kwargs, out: out + args[0], with_kwargs=True)
    handle = model.register_forward_hook(less)
    traced = traced_and_equal(model, X, Y)
    assert list(traced.state_dict()) == list(model.state_dict())
    handle.remove()
    assert_same(model(X) - 1, traced(X))


def test_a_model_that_torch_pruned() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 3)
    traced = traced_and_equal(model, X, Y)
    assert list(traced.state_dict()) == list(model.state_dict())
    with torch.no_grad():  # the mask is applied in the graph, not once and for all
        for each in (model, traced):
            each.get_parameter("0.weight_orig").fill_(1.0)
    assert_same(model(X), traced(X))


def test_parameters_and_constants_outside_layers() -> None:
    outer = torch.randn(4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.plain = torch.randn(4)
            self.listed = [torch.randn(4), {"x": torch.randn(4)}]

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.w + self.plain * self.listed[0] + self.listed[1]["x"]
            return F.linear(x, self.w.t(), outer) + torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.arange(4)

    model = Model()
    traced = traced_and_equal(model, X, Y)
    assert list(traced.state_dict()) == ["w"]
    plain = model.plain.clone()
    expected = model(X)
    model.plain.zero_()  # the traced model has its own
    assert_same(expected, traced(X))
    assert traced.double()(X.double()).dtype == torch.float64
    assert not torch.equal(plain, model.plain)


def test_the_graph_reads_each_parameter_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w @ self.w.t() + self.w[0]

    traced = traced_and_equal(Model(), X)
    assert [node.target for node in traced.graph.nodes if node.op == "get_attr"] == ["w"]


# ---- modes --------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop(self.fc(x)))
        x = F.dropout(x, 0.5, self.training) + F.dropout(x, p=0.25, training=self.training)
        return F.alpha_dropout(x, 0.5, self.training)


@pytest.mark.parametrize("training", [False, True])
def test_a_recorded_model_switches_between_train_and_eval(training: bool) -> None:
    model = Dropping().train(training)
    twin = copy.deepcopy(model)
    traced = fxcompress.trace(model, X)
    assert all(module.training == training for module in traced.modules())
    for mode in (True, False, True):
        twin.train(mode)
        traced.train(mode)
        torch.manual_seed(5)
        expected = twin(X)
        torch.manual_seed(5)
        assert_same(expected, traced(X))
        assert_same(twin.state_dict(), traced.state_dict())  # running statistics


def test_tracing_draws_no_random_numbers() -> None:
    model = Dropping().train()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fxcompress.trace(model, X)
    assert_same(expected, torch.rand(3))


def test_a_part_kept_in_eval_mode_stays_so() -> None:
    model = nn.Sequential(Dropping(), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    model[0].eval()
    traced = fxcompress.trace(model, X)
    assert not traced.get_submodule("0.norm").training
    torch.manual_seed(5)
    expected = model(X)
    torch.manual_seed(5)
    assert_same(expected, traced(X))


@pytest.mark.parametrize("training", [False, True])
def test_the_callers_model_is_bit_identical_afterwards(training: bool) -> None:
    model = nn.Sequential(Dropping(), nn.Linear(4, 4), Reading(READS["branch"])).train(training)
    model[1].register_forward_hook(lambda module, args, output: cast(Tensor, output) + 1)
    model[0](X).sum().backward()
    before = portrait(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = fxcompress.trace(model, X)
    assert portrait(model) == before
    with torch.no_grad():
        for tensor in [*traced.parameters(), *traced.buffers()]:
            tensor.zero_()
    assert portrait(model) == before


def test_a_forward_that_fails_leaves_the_model_alone() -> None:
    model = nn.Sequential(Dropping(), nn.Linear(5, 4)).train()
    before = portrait(model)
    with pytest.raises(InputError, match=r"\(3, 4\).*model\(\*inputs\)"):
        fxcompress.trace(model, X)
    assert portrait(model) == before


# ---- copies -------------------------------------------------------------------------------------------------------


def test_deepcopy_is_independent() -> None:
    traced = fxcompress.trace(Dropping().eval(), X)
    twin = copy.deepcopy(traced)
    assert isinstance(twin, fxcompress.TracedModule)
    assert str(twin.graph) == str(traced.graph)
    expected = traced(X)
    with torch.no_grad():
        twin.get_parameter("fc.weight").zero_()
    assert_same(expected, traced(X))
    node = next(iter(twin.graph.nodes))
    node.meta["mine"] = 1
    assert "mine" not in next(iter(traced.graph.nodes)).meta


def test_tracing_a_traced_module_copies_it() -> None:
    traced = fxcompress.trace(Dropping().eval(), X)
    again = fxcompress.trace(traced)
    assert again is not traced
    assert str(again.graph) == str(traced.graph)
    assert again.get_parameter("fc.weight") is not traced.get_parameter("fc.weight")


PICKLED = """
import torch, torch.nn.functional as F
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.p = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 1, 1))
        self.const = torch.randn(4, 1, 1)
    def forward(self, x, scale=2.0):
        x = self.conv(x)
        x[:, :2] = x[:, 2:] * scale
        x[:, 0] += 1
        x.relu_()
        x = F.dropout(x, 0.5, self.training) + self.p * self.const
        a, b = torch.split(x, [1, 3], 1)
        return {"y": (torch.cat((b, a), 1).flatten(1) / len(x)).to(torch.float32), "n": x.shape[0]}
"""


def test_a_pickle_needs_no_class_and_loses_nothing(tmp_path: Path) -> None:
    space: dict[str, Any] = {"__name__": "gone"}
    exec(PICKLED, space)
    model, x = space["Odd"]().eval(), torch.randn(2, 3, 6, 6)
    traced = fxcompress.trace(model, x)
    other = torch.randn(3, 3, 8, 6)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(traced))
    torch.save({"x": other, "y": model(other)["y"], "state": traced.state_dict()}, tmp_path / "expected.pt")
    code = """
        import pickle, torch
        model = pickle.load(open("model.pickle", "rb"))
        expected = torch.load("expected.pt")
        found = model(expected["x"])
        assert torch.equal(found["y"], expected["y"]) and found["n"] == 3
        assert list(model.state_dict()) == list(expected["state"]) == ["p", "conv.weight", "conv.bias"]
        assert any(node.meta.get("mutates") for node in model.graph.nodes)
        assert model.meta["batched"] == ("x",)
        model.train()
        assert (model(expected["x"])["y"] != expected["y"]).any()
        """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(Path(fxcompress.__file__).parents[1])}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
