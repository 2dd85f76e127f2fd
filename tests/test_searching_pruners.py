"""Pruners and quantizers that search: budgets, what each algorithm promises, resuming."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import scatter
from search_cases import ANNEALING, TASK, TRAINED, X, distance, network, score
from torch import Tensor, nn

import fxcompress
from fxcompress import Budget, InputError, Pass, SearchHistory, Sensitivity, Task, TracedModule
from fxcompress.passes import (
    ADMMPruner,
    AutoCompressPruner,
    L1FilterPruner,
    L2FilterPruner,
    NetAdaptPruner,
    PTQQuantizer,
    SensitivityPruner,
    SimulatedAnnealingPruner,
    Speedup,
    TunedPruner,
    TunedQuantizer,
)

HALF = Budget(macs=0.5)
ADMM = ADMMPruner(0.5, rho=1e-2, iterations=1, epochs=1)
AUTOCOMPRESS = AutoCompressPruner(HALF, 2, replace(ANNEALING, cooling=0.2), ADMM)
SEARCHES = [
    ANNEALING,
    TunedPruner(HALF, trials=6),
    TunedPruner(HALF, L2FilterPruner(0.5, round_to=2), "cmaes", trials=6),
    TunedPruner(HALF, sampler="random", trials=4),
    TunedPruner(HALF, sampler="grid", trials=8),
    TunedPruner(HALF, sampler="nsga2", trials=20, objectives=("score", "macs")),
    NetAdaptPruner(HALF, step=0.2, epochs=1),
    NetAdaptPruner(Budget(macs=0.6, params=0.5), step=0.25, epochs=0),
    SensitivityPruner(HALF, rounds=2, epochs=1),
    AUTOCOMPRESS,
]


def cut(item: Pass, task: Task = TRAINED, seed: int = 0, checkpoint: Path | None = None) -> TracedModule:
    return fxcompress.compress(
        network(), [item, Speedup()], example_inputs=X[:2], task=task, seed=seed, checkpoint=checkpoint
    )


def histories(module: TracedModule) -> tuple[SearchHistory, ...]:
    found: tuple[SearchHistory, ...] = module.meta["history"][0].searches
    return found


def name_of(item: Pass) -> str:
    return f"{item.name}-{getattr(item, 'sampler', '')}"


@pytest.mark.parametrize("item", SEARCHES, ids=name_of)
def test_the_budget_is_met(item: Pass) -> None:
    small, dense = cut(item), network()
    costs = [fxcompress.count(model, X[:2]) for model in (small, dense)]
    ratios = vars(item)["budget"].ratios
    used = [getattr(costs[0], figure) / (ratio * getattr(costs[1], figure)) for figure, ratio in ratios.items()]
    assert 0.6 < max(used) <= 1  # of several figures the scarcest decides
    for history in histories(small):
        assert [trial.number for trial in history.trials] == list(range(len(history.trials)))
        assert all(trial.done for trial in history.trials)
        assert history.dense == pytest.approx(history.trials[0].score)


@pytest.mark.parametrize("item", [SEARCHES[1], SEARCHES[6], SEARCHES[8], AUTOCOMPRESS], ids=name_of)
def test_a_run_that_is_taken_up_again_ends_the_same(item: Pass, tmp_path: Path) -> None:
    """The result is that of no checkpoint; without the checkpoint, the journals answer every trial."""
    whole = cut(item)
    path = tmp_path / "run.pt"
    first = cut(item, checkpoint=path)
    path.unlink()
    again = cut(item, checkpoint=path)
    for one in (first, again):
        assert one.state_dict().keys() == whole.state_dict().keys()
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in one.state_dict().items())


def test_annealing_accepts_worse_candidates_less_and_less() -> None:
    def drawn(model: nn.Module) -> float:
        return 1 + 0.4 * float(torch.rand(()))

    # So wide that candidates differ at the lowest temperature: one that comes up again keeps its score.
    layers = [layer for width in (9, 500, 600, 700) for layer in (nn.LazyLinear(width), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.LazyLinear(3)), torch.randn(2, 9)
    model(x)
    item = SimulatedAnnealingPruner(HALF, start=1.0, stop=0.015, cooling=0.25, trials_per_temperature=60)
    notes = fxcompress.compress(model, [item], example_inputs=x, task=Task(score=drawn)).meta["history"][0].notes
    found = [re.match(r"temperature ([\d.]+): (\d+) of (\d+) worse", note) for note in notes]
    rates = [int(match[2]) / int(match[3]) for match in found if match]
    assert len(rates) == len(item.temperatures) == 4
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.7
    assert rates[-1] < 0.4


def test_netadapt_notes_what_every_step_costs() -> None:
    small = cut(NetAdaptPruner(HALF, step=0.15, step_decay=0.9, epochs=0))
    step, *_ = small.meta["history"]
    dense = fxcompress.count(network(), X[:2])
    pattern = r"step (\d+): ([\d.]+)% of the macs \(([\d.]+)% allowed\), \w+ from (\d+) to (\d+) units"
    steps = [found for note in step.notes if (found := re.match(pattern, note))]
    assert [int(found[1]) for found in steps] == list(range(1, len(steps) + 1))
    costs = [100.0, *(float(found[2]) for found in steps)]
    for number, (before, found) in enumerate(zip(costs, steps, strict=False)):
        allowed = max(50.0, before - 15 * 0.9**number)
        assert float(found[3]) == pytest.approx(allowed, abs=0.011)
        assert float(found[2]) <= float(found[3])
        assert int(found[5]) < int(found[4])
    assert costs[-1] == pytest.approx(100 * fxcompress.count(small, X[:2]).macs / dense.macs, abs=0.006)


def test_netadapt_takes_the_candidate_that_scores_best() -> None:
    (history,) = histories(cut(NetAdaptPruner(Budget(macs=0.97), step=0.03, epochs=0)))
    trials = history.trials[1:]
    assert len(trials) == 3  # one step, a trial for each group
    assert history.best == max(trials, key=lambda trial: trial.score or 0.0).number
    for trial in trials:
        assert sum(kept < width for kept, width in zip(trial.proposal.kept, history.widths, strict=True)) == 1


def test_several_objectives_leave_a_front() -> None:
    (history,) = histories(cut(SEARCHES[5]))
    front = history.front("macs")
    costs = [trial.proposal.cost["macs"] for trial in front]
    scores = [trial.score for trial in front if trial.score is not None]
    assert len(front) > 1
    assert costs == sorted(costs)
    assert scores == sorted(scores)
    assert len({trial.proposal.kept for trial in history.trials}) > 10


def test_widths_are_rounded_with_several_objectives() -> None:
    inner = L1FilterPruner(0.5, round_to=4)
    (history,) = histories(cut(replace(SEARCHES[5], inner=inner, trials=8)))  # type: ignore[call-overload]
    for trial in history.trials:
        pairs = zip(trial.proposal.kept, history.widths, strict=True)
        assert all(kept % 4 == 0 or kept == width for kept, width in pairs)
    assert len({trial.proposal.kept for trial in history.trials}) > 3


def test_other_seeds_search_elsewhere() -> None:
    one, same, other = (histories(cut(SEARCHES[1], TASK, seed))[0] for seed in (0, 0, 1))
    assert [t.proposal for t in one.trials] == [t.proposal for t in same.trials]
    assert [t.proposal for t in one.trials] != [t.proposal for t in other.trials]


def test_layers_that_are_left_out_stay_whole() -> None:
    small = cut(TunedPruner(HALF, L1FilterPruner(0.5, exclude="last"), trials=3))
    assert small.get_parameter("last.weight").shape[0] == 17
    assert small.get_parameter("conv1.weight").shape[0] < 13


@pytest.mark.parametrize(
    "item",
    [
        replace(ANNEALING, cooling=0.2),
        TunedPruner(HALF, trials=2),
        NetAdaptPruner(HALF, step=0.3, epochs=0),
        SensitivityPruner(HALF),
        replace(AUTOCOMPRESS, rounds=1),
    ],
    ids=name_of,
)
def test_searches_choose_layers_themselves(item: Pass) -> None:
    small = cut(replace(item, exclude="last"))  # type: ignore[call-arg]
    assert small.get_parameter("last.weight").shape[0] == 17
    assert small.get_parameter("conv1.weight").shape[0] < 13
    small = cut(replace(item, budget=Budget(macs=0.7), include=["conv1", "last"]))  # type: ignore[call-arg]
    assert small.get_parameter("stem.weight").shape[0] == 11


def test_a_sensitivity_that_was_measured_is_not_measured_again() -> None:
    """It comes to the widths that measuring comes to, with a trial for the result."""
    whole = cut(SensitivityPruner(HALF), TASK)
    measured = fxcompress.sensitivity(network(), TASK, example_inputs=X[:2], bits=())
    small = cut(SensitivityPruner(HALF, measured=measured), TASK)
    assert [trial.same_as for trial in histories(small)[0].trials] == [None] * 3
    assert histories(small)[0].taken == histories(whole)[0].taken
    some = fxcompress.sensitivity(network(), TASK, example_inputs=X[:2], sparsities=(0.5,), bits=(), exclude="conv1")
    with pytest.raises(InputError, match="no curve for conv1"):
        cut(SensitivityPruner(HALF, measured=some), TASK)
    cut(SensitivityPruner(HALF, measured=some, exclude="conv1"), TASK)


def test_a_dense_score_of_0_is_no_limit() -> None:
    task = replace(TASK, score=distance)
    module = cut(SensitivityPruner(HALF, drop=0.2), task)
    (note,) = [note for note in module.meta["history"][0].notes if "allows" in note]
    shares = [float(found) for found in re.findall(r"0\.\d\d(?=,|$)", note)]
    assert len(set(shares)) > 1
    assert max(shares) > 0.2
    notes = cut(ANNEALING, task).meta["history"][0].notes
    accepted = [int(found[1]) for note in notes if (found := re.match(r"temperature .*: (\d+) of", note))]
    assert sum(accepted) > 0


class Encoder(nn.Module):
    """Two blocks of attention and a feed-forward part, with norms whose statistics depend on the width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 12)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(12, 2, 18, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 4)
        scatter(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def test_autocompress_on_a_transformer() -> None:
    """Linear layers alone, residual stream and heads included."""
    torch.manual_seed(2)
    model, x = Encoder().eval(), torch.randn(6, 5, 9)
    with torch.no_grad():
        wanted = model(x)
    task = Task(
        score=lambda model: -float((model(x) - wanted).square().mean()),
        loss=lambda model, batch: (model(batch) - wanted).square().mean(),
        batches=[x],
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )
    item = replace(AUTOCOMPRESS, annealing=replace(ANNEALING, inner=L1FilterPruner(0.5, include=nn.Linear)))
    small = fxcompress.compress(model, [item], example_inputs=x[:2], task=task)
    assert fxcompress.count(small, x[:2]).macs <= 0.5 * fxcompress.count(model, x[:2]).macs
    assert small.get_parameter("embed.weight").shape[0] < 12
    assert all(trial.done for history in histories(small) for trial in history.trials)


def test_bits_fit_the_bytes() -> None:
    task = replace(TRAINED, score=score)
    module = fxcompress.compress(
        network(), [TunedQuantizer(Budget(bytes=0.15), trials=8)], example_inputs=X[:2], task=task
    )
    (history,) = histories(module)
    assert history.chosen is not None
    total = fxcompress.count(network(), X[:2]).bytes
    weights = {n: network().get_parameter(f"{n}.weight").numel() for n in history.groups}
    stored = sum(weights[n] * bits / 8 for n, bits in zip(history.groups, history.chosen.proposal.bits, strict=True))
    left = total - 4 * sum(weights.values()) + stored
    assert left == pytest.approx(history.chosen.proposal.cost["bytes"] * total)
    assert left <= 0.15 * total
    assert len(set(history.chosen.proposal.bits)) > 1
    specs = [item.spec for item in module.modules() if isinstance(item, fxcompress.FakeQuantize)]
    assert sorted(s.bits for s in specs if s.role == "weight") == sorted(history.chosen.proposal.bits)
    assert score(module) == pytest.approx(history.chosen.score, abs=1e-5)


def test_tables_get_bits_too() -> None:
    torch.manual_seed(3)
    model, tokens = nn.Sequential(nn.Embedding(41, 7), nn.Linear(7, 3)).eval(), torch.arange(12).reshape(3, 4)
    with torch.no_grad():
        wanted = model(tokens)
    task = Task(score=lambda model: -float((model(tokens) - wanted).square().mean().detach()), batches=[tokens])
    item = TunedQuantizer(Budget(bytes=0.2), inner=PTQQuantizer(embeddings=True), trials=3)
    made = fxcompress.compress(model, [item], example_inputs=tokens, task=task)
    (history,) = histories(made)
    assert set(history.groups) == {"0", "1"}
    specs = [item.spec for item in made.modules() if isinstance(item, fxcompress.FakeQuantize)]
    assert history.chosen is not None
    assert sorted(s.bits for s in specs if s.role == "weight") == sorted(history.chosen.proposal.bits)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SimulatedAnnealingPruner(0.5), "budget is 0.5"),  # type: ignore[arg-type]
        (lambda: SimulatedAnnealingPruner(HALF, stop=2.0), r"stop is 2\.0"),
        (lambda: SimulatedAnnealingPruner(HALF, cooling=1.0), r"cooling is 1\.0"),
        (lambda: SimulatedAnnealingPruner(HALF, perturbation=0), "perturbation is 0"),
        (lambda: SimulatedAnnealingPruner(HALF, perturbation="a"), "perturbation is 'a'"),  # type: ignore[arg-type]
        (lambda: TunedPruner(HALF, sampler="nsga2", objectives=("score", "latency")), "a budget of latency alone"),
        (lambda: TunedPruner(HALF, sampler="best"), "sampler is 'best'"),
        (lambda: TunedPruner(HALF, objectives=("macs",)), "objectives is"),
        (lambda: TunedPruner(HALF, sampler="cmaes", objectives=("score", "macs")), "takes one objective"),
        (lambda: TunedPruner(HALF, L1FilterPruner(0.5, granularity="head")), "count channels, not heads"),
        (lambda: NetAdaptPruner(HALF, step=0), "step is 0"),
        (lambda: SensitivityPruner(HALF, drop=0), "drop is 0"),
        (lambda: SensitivityPruner(HALF, measured=1), "measured is 1"),  # type: ignore[arg-type]
        (lambda: SensitivityPruner(HALF, rounds=2, measured=Sensitivity(1.0, ())), "expected rounds=1"),
        (lambda: TunedPruner(HALF, L1FilterPruner(0.5, exclude="last"), exclude="last"), "one of the two places"),
        (lambda: AutoCompressPruner(HALF, include=7), "include has 7"),  # type: ignore[arg-type]
        (lambda: AutoCompressPruner(HALF, admm=None), "admm is None"),  # type: ignore[arg-type]
        (lambda: TunedQuantizer(HALF), "expected one of bytes alone"),
        (lambda: TunedQuantizer(Budget(bytes=0.2), bits=(1, 2)), "bits is 1"),
        (lambda: cut(TunedPruner(HALF, sampler="grid", trials=7)), "trials is 7; a grid"),
        (lambda: cut(TunedQuantizer(Budget(bytes=0.01))), "is left with 2 bits"),
        (lambda: cut(ANNEALING, Task()), "score is missing"),
        (lambda: cut(TunedPruner(Budget(macs=0.001))), "least that can be reached"),
    ],
)
def test_what_cannot_be_is_said(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=message):
        make()
