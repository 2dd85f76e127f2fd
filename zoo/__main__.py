"""`make zoo` runs this: every model in a process of its own, with a limit, and a table of what became of them.

python -m zoo [library | library/model ...] [--workers N] [--limit SECONDS] [--records FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import track

from zoo.catalogue import LIBRARIES, names
from zoo.table import below, merged, read, right, write

#: How many times the limit on processor time a process may take on the wall.
_PATIENCE = 5


def run(program: str, name: str, limit: int) -> dict[str, Any]:
    """The record of one model; one with an error where the process ended without."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", program, name, str(limit)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=_PATIENCE * limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"took more than {_PATIENCE * limit} s on the wall", "wall": _PATIENCE * limit}
    if done.returncode == 0:
        record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    elif -done.returncode == signal.SIGXCPU:
        record = {"name": name, "error": f"took more than {limit} s"}
    else:
        record = {"name": name, "error": f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
    return {**record, "wall": time.monotonic() - start}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("which", nargs="*", default=list(LIBRARIES), help="libraries or models; all by default")
    parser.add_argument("--peer", action="store_true", help="torch-pruning too")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=300, help="seconds of processor time for each model")
    parser.add_argument("--table", type=Path, default=Path("docs/zoo.csv"), help="what is brought up to date")
    options = parser.parse_args()
    chosen = [name for which in options.which for name in (names(which) if which in LIBRARIES else [which])]
    programs = ["zoo.measure", *(["zoo.peer"] if options.peer else [])]
    jobs = [(program, name) for name in chosen for program in programs]
    with ThreadPoolExecutor(options.workers) as pool:
        running = {pool.submit(run, *job, options.limit): job for job in jobs}
        for done in track(as_completed(running), total=len(jobs)):
            (program, name), record = running[done], done.result()
            ours, peer = ({name: record} if program == each else {} for each in ("zoo.measure", "zoo.peer"))
            write(merged(read(options.table), ours, peer), options.table)  # at once: a sweep takes its time
            if ours and record["error"]:
                print(f"{name}: {record['error']}")
    rows = read(options.table)
    wrong = [name for name in chosen if not right(rows[name])]
    fallen = [name for name in below(rows) if name in chosen and name not in wrong]
    if wrong or fallen:
        sys.exit(
            f"wrong: {', '.join(wrong) or 'none'}; fewer removable channels than before: {', '.join(fallen) or 'none'}"
        )


if __name__ == "__main__":
    main()
