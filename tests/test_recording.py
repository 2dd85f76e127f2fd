"""Lowered modules replay what they ran: the same bits, for whatever changes between two calls."""

import copy
import gc
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

import fxcompress
from fxcompress.lower import recording
from fxcompress.lower.features import has_int8_instructions
from fxcompress.lower.flat import flattened
from fxcompress.lower.recording import Recorded
from fxcompress.passes import Lower

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


def recorded(module: fxcompress.TracedModule) -> Recorded:
    flat = module.__dict__["_flat"]
    assert isinstance(flat, Recorded)
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
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.PReLU(), nn.Flatten(), nn.Linear(64 * 36, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    module = lowered("float32", model, x)
    assert_replays(module, x)
    seen: list[Tensor] = []
    handle = module.get_submodule("1").register_forward_hook(lambda layer, args, result: seen.append(result))
    module(x)
    assert len(seen) == 1
    handle.remove()
    module(x)
    assert len(seen) == 1


def graph_of(function: Callable[..., Any]) -> fx.GraphModule:
    """A function's graph, with its module."""
    tracer = fx.Tracer(autowrap_functions=(glances,))
    return fx.GraphModule({}, tracer.trace(function))


def glances(x: Tensor) -> Tensor:
    return x + 1 if bool(x.sum() > 0) else x - 1


def numbers(x: Tensor) -> Tensor:
    return x * x.sum().item()


@pytest.mark.parametrize("function", [lambda x: glances(x), numbers, lambda x: x[x.nonzero()[0]]])
def test_what_looks_at_values_is_never_recorded(function: Callable[..., Any]) -> None:
    assert not isinstance(flattened(graph_of(function)), Recorded)


def test_a_tensor_that_a_call_makes_is_made_in_every_call() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.tensor, ([1.0],))
    graph.output(graph.call_method("add_", (made, graph.call_method("sum", (x,)))))
    run = flattened(fx.GraphModule({}, graph))
    assert run is not None
    assert [float(run(torch.ones(2))) for _ in range(4)] == [3.0] * 4


def test_masks_of_values_are_run() -> None:
    def chosen(x: Tensor) -> Tensor:
        return x[x > 0]

    run = flattened(graph_of(chosen))
    assert isinstance(run, Recorded)  # the graph does not tell
    for seed in range(6):
        x = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(run(x), x[x > 0])


def test_random_numbers_are_drawn_anew_and_not_from_the_callers() -> None:
    def noisy(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, True)

    run = flattened(graph_of(noisy))
    assert isinstance(run, Recorded)
    x = torch.ones(100)
    found = []
    for call in (run, noisy):
        torch.manual_seed(0)
        found.append([call(x) for _ in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert run.recordings == 0


def test_inputs_that_the_graph_writes_into() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_method("mul", (graph.call_method("add_", (x, 1)), 2)))
    run = flattened(fx.GraphModule({}, graph))
    assert run is not None
    x = torch.zeros(3)
    assert [run(x)[0].item() for _ in range(4)] == [2.0, 4.0, 6.0, 8.0]
    assert x[0] == 4


def test_buffers_that_the_graph_writes_into() -> None:
    graph = fx.Graph()
    seen, x = graph.create_node("get_attr", "seen"), graph.placeholder("x")
    graph.output(graph.call_method("mul", (graph.call_method("add_", (seen, x)), 1)))
    holder = nn.Module()
    holder.register_buffer("seen", torch.zeros(1))
    run = flattened(fx.GraphModule(holder, graph))
    assert run is not None
    assert [run(torch.ones(1)).item() for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]


def test_results_and_structures() -> None:
    def several(x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Any]:
        return {"sum": x + y, "parts": (x * scale, [y]), "nothing": None}

    run = flattened(graph_of(several))
    assert isinstance(run, Recorded)
    x, y = torch.randn(3), torch.randn(3)
    for scale in (2.0, 3.0, 2.0):
        for _ in range(3):
            found = run(x, y=y, scale=scale)
            assert torch.equal(found["parts"][0], x * scale)
            assert found["nothing"] is None
            found["sum"].zero_()  # the caller's own
    assert torch.equal(run(x, y)["sum"], x + y)


def test_a_few_recordings_are_kept() -> None:
    run = flattened(graph_of(lambda x: x.relu() + 1))
    assert isinstance(run, Recorded)
    for size in range(1, 2 * recording.KEPT + 1):
        for _ in range(3):
            assert torch.equal(run(torch.ones(size)), torch.full((size,), 2.0))
    assert run.recordings == recording.KEPT
    for size in range(1, 3 * recording.SEEN):
        run(torch.ones(size, 2))
    assert len(run._known) == recording.SEEN


def test_threads_record_and_replay() -> None:
    module = lowered("float32")
    images = [torch.randn(2, 3, 32 + 8 * (number % 3), 32) for number in range(24)]
    expected = [recorded(module).function(x) for x in images]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(module, images), expected, strict=True))
    assert recorded(module).recordings > 0


def test_autocast_and_tracing_run_the_function() -> None:
    x = torch.randn(2, 3, 32, 32)
    module = lowered("float32", x=x)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = module(x)
    assert recorded(module).recordings == 0
    assert found.shape == (2, 10)


def test_a_recording_goes_with_its_module() -> None:
    module = lowered("float32")
    assert_replays(module, torch.randn(2, 3, 32, 32))
    weight = weakref.ref(module.fc)
    twin = copy.deepcopy(module)
    del module
    gc.collect()
    assert weight() is None
    assert recorded(twin).recordings == 0
    assert_replays(twin, torch.randn(2, 3, 32, 32))
