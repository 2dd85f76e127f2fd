"""`make zoo` runs this: every model in a process of its own, with a limit, and a table of what became of them.

python -m zoo [library | library/model ...] [--workers N] [--limit SECONDS] [--records FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track


def run(name: str, limit: float) -> dict[str, Any]:
    """The record of one model; one with an error where the process ended without."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "zoo.measure", name],
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        record: dict[str, Any] = (
            json.loads(done.stdout.splitlines()[-1])
            if done.returncode == 0
            else {
                "name": name,
                "error": f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}",
            }
        )
    except subprocess.TimeoutExpired:
        record = {"name": name, "error": f"took more than {limit:.0f} s"}
    return {**record, "wall": time.monotonic() - start}


def main() -> None:
    from zoo.catalogue import LIBRARIES, names

    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("which", nargs="*", default=list(LIBRARIES), help="libraries or models; all by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each model")
    parser.add_argument("--records", type=Path, default=Path("zoo.jsonl"), help="where records are appended")
    options = parser.parse_args()
    chosen = [name for which in options.which for name in (names(which) if which in LIBRARIES else [which])]
    with ThreadPoolExecutor(options.workers) as pool, options.records.open("a") as file:
        for record in track(pool.map(lambda name: run(name, options.limit), chosen), total=len(chosen)):
            file.write(json.dumps(record) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
