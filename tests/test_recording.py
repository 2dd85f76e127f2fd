"""Lowered modules replay what they ran: the same bits, for whatever changes between two calls."""

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_quantized import fake_quantized
from model_zoo import build, randomize
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from fxcompress.lower import replayed
from fxcompress.lower.features import has_int8_instructions
from fxcompress.lower.flat import flattened
from fxcompress.lower.replayed import Replayed
from fxcompress.passes import Lower
from fxcompress.verify import difference

int8 = pytest.mark.skipif(not has_int8_instructions(), reason="no 8-bit multiply-accumulate instructions")


class Net(nn.Module):
    """Layers that are packed, layers that are not, and functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.gate = nn.Conv2d(24, 24, 1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.last = nn.LayerNorm(24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = F.hardswish(self.deep(x)) + x
        result: Tensor = self.fc(self.last(x.flatten(2).transpose(1, 2)).amax(1))
        return result


def net() -> nn.Module:
    model = Net()
    randomize(model, 0)
    return model.eval()


def lowered(dtype: str, model: nn.Module | None = None, x: Tensor | None = None) -> fxcompress.TracedModule:
    model, x = net() if model is None else model, torch.randn(2, 3, 32, 32) if x is None else x
    source = fake_quantized(model, x) if dtype == "int8" else model
    return fxcompress.compress(source, [Lower(dtype=dtype)], example_inputs=x, progress=False)


def recorded(module: fxcompress.TracedModule) -> Replayed:
    flat = module.__dict__["_flat"]
    assert isinstance(flat, Replayed)
    return flat


def assert_replays(module: fxcompress.TracedModule, *inputs: Tensor) -> None:
    """The third call is replayed, and on other values too gives what the function gives."""
    flat = recorded(module)
    before = flat.recordings
    with torch.no_grad():
        first, second, third = (module(*inputs) for _ in range(3))
        assert flat.recordings == before + 1
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        others = [item * 1.5 + 0.25 if item.is_floating_point() else (item + 1) % 90 for item in inputs]
        expected = flat.function(*others)
        assert torch.equal(module(*others), expected)
        assert flat.recordings == before + 1
    assert third.stride() == first.stride()
    assert not third.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=int8)])
def test_each_shape_is_recorded_when_it_comes_again(dtype: str) -> None:
    module = lowered(dtype)
    for shape in ((2, 3, 32, 32), (1, 3, 32, 32), (5, 3, 40, 24)):
        assert_replays(module, torch.randn(shape))
    image = torch.randn(2, 3, 32, 32)
    expected = recorded(module).function(image)
    assert torch.equal(module(image.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x1_0"])
@int8
def test_real_models(name: str) -> None:
    model, x = build(name)
    assert_replays(lowered("int8", model, x), x)


@int8
def test_a_transformer_with_keyword_arguments() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = transformers.BertModel(config).eval()
    tokens = {"input_ids": torch.randint(0, 100, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    tokens["attention_mask"][1, 4:] = 0
    fast = fxcompress.compress(model, [Lower(dtype="float32")], example_inputs=tokens, progress=False)
    with torch.no_grad():
        first, *_, third = (fast(**tokens) for _ in range(3))
        assert recorded(fast).recordings == 1
        assert type(third) is type(first)
        assert torch.equal(third.last_hidden_state, first.last_hidden_state)
        assert torch.equal(third["pooler_output"], first["pooler_output"])
        tokens["attention_mask"][0, 2:] = 0  # values, which a recording must not hold
        expected = recorded(fast).function(**tokens)
        assert torch.equal(fast(**tokens).last_hidden_state, expected.last_hidden_state)


def test_other_weights_are_seen() -> None:
    x = torch.randn(2, 3, 32, 32)
    module = lowered("float32", x=x)
    before = [module(x) for _ in range(3)][-1]
    state = {key: value * 0.5 for key, value in module.state_dict().items()}
    module.load_state_dict(state)
    after = [module(x) for _ in range(3)]
    assert all(torch.equal(item, after[0]) for item in after)
    assert not torch.equal(before, after[0])
    assert torch.equal(after[0], copy.deepcopy(module)(x))
    module.last.weight = nn.Parameter(torch.zeros(24))  # of a layer that is not packed: it shows at once
    assert torch.equal(module(x), copy.deepcopy(module)(x))
    with torch.no_grad():
        module.last.weight.add_(1)
    assert torch.equal(module(x), copy.deepcopy(module)(x))
    assert not torch.equal(module(x), after[0])


def test_modes_and_hooks_are_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.PReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(64 * 36, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    run, calm = flattened(fxcompress.trace(model, x)), model(x).detach()
    assert isinstance(run, Replayed)
    assert_replays_flat(run, x)
    seen: list[Tensor] = []
    handle = model_layer(run, nn.PReLU).register_forward_hook(lambda layer, args, result: seen.append(result))
    run(x)
    assert len(seen) == 1
    handle.remove()
    run(x)
    assert len(seen) == 1
    model_layer(run, nn.Dropout).train()
    assert not torch.equal(run(x), calm)
    model_layer(run, nn.Dropout).eval()
    assert difference(run(x), calm) < 1e-6


def model_layer(run: Replayed, kind: type[nn.Module]) -> nn.Module:
    return next(layer for layer in run._sources._plain if isinstance(layer, kind))


def assert_replays_flat(run: Replayed, *inputs: Tensor) -> None:
    for _ in range(3):
        run(*inputs)
    assert run.recordings == 1


def test_parameters_that_change_in_every_call_are_read() -> None:
    x = torch.randn(2, 3, 32, 32)
    module = lowered("float32", x=x)
    for number in range(6):
        weight = {"last.weight": torch.full((24,), float(number))}
        with torch.no_grad():
            found = torch.func.functional_call(module, weight, (x,))
            module.last.weight.copy_(weight["last.weight"])
        assert torch.equal(found, recorded(module).function(x))


def glances(x: Tensor) -> Tensor:
    return x + 1 if bool(x.sum() > 0) else x - 1


def graph_of(function: Callable[..., Any]) -> fx.GraphModule:
    """A function's graph, with its module."""
    tracer = fx.Tracer(autowrap_functions=(glances,))
    return fx.GraphModule({}, tracer.trace(function))


def test_functions_of_others_are_never_recorded() -> None:
    assert not isinstance(flattened(graph_of(lambda x: glances(x))), Replayed)


LOOKING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.sum().item(),
    "nonzero": lambda x: x[x.nonzero()[0]],
    "mask": lambda x: x[x > 0],
    "scale": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], scale=x.abs().mean()),
    "nan": lambda x: torch.nan_to_num(x / 0, nan=x.sum()),
    "eps": lambda x: F.layer_norm(x, (4,), eps=x.abs().mean()),
    "split": lambda x: x.split((x > 9).sum() + 2),
    "chunk": lambda x: x.chunk((x[0] > 0).sum() + 1)[0],
    "roll": lambda x: torch.roll(x, (x > 0).sum()),
    "tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "random": lambda x: F.dropout(x, 0.5, True),
    "write": lambda x: x.add_(1) * 2,
    "write through a view": lambda x: x.view(-1).mul_(2).sum(),
}


@pytest.mark.parametrize("name", LOOKING)
def test_what_depends_on_values_is_run(name: str) -> None:
    function = LOOKING[name]
    run = flattened(graph_of(function))
    assert isinstance(run, Replayed)
    for seed in range(8):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        y = x.clone()
        torch.manual_seed(seed)
        expected = function(x)
        torch.manual_seed(seed)
        found = run(y)
        assert torch.equal(x, y)
        for one, other in zip(leaves(found), leaves(expected), strict=True):
            assert torch.equal(one, other)
            one.zero_()  # the caller's own
    assert run.recordings == 0


def leaves(value: Any) -> list[Tensor]:
    return [item for item in pytree.tree_leaves(value) if isinstance(item, Tensor)]


SIZES: dict[str, Callable[[Tensor], Any]] = {
    "power": lambda x: x * x.size(-1) ** -0.5,
    "quotient": lambda x: x * (x.shape[-1] ** -0.5 / 3),
    "reshape": lambda x: x.reshape(x.shape[0], -1, 2).sum(1) / x.numel(),
    "range": lambda x: x + torch.arange(x.shape[-1], dtype=x.dtype) - math.sqrt(x.shape[0]),
    "infinity": lambda x: x.masked_fill(x < 0, float("-inf")).softmax(-1),
    "indices": lambda x: x[torch.tensor([1, 0]).numel() :, [0, 2]],
    "join": lambda x: torch.cat([x.split(8, 1)[2], x.split(8, 1)[0]], 1).view(torch.int32),
    "kept": lambda x: {"all": x, "values": torch.sort(x), "none": None, "number": 3, "size": x.shape[0]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_numbers_and_values_are_not(name: str, dtype: torch.dtype) -> None:
    """Even where the first inputs are zeros, which tell nothing."""
    function = SIZES[name]
    run = flattened(graph_of(function))
    assert isinstance(run, Replayed)
    for width in (24, 72, 96):
        for _ in range(3):
            run(torch.zeros(3, width, dtype=dtype))
        for seed in range(20):
            x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            expected, found = function(x), run(x)
            assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(expected), strict=True))
            assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert run.recordings == (0 if name == "indices" else 3)  # torch.tensor makes a tensor of Python's numbers


def test_buffers_that_the_graph_writes_into() -> None:
    graph = fx.Graph()
    seen, x = graph.create_node("get_attr", "seen"), graph.placeholder("x")
    graph.output(graph.call_method("mul", (graph.call_method("add_", (seen, x)), 1)))
    holder = nn.Module()
    holder.register_buffer("seen", torch.zeros(1))
    run = flattened(fx.GraphModule(holder, graph))
    assert run is not None
    assert [run(torch.ones(1)).item() for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]


def test_statistics_that_a_norm_writes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).train()
    x = torch.randn(5, 4)
    run = flattened(fxcompress.trace(model, x))
    plain = copy.deepcopy(model)
    assert isinstance(run, Replayed)
    for _ in range(4):
        with torch.no_grad():
            assert torch.equal(run(x), plain(x))
    norm = model_layer(run, nn.BatchNorm1d)
    assert torch.equal(norm.get_buffer("running_mean"), plain[1].get_buffer("running_mean"))


def test_numbers_beside_tensors() -> None:
    def several(x: Tensor, y: Tensor, scale: float = 2.0) -> Any:
        return {"sum": x + y, "parts": (x * scale, [y])}

    run = flattened(graph_of(several))
    assert isinstance(run, Replayed)
    x, y = torch.randn(3), torch.randn(3)
    for scale in (2.0, 3.0, 2, -0.0, 0.0):
        for _ in range(3):
            found = run(x, y=y, scale=scale)
            assert torch.equal((1 / found["parts"][0]), 1 / (x * scale))
            found["sum"].zero_()
    assert run.recordings == 5
    assert torch.equal(run(x, y)["sum"], x + y)


def test_only_so_many_recordings_are_made() -> None:
    run = flattened(graph_of(lambda x: x.relu() + 1))
    assert isinstance(run, Replayed)
    for size in range(1, 2 * replayed.MOST):
        for _ in range(3):
            assert torch.equal(run(torch.ones(size)), torch.full((size,), 2.0))
    assert run.recordings == replayed.MOST
    for size in range(1, 2 * replayed.SEEN):
        run(torch.ones(size, 2))
    assert len(run._seen) == replayed.SEEN


def test_threads_record_and_replay() -> None:
    modules = lowered("float32"), lowered("float32")
    images = [torch.randn(2, 3, 32 + 8 * (number % 3), 32) for number in range(24)]
    expected = [recorded(modules[0]).function(x) for x in images]
    filters = list(warnings.filters)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for module in modules:
                assert all(torch.equal(a, b) for a, b in zip(pool.map(module, images), expected, strict=True))
    assert all(recorded(module).recordings > 0 for module in modules)
    assert warnings.filters == filters


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_whatever_watches_sees_everything() -> None:
    x = torch.randn(2, 3, 32, 32)
    module = lowered("float32", x=x)
    expected, *_ = (module(x) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(module(x), expected) or module(x).dtype == expected.dtype
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() >= 0
    with torch.device("meta"):
        assert torch.equal(module(x), expected)
    assert recorded(module).recordings == 1
    run = flattened(graph_of(lambda x: x.relu() + 1))
    assert isinstance(run, Replayed)
    assert_replays_flat(run, x)
    traced = torch.jit.trace(lambda x: run(x), x)  # and compares the two
    assert "relu" in str(traced.graph)


def test_errors_are_those_of_the_function() -> None:
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)).eval()
    run = flattened(fxcompress.trace(module, torch.zeros(2, 3, dtype=torch.long)))
    assert isinstance(run, Replayed)
    assert_replays_flat(run, torch.arange(6).reshape(2, 3))
    with pytest.raises(IndexError):
        run(torch.full((2, 3), 10))


def test_what_torchscript_does_not_know_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> None:
        raise RuntimeError(f"unknown: {text}")

    run = flattened(graph_of(lambda x: x.relu() + 1))
    assert isinstance(run, Replayed)
    monkeypatch.setattr(torch.jit, "CompilationUnit", refuse)
    for _ in range(4):
        assert torch.equal(run(torch.ones(3)), torch.full((3,), 2.0))
    assert run.recordings == 0


KINDS: dict[str, Callable[[], Tensor]] = {
    "sliced": lambda: torch.randn(8, 8)[:, ::2],
    "expanded": lambda: torch.randn(1, 4).expand(6, 4),
    "empty": lambda: torch.randn(0, 4),
    "parameter": lambda: nn.Parameter(torch.randn(6, 4)),
    "complex": lambda: torch.randn(6, 4, dtype=torch.complex64),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_tensors_of_every_kind(kind: str) -> None:
    run = flattened(graph_of(lambda x: torch.clone(x)))
    assert run is not None
    for _ in range(4):
        x = KINDS[kind]()
        found = run(x)
        assert found.dtype == x.dtype
        pairs = zip(found.unbind(), x.unbind(), strict=True) if x.is_nested else [(found, x)]
        for one, other in pairs:
            assert torch.equal(one.to_dense(), other.to_dense())


def test_a_recording_goes_with_its_module() -> None:
    """At once, without the garbage collector: buffers that are constants of it too."""
    module = lowered("float32")
    assert_replays(module, torch.randn(2, 3, 32, 32))
    twin = copy.deepcopy(module)
    held = [weakref.ref(item) for item in (module.fc, *module.fc.buffers(), *module.last.parameters())]
    gc.collect()
    gc.disable()
    try:
        del module
        assert [item() for item in held] == [None] * len(held)
    finally:
        gc.enable()
    assert recorded(twin).recordings == 0
    assert_replays(twin, torch.randn(2, 3, 32, 32))


def test_kernels_of_other_weights_are_not_kept() -> None:
    module = lowered("float32")
    for side in (32, 40, 48):
        assert_replays(module, torch.randn(2, 3, side, side))
    old = weakref.ref(module.get_submodule("deep")._kernel)
    module.load_state_dict(module.state_dict())
    module(torch.randn(2, 3, 32, 32))
    gc.collect()
    assert old() is None
    assert recorded(module).recordings == 0
