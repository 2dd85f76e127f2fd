"""`make zoo` runs this: every model in a process of its own, with a limit, and a table of what became of them.

python -m zoo [library | library/model ...] [--workers N] [--limit SECONDS] [--table FILE] [--peer]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import track

from zoo.catalogue import LIBRARIES, names
from zoo.measure import measure
from zoo.process import preload, run
from zoo.table import below, merged, read, right, write

#: Imported once for all models.
_LIBRARIES = ["zoo.measure", "zoo.catalogue", *(f"zoo.{library}_models" for library in LIBRARIES)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("which", nargs="*", default=list(LIBRARIES), help="libraries or models; all by default")
    parser.add_argument("--peer", action="store_true", help="torch-pruning too")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, default=300, help="seconds of processor time for each model")
    parser.add_argument("--table", type=Path, default=Path("docs/zoo.csv"), help="what is brought up to date")
    options = parser.parse_args()
    chosen = [name for which in options.which for name in (names(which) if which in LIBRARIES else [which])]
    programs: list[Callable[[str], Any]] = [measure]
    preload([*_LIBRARIES, "zoo.peer"] if options.peer else _LIBRARIES)
    if options.peer:
        from zoo import peer

        programs.append(peer.measure)
    jobs = [(program, name) for name in chosen for program in programs]
    with ThreadPoolExecutor(options.workers) as pool:
        running = {pool.submit(run, *job, options.limit): job for job in jobs}
        for done in track(as_completed(running), total=len(jobs)):
            (program, name), record = running[done], done.result()
            ours, theirs = ({name: record}, {}) if program is measure else ({}, {name: record})
            write(merged(read(options.table), ours, theirs), options.table)  # at once: a sweep takes its time
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
