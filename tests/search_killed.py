"""One search whose process is killed at random moments, again and again; each in a process forked from this one.

    python search_killed.py <folder> <kills>

Leaves ``runs`` (a line for each trial that ran: its number, and whether the journal held it already), ``kills`` and
``result.pt``, the history of the search, in the folder.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from search_cases import TASK, X, network

import fxcompress
from fxcompress import Budget, SearchHistory
from fxcompress.passes import TunedPruner
from fxcompress.search import search, worker
from fxcompress.search.worker import Job, Outcome

TRIALS = 120  # some are candidates that were tried before, and do not run


def tuned(checkpoint: Path | None) -> SearchHistory:
    """A search for widths."""
    item = TunedPruner(Budget(macs=0.5), trials=TRIALS)
    small = fxcompress.compress(network(), [item], example_inputs=X[:2], task=TASK, checkpoint=checkpoint)
    history: SearchHistory = small.meta["history"][0].searches[0]
    return history


def attempt(folder: Path) -> None:
    """Go on with the search, and say which trials run."""
    journal = folder / "run.pt.0.jsonl"

    def run(job: Job) -> Outcome:
        number = job.seeds[-1]
        known = journal.exists() and f'"number": {number},' in journal.read_text()
        with (folder / "runs").open("a") as file:
            file.write(f"{number} {known}\n")
        time.sleep(0.03)
        return worker.run(job)

    search.run = run
    torch.save(tuned(folder / "run.pt"), folder / "result.pt")


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    moments = random.Random(0)
    runs = folder / "runs"
    runs.touch()
    done = 0
    while not (folder / "result.pt").exists():
        child = os.fork()
        if child == 0:
            attempt(folder)
            os._exit(0)
        if done < kills:
            before, ended, status = runs.stat().st_size, 0, 0
            while runs.stat().st_size == before and not ended:
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.001)
            if ended:  # nothing was left to try
                assert os.waitstatus_to_exitcode(status) == 0
                continue
            time.sleep(moments.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
        done += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (folder / "kills").write_text(str(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
