"""Pruners that reach into training: ADMM, network slimming, movement pruning."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import interrupted
import numpy as np
import pytest
import torch
from nets import Net
from test_schedules import adam, encoder, wide
from test_training import Batch, X, data, loss, network_of, task
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import InputError, Pass, TracedModule
from fxcompress.nodes import learned_mask
from fxcompress.passes import (
    ADMMPruner,
    AGPPruner,
    FineTune,
    L1FilterPruner,
    LevelPruner,
    MovementPruner,
    SlimPruner,
    Speedup,
)


def run(passes: list[Pass], model: nn.Module | None = None, x: Tensor = X, **options: Any) -> TracedModule:
    settings = {name: options.pop(name) for name in ("checkpoint", "seed") if name in options}
    model = network_of(0) if model is None else model
    return fxcompress.compress(model, passes, example_inputs=x, task=task(**options), **settings)


ROW: Any = "row"  # which is no granularity


def plain(rate: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


# ---- ADMM --------------------------------------------------------------------------------------------------------


def residuals(module: TracedModule) -> list[float]:
    found = [re.search(r"norm\(W - Z\) is ([\d.e+-]+)", note) for note in module.meta["history"][0].notes]
    return [float(match.group(1)) for match in found if match]


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_the_residual_shrinks(granularity: Any) -> None:
    """By the end to a tenth of what one-shot pruning would cut off, where the penalty is strong."""
    pruner = ADMMPruner(0.5, rho=2.0, iterations=8, epochs=4, granularity=granularity)
    found = residuals(run([pruner], optimizer=plain(0.05)))
    assert len(found) == 8
    assert found[-1] < 0.1 * found[0]


def test_admm_is_the_method_written_by_hand() -> None:
    """Of a linear model: full-batch gradient descent on W, projection, dual ascent; Z starts as a copy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 7)).double()
    x, y = torch.randn(13, 11).double(), torch.randn(13, 7).double()
    given = {"batches": [(x, y)], "loss": lambda m, b: F.mse_loss(m(b[0]), b[1]), "optimizer": plain(0.1)}
    pruned = run([ADMMPruner(0.6, rho=0.7, iterations=3, epochs=5)], model, x, **given)
    w, b = (p.detach().clone() for p in model.parameters())
    z, u, noted = w.clone(), torch.zeros_like(w), []
    for _ in range(3):
        for _ in range(5):
            error = (x @ w.T + b - y) * 2 / y.numel()
            w, b = w - 0.1 * (error.T @ x + 0.7 * (w - z + u)), b - 0.1 * error.sum(0)
        target = (w + u).numpy()
        gone = np.argsort(np.abs(target).reshape(-1), kind="stable")[: int(target.size * 0.6)]
        z = torch.from_numpy(target.copy())
        z.view(-1)[gone] = 0
        noted.append(float((w - z).norm()))
        u = u + w - z
    torch.testing.assert_close(pruned.get_parameter("0.weight").detach(), w)
    torch.testing.assert_close(pruned.get_parameter("0.bias").detach(), b)
    assert torch.equal(fxcompress.masks(pruned)["0.weight"], z != 0)
    assert residuals(pruned) == pytest.approx(noted, rel=1e-5)  # as many digits as a note shows


def test_admm_chooses_coupled_channels_by_their_energy_together() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda net, x: net.out(F.relu(net.a(x) + net.b(x))), a=nn.Conv2d(1, 9, 1), b=nn.Conv2d(1, 9, 3, padding=1),
        out=nn.Conv2d(9, 4, 1),
    )  # fmt: skip
    # nothing moves: one projection of the weights as they are
    objective = {"loss": lambda m, b: F.cross_entropy(m(b[0]).mean((2, 3)), b[1]), "optimizer": plain(0.0)}
    pruned = run([ADMMPruner(0.5, iterations=1, granularity="channel")], net, **objective)
    energy = sum(net.get_parameter(f"{n}.weight").detach().flatten(1).square().sum(1) for n in "ab")
    assert isinstance(energy, Tensor)
    gone = energy.argsort()[: int(9 * 0.5)]
    for name in ("a.bias", "b.bias"):
        assert sorted((~fxcompress.masks(pruned)[name]).nonzero().flatten().tolist()) == sorted(gone.tolist())
    assert not fxcompress.masks(pruned)["out.weight"][:, gone].any()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_admm_then_speedup(sparsity: float) -> None:
    pruner = ADMMPruner(sparsity, rho=0.1, iterations=2, granularity="channel")
    small = run([pruner, FineTune(), Speedup()], wide(20))
    assert small.get_parameter("first.weight").shape[0] == max(20 - int(20 * sparsity), 1)
    assert small.get_parameter("second.weight").shape[0] == max(23 - int(23 * sparsity), 1)


def test_admm_with_another_pruner_keeps_what_was_masked() -> None:
    before = fxcompress.compress(network_of(0), [LevelPruner(0.3)], example_inputs=X)
    pruned = run([ADMMPruner(inner=L1FilterPruner(0.5), iterations=2)], before)
    masks, old = fxcompress.masks(pruned), fxcompress.masks(before)
    assert int((~masks["first.bias"]).sum()) == int(7 * 0.5)
    assert all(not bool((masks[name] & ~mask).any()) for name, mask in old.items())


# ---- slimming ----------------------------------------------------------------------------------------------------


def slim_net() -> nn.Module:
    """A residual block (its sum has two norms), a depthwise convolution, a norm in front, and a layer without norm."""
    torch.manual_seed(1)
    return Net(
        lambda net, x: net.head(
            F.relu(net.bare(net.n4(net.deep(F.relu(net.n1(net.a(x)) + net.n3(net.c(F.relu(net.n2(net.b(x))))))))))
            .mean((2, 3))
        ),
        a=nn.Conv2d(1, 11, 3, padding=1), n1=nn.BatchNorm2d(11),
        b=nn.Conv2d(1, 13, 3, padding=1), n2=nn.BatchNorm2d(13),
        c=nn.Conv2d(13, 11, 1), n3=nn.BatchNorm2d(11),
        deep=nn.Conv2d(11, 11, 3, groups=11), n4=nn.BatchNorm2d(11),
        bare=nn.Conv2d(11, 7, 1), head=nn.Linear(7, 4),
    )  # fmt: skip


def gamma(model: nn.Module, name: str) -> Any:
    return model.get_parameter(f"{name}.weight").detach().abs().double().numpy()


def test_gammas_are_driven_to_zero_and_those_of_layers_outside_are_not() -> None:
    """The histogram before and after: how many are small."""
    names = ["n1", "n2", "n3", "n4"]
    before = np.concatenate([gamma(slim_net(), name) for name in names])
    with_penalty, without = (
        run([SlimPruner(0.3, scale=scale, epochs=15)], slim_net(), optimizer=plain(0.1)) for scale in (0.2, 0.0)
    )
    small = [
        float((np.concatenate([gamma(model, name) for name in names]) < 0.05).mean())
        for model in (with_penalty, without)
    ]
    assert (before < 0.05).mean() == 0
    assert small[0] > 0.3
    assert small[1] < 0.1


def test_the_penalty_is_the_sum_of_gammas_in_groups() -> None:
    """One step of gradient descent: every gamma that scales a removable channel moves by the sign, no other does."""
    model = slim_net()
    model.get_parameter("head.weight").data.zero_()  # no gradient from the loss
    trained = run([SlimPruner(0.3, scale=0.25, exclude="b")], model, batches=data(1), optimizer=plain(0.1))
    for name in ("n1", "n3", "n4"):
        torch.testing.assert_close(
            trained.get_parameter(f"{name}.weight"),
            (w := model.get_parameter(f"{name}.weight")) - 0.025 * w.sign(),
        )
    assert torch.equal(trained.get_parameter("n2.weight"), model.get_parameter("n2.weight"))


def test_the_threshold_is_that_of_numpy() -> None:
    """All channels in one ranking; a channel with several gammas has their sum."""
    model = slim_net()
    for name in ("n1", "n3", "n4"):
        model.get_parameter(f"{name}.weight").data.mul_(0.3)  # so that no sum of three is always above the others
    masked = run([SlimPruner(0.4, scale=0.01, epochs=3)], model)
    gammas = {"a": gamma(masked, "n1") + gamma(masked, "n3") + gamma(masked, "n4"), "b": gamma(masked, "n2")}
    ranked = np.sort(np.concatenate(list(gammas.values())))
    threshold = ranked[int(24 * 0.4)]
    masks = fxcompress.masks(masked)
    for name, values in gammas.items():
        assert np.array_equal(masks[f"{name}.bias"].numpy(), values >= threshold), name
    assert "bare.bias" not in masks
    assert "no norm scales bare; left alone" in masked.meta["history"][-1].notes


def test_no_group_vanishes_and_removal_is_exact() -> None:
    model = slim_net()
    model.get_parameter("n2.weight").data.mul_(1e-3)  # its channels would all be among the lowest
    one_left = run([SlimPruner(0.6, scale=0.0)], model, optimizer=plain(0.0))
    assert int(fxcompress.masks(one_left)["b.bias"].sum()) == 1
    capped = run([SlimPruner(0.4, scale=0.0, max_sparsity_per_group=0.5), Speedup()], model, optimizer=plain(0.0))
    assert capped.get_parameter("b.weight").shape[0] == 13 - int(13 * 0.5)
    assert capped.get_parameter("a.weight").shape[0] == 11 - (int(24 * 0.4) - int(13 * 0.5))


def test_slimming_by_layer_norms_of_a_vit_and_without_any_norm() -> None:
    small = fxcompress.compress(
        encoder(), [SlimPruner(0.25, scale=1e-3), Speedup()], example_inputs=X, task=task(**adam)
    )
    assert small.get_parameter("head.weight").shape == (4, 36)  # the residual stream; what has no norm is left alone
    assert small.get_parameter("layers.layers.0.linear1.weight").shape == (64, 36)
    bare = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    with pytest.warns(UserWarning, match="SlimPruner has nothing to prune: no norm scales 0"):
        left = run([SlimPruner(0.5)], bare)
    assert torch.equal(left.get_parameter("0.weight"), bare.get_parameter("0.weight"))


# ---- movement pruning --------------------------------------------------------------------------------------------


def test_gradients_go_straight_through_the_mask() -> None:
    torch.manual_seed(0)
    weight, outside = torch.randn(5, 7, dtype=torch.double), torch.randn(5, 7, dtype=torch.double)
    mask = torch.rand(5, 7) > 0.5
    for shape in ((5, 7), (5, 1), (1, 7)):
        w, s = weight.clone().requires_grad_(), torch.zeros(shape, dtype=torch.double, requires_grad=True)
        effective = learned_mask(w, mask, s)
        assert torch.equal(effective, weight * mask)
        (effective * outside).sum().backward()
        assert w.grad is not None
        assert s.grad is not None
        assert torch.equal(w.grad, outside * mask)
        expected = (outside * weight).numpy()
        dims = tuple(d for d in range(2) if shape[d] == 1)
        np.testing.assert_allclose(s.grad.numpy(), expected.sum(axis=dims, keepdims=True) if dims else expected)


def test_movement_pruning_is_the_method_written_by_hand() -> None:
    """Of a linear model, in NumPy: weights, scores, and the mask at every step."""
    torch.manual_seed(0)
    model, epochs, rate = nn.Sequential(nn.Linear(11, 7)).double(), 4, 0.2
    batches = [(torch.randn(9, 11).double(), torch.randn(9, 7).double()) for _ in range(5)]
    seen = []

    def objective(m: nn.Module, batch: Batch) -> Tensor:
        seen.append(fxcompress.masks(m)["0.weight"].numpy())
        return F.mse_loss(m(batch[0]), batch[1])

    item = MovementPruner(0.6, epochs=epochs, warmup=0.2, cooldown=0.3)
    given = {"batches": batches, "loss": objective, "optimizer": plain(rate)}
    pruned = run([item], model, batches[0][0], **given)
    w, b = (p.detach().numpy().copy() for p in model.parameters())
    scores, mask, steps = np.zeros_like(w), np.ones(w.shape, bool), len(batches) * epochs
    for step in range(1, steps + 1):
        assert np.array_equal(seen[step - 1], mask), step
        x, y = (t.numpy() for t in batches[(step - 1) % 5])
        error = (x @ (w * mask).T + b - y) * 2 / y.size
        gradient = error.T @ x
        scores, w, b = scores - rate * gradient * w, w - rate * gradient * mask, b - rate * error.sum(0)
        t = np.clip((step - 0.2 * steps) / (0.5 * steps), 0, 1)
        count = int(w.size * (0.6 * (1 - (1 - t) ** 3)))
        mask = np.ones(w.size, bool)
        mask[np.argsort(scores.reshape(-1), kind="stable")[:count]] = False
        mask = mask.reshape(w.shape)
    np.testing.assert_allclose(pruned.get_parameter("0.weight").detach().numpy(), w, rtol=1e-9)
    assert np.array_equal(fxcompress.masks(pruned)["0.weight"].numpy(), mask)
    assert (~mask).sum() == int(77 * 0.6)
    came_back = [bool((later & ~now).any()) for now, later in pairwise(seen)]
    assert any(came_back), "no weight ever came back"


@pytest.mark.parametrize("granularity", ["element", "channel", "head"])
def test_scores_are_gone_afterwards_and_removal_is_exact(granularity: Any) -> None:
    model = encoder()
    options: dict[str, Any] = {"include": "*.self_attn", "exclude": "*.out_proj"} if granularity == "head" else {}
    item = MovementPruner(0.5, granularity=granularity, epochs=3, **options)
    masked = run([item], model, **adam)
    keys = [name for name in masked.state_dict() if not name.startswith("_masks.")]
    assert keys == list(model.state_dict())
    assert {node.target for node in masked.graph.nodes}.isdisjoint({learned_mask})
    small = fxcompress.compress(masked, [Speedup()], example_inputs=X)
    if granularity == "head":
        assert small.get_parameter("layers.layers.1.self_attn.in_proj_weight").shape == (3 * 3 * 8, 48)
    elif granularity == "channel":
        assert small.get_parameter("layers.layers.0.linear1.weight").shape == (32, 24)
    else:
        share = fxcompress.sparsity(masked)
        assert share["head.weight"] == 0.5
        assert share["layers.layers.0.linear1.weight"] == 0.5


def test_channels_are_chosen_by_scores_summed_over_what_produces_them() -> None:
    """One step in which nothing is masked yet: a channel's score is minus the gradient along its own weights."""
    model = slim_net().double()
    batch = [(x.double(), y) for x, y in data(1)]
    given = {"batches": batch, "optimizer": plain(0.1)}
    item = MovementPruner(0.5, granularity="channel", warmup=0.0, cooldown=0.0, epochs=1)
    masked = run([item], model, X.double(), **given)
    twin = slim_net().double().train()
    loss(twin, batch[0]).backward()
    movement = {
        name: (-p.grad * p).flatten(1).sum(1).detach()
        for name, p in twin.named_parameters()
        if p.grad is not None and p.dim() > 1
    }
    scores = {"a": sum(movement[f"{name}.weight"] for name in ("a", "c", "deep")), "b": movement["b.weight"]}
    for name, score in scores.items():
        assert isinstance(score, Tensor)
        gone = score.argsort(stable=True)[: int(len(score) * 0.5)]
        masked_out = (~fxcompress.masks(masked)[f"{name}.bias"]).nonzero().flatten()
        assert sorted(gone.tolist()) == masked_out.tolist(), name


def test_patience_does_not_end_it_and_masks_that_were_there_stay() -> None:
    before = fxcompress.compress(network_of(0), [L1FilterPruner(0.3), LevelPruner(0.4)], example_inputs=X)
    falling = iter(range(100, 0, -1))
    for granularity in ("element", "channel"):
        item = MovementPruner(0.6, granularity=granularity, epochs=4)
        pruned = run([item], before, score=lambda model: next(falling), patience=1)
        masks = fxcompress.masks(pruned)
        assert all(not bool((masks[name] & ~mask).any()) for name, mask in fxcompress.masks(before).items())
        share = float((~masks["second.weight" if granularity == "element" else "second.bias"]).double().mean())
        assert share == (int(567 * 0.6) / 567 if granularity == "element" else int(9 * 0.6) / 9)


# ---- bad input, and runs that are killed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ADMMPruner(), "sparsity is missing"),
        (lambda: ADMMPruner(0.5, rho=0), "rho is 0; expected a positive number"),
        (lambda: ADMMPruner(0.5, iterations=0), "iterations is 0"),
        (lambda: ADMMPruner(0.5, granularity=ROW), "granularity is 'row'"),
        (lambda: ADMMPruner(0.5, inner=LevelPruner(0.5)), "leave sparsity, include, exclude and scope out"),
        (lambda: ADMMPruner(inner=Speedup()), "which has no sparsity"),
        (lambda: ADMMPruner(inner=SlimPruner(0.5)), "which trains; expected a pruner that masks at once"),
        (lambda: SlimPruner(0.5, scale=-1.0), "scale is -1.0"),
        (lambda: SlimPruner({"*": 0.5}), "expected one sparsity, found a mapping"),
        (lambda: SlimPruner(0.5, epochs=0), "epochs is 0"),
        (lambda: MovementPruner(1.0), r"sparsity is 1.0"),
        (lambda: MovementPruner(0.5, warmup=2), "warmup is 2; expected a fraction of all steps"),
        (lambda: MovementPruner(0.5, warmup=0.6, cooldown=0.4), "expected a sum below 1"),
        (lambda: MovementPruner(0.5, granularity=ROW), "granularity is 'row'"),
    ],
)
def test_options_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("item", [ADMMPruner(0.5), SlimPruner(0.5), MovementPruner(0.5)], ids=["admm", "slim", "move"])
def test_what_is_needed_is_asked_for_before_any_work(item: Pass) -> None:
    def never(model: nn.Module, batch: Batch) -> Tensor:
        raise AssertionError

    with pytest.raises(InputError, match=rf"optimizer is missing, which {item.name} needs"):
        run([L1FilterPruner(0.1), item], optimizer=None, loss=never)


LONG: dict[str, tuple[Pass, tuple[int, ...]]] = {
    "movement": (MovementPruner(0.6, epochs=5), (13,)),
    "movement of channels": (MovementPruner(0.5, epochs=5, granularity="channel"), (18,)),
    "slimming a little at a time": (AGPPruner(SlimPruner(0.4, scope="layer", scale=0.01), iterations=3), (13,)),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return interrupted.kill(tmp_path_factory.mktemp("killed"), LONG)


@pytest.mark.parametrize("name", LONG)
def test_a_run_that_is_killed_goes_on_and_ends_the_same_bit_for_bit(name: str, killed: dict[str, Path]) -> None:
    """A step within a step (slimming trains, and is itself one step of its schedule) is taken again."""
    interrupted.check_resumed(LONG[name][0], killed[name])


def test_admm_projects_on_a_fixed_pattern() -> None:
    masked = fxcompress.compress(
        network_of(0),
        [ADMMPruner(inner=LevelPruner(pattern="2:4"), iterations=2, epochs=1)],
        example_inputs=X,
        task=task(),
    )
    keep = fxcompress.masks(masked)["second.weight"].movedim(1, -1)
    assert (keep[..., : keep.shape[-1] // 4 * 4].unflatten(-1, (-1, 4)).sum(-1) == 2).all()
