"""Pruners that run another one again and again, with training in between: AGP, linear, lottery tickets."""

import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import interrupted
import pytest
import torch
from nets import Net
from test_training import Batch, X, data, loss, network_of, sgd, task
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import InputError, Pass, PassError, TracedModule
from fxcompress.passes import (
    ADMMPruner,
    AGPPruner,
    FineTune,
    FPGMPruner,
    L1FilterPruner,
    LevelPruner,
    LinearPruner,
    LotteryTicketPruner,
    ScheduledPruner,
    Speedup,
    TaylorFOPruner,
)


def wide(width: int = 100) -> nn.Module:
    """Two groups of odd widths, norms and biases away from their defaults."""
    torch.manual_seed(0)
    return Net(
        lambda net, x: net.head(F.relu(net.norm(net.second(F.relu(net.first(x))))).mean((2, 3))),
        first=nn.Conv2d(1, width, 3, padding=1),
        second=nn.Conv2d(width, width + 3, 1),
        norm=nn.BatchNorm2d(width + 3),
        head=nn.Linear(width + 3, 4),
    )


def kept(module: nn.Module, name: str) -> int:
    """How many channels of a layer are not masked."""
    mask = fxcompress.masks(module).get(f"{name}.bias")
    size = module.get_parameter(f"{name}.bias").numel()
    return size if mask is None else int(mask.sum())


def run(item: Pass, model: nn.Module | None = None, **options: Any) -> TracedModule:
    settings = {name: options.pop(name) for name in ("checkpoint", "seed") if name in options}
    return fxcompress.compress(
        network_of(0) if model is None else model, [item], example_inputs=X, task=task(**options), **settings
    )


# ---- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, power, initial, iterations",
    [(AGPPruner, 3, 0.0, 7), (AGPPruner, 3, 0.15, 4), (LinearPruner, 1, 0.0, 7), (LinearPruner, 1, 0.15, 4)],
)
def test_sparsity_follows_the_curve_to_the_digit(
    kind: type[ScheduledPruner], power: int, initial: float, iterations: int
) -> None:
    """At every iteration, as the inner pruner is asked, and as the masks are while it trains."""
    final, asked, seen = 0.83, [], []

    @dataclass(frozen=True)
    class Asked(L1FilterPruner):
        def run(self, module: TracedModule, context: fxcompress.Context) -> TracedModule:
            asked.append(self.sparsity)
            return super().run(module, context)

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        seen.append((kept(model, "first"), kept(model, "second")))
        return loss(model, batch)

    pruner = kind(Asked(final), initial=initial, iterations=iterations, epochs_per_iteration=2)
    run(pruner, wide(), loss=watched, batches=data(2))
    curve = [final + (initial - final) * (1 - t / iterations) ** power for t in range(1, iterations + 1)]
    assert asked == curve
    assert curve[-1] == final
    expected = [(100 - int(100 * s), 103 - int(103 * s)) for s in curve]
    assert seen == [widths for widths in expected for _ in range(4)]  # two epochs of two batches each


def test_a_mapping_of_sparsities_follows_the_curve_pattern_by_pattern() -> None:
    inner = LevelPruner({"*": 0.4, "second": 0.9}, exclude="head")
    masked = run(AGPPruner(inner, initial=0.1, iterations=2))
    share = fxcompress.sparsity(masked)
    assert share["first.weight"] == pytest.approx(int(63 * 0.4) / 63)
    assert share["second.weight"] == pytest.approx(int(567 * 0.9) / 567)
    assert share["head.weight"] == 0
    notes = masked.meta["history"][-1].notes
    assert "iteration 1 of 2: sparsity 0.3625, 0.8" in notes  # 0.4 - 0.3/8 and 0.9 - 0.8/8
    assert "iteration 2 of 2: sparsity 0.4, 0.9" in notes


def test_masks_are_renewed_by_scores_of_the_trained_weights_and_only_grow() -> None:
    masks: list[Tensor] = []

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        masks.append(fxcompress.masks(model)["second.weight"])
        return loss(model, batch)

    model = network_of(0)
    final = run(AGPPruner(LevelPruner(0.6), iterations=4, epochs_per_iteration=3), model, loss=watched)
    assert all(not bool((later & ~earlier).any()) for earlier, later in pairwise(masks))
    assert len({int(mask.sum()) for mask in masks}) == 4
    at_once = fxcompress.masks(fxcompress.compress(model, [LevelPruner(0.6)], example_inputs=X))["second.weight"]
    assert not torch.equal(fxcompress.masks(final)["second.weight"], at_once)


@pytest.mark.parametrize(
    "optimizer",
    [sgd, lambda p: torch.optim.Adam(p, weight_decay=0.1)],
    ids=["sgd with momentum and decay", "adam with decay"],
)
@pytest.mark.parametrize(
    "item",
    [
        AGPPruner(L1FilterPruner(0.5), iterations=2),
        AGPPruner(LevelPruner(0.7), iterations=2),
        LotteryTicketPruner(LevelPruner(0.7), rounds=2),
    ],
    ids=["channels", "elements", "ticket"],
)
def test_what_is_masked_counts_as_zero_through_any_optimizer(item: Pass, optimizer: Any) -> None:
    """A plain network with zeros where masks are computes the same after more training, and so does the removed one."""
    masked = run(item, optimizer=optimizer)
    trained = fxcompress.compress(masked, [FineTune(2)], example_inputs=X, task=task(optimizer=optimizer))
    masks = fxcompress.masks(trained)
    assert masks.keys() == fxcompress.masks(masked).keys()
    plain = network_of(0)
    state = {name: tensor * masks.get(name, True) for name, tensor in trained.state_dict().items()}
    plain.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("_masks.")})
    removed = fxcompress.compress(trained, [Speedup()], example_inputs=X)
    with torch.no_grad():
        torch.testing.assert_close(trained(X), plain(X))
        torch.testing.assert_close(removed(X), plain(X))


# ---- compositions ------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A small ViT: patches, a class token, positions, two layers of six heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 48))
        self.positions = nn.Parameter(torch.randn(1, 10, 48) * 0.1)
        layer = nn.TransformerEncoderLayer(48, 6, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(48), enable_nested_tensor=False)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.layers(x)[:, 0])


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


adam = {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-3), "batches": data(2)}


@pytest.mark.parametrize(
    "inner",
    [L1FilterPruner(0.5, scope="global"), FPGMPruner(0.5), TaylorFOPruner(0.5, scope="global", norm_by="layer")],
    ids=["l1", "fpgm", "taylor"],
)
def test_agp_then_removal(inner: Pass) -> None:
    """Verified, and exactly as many channels gone as at once."""
    masked = run(AGPPruner(inner, iterations=3), wide(20))
    left = kept(masked, "first") + kept(masked, "second")
    assert left == (43 - int(43 * 0.5) if getattr(inner, "scope", "") == "global" else 20 - 10 + 23 - 11)
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=X)
    assert removed.get_parameter("first.weight").shape[0] == kept(masked, "first")
    assert removed.get_parameter("second.weight").shape[0] == kept(masked, "second")


def test_agp_on_heads_of_a_vit_then_removal() -> None:
    heads = L1FilterPruner(0.5, granularity="head", include="*.self_attn", exclude="*.out_proj")
    small = fxcompress.compress(
        encoder(), [AGPPruner(heads, iterations=3), Speedup()], example_inputs=X, task=task(**adam)
    )
    for layer in range(2):
        weight = small.get_parameter(f"layers.layers.{layer}.self_attn.in_proj_weight")
        assert weight.shape == (3 * 3 * 8, 48)
    assert small.meta["history"][-1].difference is not None


def test_a_lottery_ticket_of_channels_then_removal() -> None:
    small = fxcompress.compress(
        wide(20), [LotteryTicketPruner(L1FilterPruner(0.6), rounds=3), Speedup(), FineTune()], example_inputs=X,
        task=task(),
    )  # fmt: skip
    assert small.get_parameter("first.weight").shape[0] == 20 - int(20 * 0.6)
    assert small.get_parameter("second.weight").shape[0] == 23 - int(23 * 0.6)


# ---- lottery tickets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [LevelPruner(0.7), L1FilterPruner(0.5)], ids=["elements", "channels"])
def test_after_each_round_survivors_and_statistics_are_as_in_the_beginning_bit_for_bit(inner: Pass) -> None:
    model, starts, sparsities = network_of(0), [], []

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        if torch.equal(batch[0], data()[0][0]):
            state = {n: t.detach().clone() for n, t in model.state_dict().items() if not n.startswith("_masks")}
            starts.append(state)
            sparsities.append(fxcompress.sparsity(model).get("second.weight", 0.0))
        return loss(model, batch)

    ticket = run(LotteryTicketPruner(inner, rounds=3), model, loss=watched)
    assert len(starts) == 3
    for state in [*starts, ticket.state_dict()]:
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor), name
    if isinstance(inner, LevelPruner):
        expected = [int(567 * (1 - 0.3 ** (i / 3))) / 567 for i in range(3)] + [int(567 * 0.7) / 567]
        assert [*sparsities, fxcompress.sparsity(ticket)["second.weight"]] == pytest.approx(expected)


def test_every_round_has_a_fresh_optimizer_and_schedule() -> None:
    made, rates = [], []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(sgd(parameters))
        return made[-1]

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)

    run(LotteryTicketPruner(LevelPruner(0.5), rounds=3, epochs=2), optimizer=optimizer, schedule=schedule)
    assert len(made) == 3
    assert rates == [0.05] * 3


def test_rewinding_to_a_later_step() -> None:
    model = network_of(0)
    ticket = run(LotteryTicketPruner(LevelPruner(0.5), rounds=2, reset_to_step=3, epochs=2), model)
    by_hand = run(FineTune(1), model, batches=data()[:3])
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(ticket.state_dict()[name], tensor), name
    with pytest.raises(InputError, match=r"reset_to_step is 11, and a training has 10 steps"):
        run(LotteryTicketPruner(LevelPruner(0.5), rounds=2, reset_to_step=11, epochs=2), model)


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AGPPruner, LinearPruner, LotteryTicketPruner])
@pytest.mark.parametrize(
    "inner, message",
    [
        (0.5, r"inner is 0.5, a float; expected a pruner, such as \w+\(L1FilterPruner\(0.5\)\)"),
        (L1FilterPruner, "inner is the class L1FilterPruner"),
        (Speedup(), r"inner is Speedup\(.*which has no sparsity"),
        (LevelPruner(pattern="2:4"), r"pattern='2:4'.* whose sparsity is not given"),
    ],
)
def test_what_is_no_pruner_is_refused(kind: Any, inner: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(inner)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AGPPruner(LevelPruner(0.5), iterations=0), "iterations is 0"),
        (lambda: AGPPruner(LevelPruner(0.5), epochs_per_iteration=0), "epochs_per_iteration is 0"),
        (lambda: AGPPruner(LevelPruner(0.5), initial=1.0), r"initial is 1.0; expected a number in \[0, 1\)"),
        (lambda: AGPPruner(LevelPruner({"*": 0.5, "b": 0.1}), initial=0.2), "above the inner pruner's sparsity of 0.1"),
        (lambda: LotteryTicketPruner(LevelPruner(0.5), rounds=0), "rounds is 0"),
        (lambda: LotteryTicketPruner(LevelPruner(0.5), reset_to_step=-1), "reset_to_step is -1"),
        (lambda: LotteryTicketPruner(LevelPruner(0.5), epochs=0), "epochs is 0"),
    ],
)
def test_options_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("kind", [AGPPruner, LotteryTicketPruner])
def test_what_is_needed_is_asked_for_before_any_work(kind: Any) -> None:
    with pytest.raises(InputError, match=rf"optimizer is missing, which {kind.__name__} needs"):
        run(kind(LevelPruner(0.5)), optimizer=None)
    images, labels = torch.randn(8, 5), torch.randint(0, 3, (8,))
    linear, given = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), task(batches=[(images, labels)])
    with pytest.raises(InputError, match=rf"example_inputs is missing: {kind.__name__}"):
        fxcompress.compress(linear, [kind(L1FilterPruner(0.5))], task=given)
    masked = fxcompress.compress(linear, [kind(LevelPruner(0.5))], task=given)  # looks at weights alone
    assert int((~fxcompress.masks(masked)["0.weight"]).sum()) == int(35 * 0.5)


def test_an_inner_pruner_that_returns_another_module_is_refused() -> None:
    @dataclass(frozen=True)
    class Copies(Pass):
        sparsity: float = 0.5

        def run(self, module: TracedModule, context: fxcompress.Context) -> TracedModule:
            return copy.deepcopy(module)

    with pytest.raises(PassError, match="Copies returned another module"):
        run(AGPPruner(Copies(), iterations=1))


# ---- runs that are killed ----------------------------------------------------------------------------------------

#: Runs with training in several places, and at how many losses each attempt is killed.
LONG: dict[str, tuple[Pass, tuple[int, ...]]] = {
    "agp": (AGPPruner(TaylorFOPruner(0.6, scope="global"), iterations=3, epochs_per_iteration=2), (8, 21)),
    "lottery": (LotteryTicketPruner(L1FilterPruner(0.6), rounds=2, reset_to_step=7, epochs=2), (8, 7)),
    "admm": (ADMMPruner(0.6, rho=0.1, iterations=3, epochs=2, granularity="channel"), (8, 14)),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return interrupted.kill(tmp_path_factory.mktemp("killed"), LONG)


@pytest.mark.parametrize("name", LONG)
def test_a_run_that_is_killed_goes_on_and_ends_the_same_bit_for_bit(name: str, killed: dict[str, Path]) -> None:
    interrupted.check_resumed(LONG[name][0], killed[name])
