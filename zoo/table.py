"""The table of a sweep: docs/zoo.csv for programs, docs/zoo.md for people.

Every model has a floor under its removable share, which only goes up: a sweep that finds less fails.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxcompress.replacing import replacing

COLUMNS = (
    "model", "params", "traced", "removable", "floor", "macs", "difference", "seconds",
    "peer works", "peer exact", "peer macs", "peer seconds", "remark",
)  # fmt: skip
EXACT = 1e-9
Row = dict[str, str]


def read(path: Path) -> dict[str, Row]:
    """The rows of a table by model; none if there is no table yet."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def merged(rows: Mapping[str, Row], ours: Mapping[str, Any], peers: Mapping[str, Any]) -> dict[str, Row]:
    """The table with what was measured anew.

    Args:
        rows: the table so far.
        ours: records of :mod:`zoo.measure` by model.
        peers: records of :mod:`zoo.peer` by model.
    """
    names = sorted({*rows, *ours, *peers})
    return {name: _row(rows.get(name, {}), ours.get(name), peers.get(name), name) for name in names}


def _row(known: Row, ours: dict[str, Any] | None, peer: dict[str, Any] | None, name: str) -> Row:
    row = {column: known.get(column, "") for column in COLUMNS} | {"model": name}
    if ours is not None:
        share = float(ours.get("removable") or 0)
        floor = max(float(row["floor"] or 0), math.floor(share * 1000) / 1000)
        row |= {
            "params": str(ours.get("params", "")),
            "traced": "yes" if ours.get("traced") else "no",
            "removable": f"{share:.3f}",
            "floor": f"{floor:.3f}",
            "macs": f"{ours.get('macs') or 0:.3f}",
            "difference": f"{ours.get('difference', math.nan):.1e}",
            "seconds": f"{ours.get('seconds', math.nan):.2f}",
            "remark": _remark(ours),
        }
    if peer is not None:
        row |= {
            "peer works": "yes" if peer.get("works") else "no",
            "peer exact": "yes" if peer.get("exact") else "no",
            "peer macs": f"{peer['macs'] if peer.get('works') else 0:.3f}",
            "peer seconds": f"{peer.get('seconds', math.nan):.2f}",
        }
    return row


def _remark(record: Mapping[str, Any]) -> str:
    """Why not everything went: the error, the modules that run as they were written, the reasons that keep most."""
    said = [str(record["error"]).splitlines()[0][:120]] if record.get("error") else []
    if record.get("opaque"):
        said.append("as written: " + ", ".join(record["opaque"]))
    if (record.get("removable") or 0) < 0.95:
        reasons = [reason for reason in record.get("frozen") or {} if "output of the model" not in reason]
        said += reasons[:2]
    if not record.get("batches", True):
        said.append("one batch size only")
    return "; ".join(said)


def right(row: Row) -> bool:
    """Whether a model was recorded right, and computes the same removed as masked."""
    return row["traced"] == "yes" and float(row["difference"] or "nan") <= EXACT


def works(row: Row) -> bool:
    """Whether a model was recorded and lost channels."""
    return row["traced"] == "yes" and float(row["macs"] or 0) > 0


def below(rows: Mapping[str, Row]) -> list[str]:
    """Models whose removable share fell below their floor."""
    return [name for name, row in rows.items() if float(row["removable"] or 0) < float(row["floor"] or 0)]


def write(rows: Mapping[str, Row], path: Path) -> None:
    """Write the table, and next to it the page that people read."""
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows.values())
    with replacing(path.with_suffix(".md")) as draft:
        draft.write_text(page(rows))


def page(rows: Mapping[str, Row]) -> str:
    """The table as Markdown, with a summary for each library."""
    lines = [
        "# The zoo",
        "",
        "`make zoo`: each model in a process of its own, random weights with nothing left at its default, half the",
        "channels of every group pruned (`L1FilterPruner(0.5)`, `Speedup()`), masked and removed compared in float64",
        "at two batch sizes. Beside it torch-pruning with the same criterion and ratio, without hints except for the",
        "output layers; *exact* means equal to the model with zeros in place of what it pruned.",
        "",
        "| library | models | works: ours | peer | exact: ours | peer | MACs*: ours | peer | seconds*: ours | peer |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_summary(library, rows) for library in sorted({name.partition("/")[0] for name in rows})),
        "",
        "\\* on the models on which both work. A dash: the peer was not run.",
        "",
        "*removable* is the share of the parameters of linear and convolution layers that lie in removable groups;",
        "*MACs* the share that went; *difference* the largest relative one between masked and removed.",
        "",
        "| model | params | removable | MACs | difference | seconds | peer works | exact | MACs | seconds | remark |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown = ("model", "params", "removable", "macs", "difference", "seconds", *COLUMNS[8:])
    lines += ["| " + " | ".join(row[column] for column in shown) + " |" for row in rows.values()]
    return "\n".join(lines) + "\n"


def _summary(library: str, table: Mapping[str, Row]) -> str:
    rows = [row for name, row in table.items() if name.startswith(f"{library}/")]
    beside = [row for row in rows if row["peer works"]]
    both = [row for row in beside if works(row) and row["peer works"] == "yes"]
    of = "" if len(beside) == len(rows) else f" of {len(beside)}"
    cells = [
        library,
        str(len(rows)),
        str(sum(map(works, rows))),
        f"{sum(row['peer works'] == 'yes' for row in beside)}{of}" if beside else "-",
        str(sum(works(row) and right(row) for row in rows)),
        f"{sum(row['peer exact'] == 'yes' for row in beside)}{of}" if beside else "-",
    ]
    for column, digits in (("macs", 3), ("peer macs", 3), ("seconds", 0), ("peer seconds", 0)):
        values = [float(row[column]) for row in both]
        found = sum(values) if digits == 0 else statistics.fmean(values or [0])
        cells.append(f"{found:.{digits}f}" if both else "-")
    return "| " + " | ".join(cells) + " |"
