"""Unstructured pruning against explicit loops: exact counts, ties by index, n:m and blocks."""

import math
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress import InputError, SelectionError
from fxcompress.passes import LevelPruner, Speedup

X = torch.randn(2, 3)


def pair() -> Net:
    return Net(lambda n, x: n.b(torch.relu(n.a(x))), a=nn.Linear(3, 7), b=nn.Linear(7, 5))


def lowest(weight: Tensor, count: int) -> Tensor:
    """True where an element stays: all but the ``count`` smallest magnitudes, the first of equals going first."""
    values = weight.detach().abs().flatten().tolist()
    mask = torch.ones(len(values), dtype=torch.bool)
    for i in sorted(range(len(values)), key=lambda i: (values[i], i))[:count]:
        mask[i] = False
    return mask.view(weight.shape)


def masks_of(net: nn.Module, pruner: LevelPruner, x: Any = X) -> dict[str, Tensor]:
    return fxcompress.masks(fxcompress.compress(net, [pruner], example_inputs=x))


@pytest.mark.parametrize("sparsity", [0.04, 0.29, 0.5, 0.58, 0.9, math.nextafter(1, 0)])
def test_exactly_int_n_s_elements_go(sparsity: float) -> None:
    net = pair()
    masks = masks_of(net, LevelPruner(sparsity))
    for name, number in (("a.weight", 21), ("b.weight", 35)):
        found = masks.get(name, torch.ones_like(net.get_parameter(name)).bool())
        expected = lowest(net.get_parameter(name), min(int(number * sparsity), number))
        if sparsity < 0.999:
            assert torch.equal(found, expected)
        assert int((~found).sum()) in (int(number * sparsity), number - 1)
    assert not any(name.endswith("bias") for name in masks)


def test_ties_go_by_index() -> None:
    net = pair()
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([1.0, -1.0, 0.5]).repeat(7, 1))
    mask = masks_of(net, LevelPruner(11 / 21 + 1e-9, include="a"))["a.weight"]
    expected = torch.ones(7, 3, dtype=torch.bool)
    expected[:, 2] = False
    expected.view(-1)[[0, 1, 3, 4]] = False
    assert torch.equal(mask, expected)


def test_one_ranking_over_all_layers() -> None:
    net = pair()
    with torch.no_grad():
        net.a.weight.mul_(0.8)
    masks = masks_of(net, LevelPruner(0.6, scope="global"))
    values = torch.cat((net.a.weight.flatten(), net.b.weight.flatten()))
    expected = lowest(values, int(56 * 0.6))
    assert torch.equal(masks["a.weight"].flatten(), expected[:21])
    assert torch.equal(masks["b.weight"].flatten(), expected[21:])


def test_which_layers_are_taken() -> None:
    net = Net(
        lambda n, x: n.fc(n.norm(n.t(n.conv(x))).mean((2, 3))),
        conv=nn.Conv2d(3, 4, 3), t=nn.ConvTranspose2d(4, 4, 2), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    assert set(masks_of(net, LevelPruner(0.5), x)) == {"conv.weight", "t.weight", "fc.weight"}
    assert set(masks_of(net, LevelPruner(0.5, include=nn.Linear), x)) == {"fc.weight"}
    assert set(masks_of(net, LevelPruner(0.5, exclude=["fc", "t*"]), x)) == {"conv.weight"}
    masks = masks_of(net, LevelPruner({"*": 0.5, "t": 0.25, "fc": 0.0}), x)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"conv.weight": 54, "t.weight": 16}
    with pytest.raises(SelectionError, match=r"'cnv'.*conv"):
        masks_of(net, LevelPruner(0.5, include="cnv"), x)


class Words(nn.Module):
    """Layers of every kind that holds a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        out: Tensor = self.head(x + self.mix(x.mT).mT)
        return out


def test_any_layer_with_a_weight() -> None:
    model, x = Words().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    masked = fxcompress.compress(model, [LevelPruner(0.5)], example_inputs=x)
    masks = fxcompress.masks(masked)
    expected = {"embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "mix.weight"}
    assert set(masks) == expected  # tied weights have one mask
    plain = Words().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in expected:
            parameter = plain.get_parameter(name)
            parameter.mul_(lowest(parameter, parameter.numel() // 2))
    torch.testing.assert_close(masked(x), plain(x))
    small = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    torch.testing.assert_close(small(x), plain(x))
    assert small.get_parameter("head.weight") is small.get_parameter("embed.weight")


# ---- patterns -----------------------------------------------------------------------------------------------------


def kept_of_run(values: list[float], kept: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    return [i in order[:kept] for i in range(len(values))]


@pytest.mark.parametrize("pattern, kept, of", [("2:4", 2, 4), ("1:4", 1, 4), ("3:5", 3, 5), ("2:2", 2, 2)])
@pytest.mark.parametrize(
    "layer, axis",
    [
        (nn.Linear(8, 3), 1),
        (nn.Linear(10, 3), 1),  # a shorter run is left over
        (nn.Conv2d(8, 3, (2, 3)), 1),
        (nn.Conv1d(8, 4, 3, groups=2), 1),
        (nn.ConvTranspose2d(8, 3, 2), 0),  # stored as (inputs, outputs, ...)
    ],
    ids=str,
)
def test_n_of_m_along_the_inputs(layer: nn.Module, axis: int, pattern: str, kept: int, of: int) -> None:
    net = Net(lambda n, x: n.a(x), a=layer)
    size = 10 if isinstance(layer, nn.Linear) and layer.in_features == 10 else 8
    x = torch.randn({2: (2, size), 3: (2, size, 6), 4: (2, size, 6, 6)}[net.a.weight.dim()])
    weight = net.a.weight.detach().movedim(axis, -1)
    expected = torch.empty_like(weight, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape[:-1])).view(-1, weight.dim() - 1):
        values = weight[tuple(place)].tolist()
        row: list[bool] = []
        for start in range(0, len(values), of):
            row += kept_of_run(values[start : start + of], kept)
        expected[tuple(place)] = torch.tensor(row)
    masks = masks_of(net, LevelPruner(pattern=pattern), x)
    found = masks.get("a.weight", torch.ones_like(net.a.weight, dtype=torch.bool)).movedim(axis, -1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("block", [(4, 4), (2, 3), (1, 5), (7, 1)])
@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv2d(2, 7, (1, 5))], ids=str)
def test_blocks_by_their_mean_magnitude(layer: nn.Module, block: tuple[int, int]) -> None:
    net = Net(lambda n, x: n.a(x), a=layer)
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 2, 6, 6)
    matrix = net.a.weight.detach().abs().flatten(1).double()
    corners = [(i, j) for i in range(0, matrix.shape[0], block[0]) for j in range(0, matrix.shape[1], block[1])]
    blocks = [(float(matrix[i : i + block[0], j : j + block[1]].mean()), i, j) for i, j in corners]
    expected = torch.ones_like(matrix, dtype=torch.bool)
    for _, i, j in sorted(blocks)[: int(len(blocks) * 0.5)]:
        expected[i : i + block[0], j : j + block[1]] = False
    found = masks_of(net, LevelPruner(0.5, block=block), x)["a.weight"]
    assert torch.equal(found.flatten(1), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_looked_at_as_outputs_by_inputs(groups: int) -> None:
    """The mask is that of the convolution whose weight is (outputs, inputs of a group, ...)."""
    net = Net(lambda n, x: n.a(x), a=nn.ConvTranspose2d(12, 8, (1, 2), groups=groups))
    twin = Net(lambda n, x: n.a(x), a=nn.Conv2d(12, 8, (1, 2), groups=groups))
    parts = [part.transpose(0, 1) for part in net.a.weight.detach().chunk(groups)]
    with torch.no_grad():
        twin.a.weight.copy_(torch.cat(parts))
    x = torch.randn(2, 12, 5, 5)
    for pruner in (LevelPruner(pattern="2:4"), LevelPruner(0.5, block=(2, 5))):
        mask = masks_of(net, pruner, x)["a.weight"]
        expected = masks_of(twin, pruner, x)["a.weight"]
        assert torch.equal(torch.cat([part.transpose(0, 1) for part in mask.chunk(groups)]), expected)


@pytest.mark.parametrize("block", [None, (2, 2)])
def test_no_layer_vanishes_from_a_global_ranking(block: tuple[int, int] | None) -> None:
    net = pair()
    with torch.no_grad():
        net.a.weight.mul_(1e-3).abs_()
        net.a.weight[2, 1] = net.a.weight[6, 2] = 0.1  # the last of equals stays
    masks = masks_of(net, LevelPruner(0.99, scope="global", block=block))
    if block is None:
        assert masks["a.weight"].nonzero().tolist() == [[6, 2]]
        assert masks["b.weight"].sum() == 1
        masks = masks_of(net, LevelPruner(0.6, scope="global"))
        assert int((~masks["a.weight"]).sum() + (~masks["b.weight"]).sum()) == int(56 * 0.6)
        assert masks["a.weight"].sum() == 1
    assert all(mask.any() for mask in masks.values())


# ---- without inputs, again, and removed ---------------------------------------------------------------------------


class Plain(nn.Module):
    """A forward that torch.fx can follow without running it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 7), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(7, 5)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x)).view(x.shape[0], 5) * self.gain
        return out


@pytest.mark.parametrize("training", [False, True])
def test_no_inputs_are_needed(training: bool) -> None:
    model = Plain().train(training)
    masked = fxcompress.compress(model, [LevelPruner(0.5)])
    expected = masks_of(model, LevelPruner(0.5))
    found = fxcompress.masks(masked)
    assert set(found) == set(expected) == {"body.0.weight", "head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {key for key in masked.state_dict() if not key.startswith("_masks.")} == set(model.state_dict())
    assert masked.training == training
    assert not masked.meta["unreached"]
    plain = Plain().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, mask in found.items():
            plain.get_parameter(name).mul_(mask)
    for x in (X, torch.randn(5, 3)):
        torch.testing.assert_close(masked.eval()(x), plain(x))
    small = fxcompress.compress(masked, [Speedup()], example_inputs=X)
    torch.testing.assert_close(small(X), plain(X))


def test_a_forward_that_needs_inputs_says_so() -> None:
    class Looping(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([super(Looping, self).forward(row[None])[0] for row in x])

    with pytest.raises(InputError, match=r"example_inputs is missing.*Pass a batch"):
        fxcompress.compress(Looping(), [LevelPruner(0.5)])
    assert fxcompress.masks(fxcompress.compress(Looping(), [LevelPruner(0.5)], example_inputs=X))


def test_a_second_pruner_counts_from_the_dense_number() -> None:
    net = pair()
    first = fxcompress.compress(net, [LevelPruner(0.3)], example_inputs=X)
    again = fxcompress.compress(first, [LevelPruner(0.6)], example_inputs=X)
    assert torch.equal(fxcompress.masks(again)["b.weight"], lowest(net.b.weight, int(35 * 0.6)))
    less = fxcompress.compress(first, [LevelPruner(0.1)], example_inputs=X)
    assert torch.equal(fxcompress.masks(less)["b.weight"], fxcompress.masks(first)["b.weight"])


def test_speedup_multiplies_elements_in_and_keeps_the_shapes() -> None:
    net = pair()
    masked = fxcompress.compress(net, [LevelPruner(0.2)], example_inputs=X)
    found = [mask for name, mask in fxcompress.masks(masked).items() if name.endswith("weight")]
    assert all(mask.any(dim).all() for mask in found for dim in (0, 1)), "a whole slice would be removed"
    plain = fxcompress.compress(masked, [Speedup()], example_inputs=X)
    assert fxcompress.masks(plain) == {}
    assert list(plain.state_dict()) == list(net.state_dict())
    for name in ("a.weight", "b.weight"):
        expected = net.get_parameter(name) * fxcompress.masks(masked)[name]
        assert torch.equal(plain.get_parameter(name), expected)
    torch.testing.assert_close(plain(X), masked(X))


def test_a_row_whose_elements_are_all_masked_is_a_constant_and_goes() -> None:
    net = pair()
    masked = fxcompress.compress(net, [LevelPruner(0.5)], example_inputs=X)
    keep = fxcompress.masks(masked)["a.weight"].any(1)
    assert not keep.all()
    plain = fxcompress.compress(masked, [Speedup()], example_inputs=X)
    assert plain.get_submodule("a").out_features == keep.sum()
    torch.testing.assert_close(plain(X), masked(X))


@pytest.mark.parametrize(
    "options, part",
    [
        ({}, "sparsity is missing"),
        ({"pattern": "2:4", "sparsity": 0.5}, "leave sparsity"),
        ({"pattern": "5:4"}, "5:4"),
        ({"pattern": "two"}, "two"),
        ({"sparsity": 0.5, "block": (0, 4)}, "block"),
        ({"sparsity": 0.5, "scope": "all"}, "scope"),
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": {"*": 0.5}, "scope": "global"}, "mapping"),
    ],
)
def test_options_are_checked_when_the_pass_is_written(options: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        LevelPruner(**options)
