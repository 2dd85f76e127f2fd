"""`make bench` runs this: `python -m benchmarks [which ...] [--rounds N]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the model zoo

from benchmarks.budgets import latencies, proposals
from benchmarks.lowering import CONTENDERS, MODELS, lowering
from benchmarks.memory import peaks
from benchmarks.pace import beside_the_peer, by_depth
from benchmarks.pricing import price
from benchmarks.stages import stages

BENCHMARKS = ("pace", "depth", "memory", "pricing", "budgets", "stages", "lowering")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("which", nargs="*", choices=(*BENCHMARKS, []), help="all by default")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured, after one that is not")
    titles = [item.title for item in CONTENDERS]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="of lowering")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8), help="of lowering")
    parser.add_argument("--columns", nargs="+", choices=titles, default=titles, help="of lowering")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(f"torch {torch.__version__}, one thread, medians of {options.rounds} rounds")
    for name in options.which or BENCHMARKS:
        if name == "pace":
            console.print(beside_the_peer(options.rounds))
        elif name == "depth":
            console.print(by_depth(options.rounds))
        elif name == "memory":
            console.print(peaks())
        elif name == "pricing":
            console.print(str(price(rounds=options.rounds)), highlight=False)
        elif name == "budgets":
            console.print(str(proposals(rounds=options.rounds)), latencies(), highlight=False)
        elif name == "lowering":
            for model in options.models:
                console.print(lowering(options.rounds, (model,), tuple(options.batches), tuple(options.columns)))
        else:
            console.print(*stages(options.rounds))


if __name__ == "__main__":
    main()
