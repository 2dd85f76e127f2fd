"""The plots of a report, as SVG that can stand in a page: no fonts, no scripts, no references."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Protocol

import networkx as nx

from fxcompress.errors import InputError
from fxcompress.latency import Latency
from fxcompress.search.history import SearchHistory

_BEFORE, _AFTER, _BAD, _TAKEN, _LINE = "#c3cad5", "#2563eb", "#dc2626", "#f59e0b", "#475569"

#: Groups with a line of their own in a legend; the others are drawn in grey.
_NAMED = 10


class Curve(Protocol):
    """What is drawn of :class:`fxcompress.search.sweep.Curve`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def measured(self) -> Sequence[tuple[float, float]]: ...


class Curves(Protocol):
    """What is drawn of a sensitivity."""

    @property
    def dense(self) -> float: ...
    @property
    def curves(self) -> Sequence[Curve]: ...


def _figure(width: float, height: float) -> Any:
    """An empty figure; inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"the plots of a report need matplotlib, which cannot be imported ({error}). Install it: "
            "pip install 'fxcompress[plot]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _axes(width: float, height: float, x: str, y: str) -> tuple[Any, Any]:
    figure = _figure(width, height)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """A figure as an ``<svg>`` element that a screen reader can name."""
    import matplotlib

    text = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure.savefig(text, format="svg", metadata=none)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)  # as wide as the page lets it be
    wide = ' class="wide"' if figure.get_figwidth() > 8 else ""
    return svg.replace("<svg", f'<svg{wide} role="img" aria-label="{escape(title)}"', 1)


def sensitivity(found: Curves, kind: str) -> str | None:
    """The score against the sparsity of every group, or against the bits of every layer."""
    curves = [curve for curve in found.curves if curve.kind == kind and curve.measured]
    if not curves:
        return None
    label = "sparsity" if kind == "sparsity" else "bits of the weight"
    figure, axes = _axes(9, 4.2, label, "score")
    axes.axhline(found.dense, color=_LINE, linestyle="--", linewidth=1, label="dense")
    order = sorted(curves, key=lambda curve: sum(score for _, score in curve.measured) / len(curve.measured))
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    for index, curve in enumerate(order):
        values, scores = zip(*sorted(curve.measured), strict=True)
        named = index < _NAMED
        color = colors(index / min(len(order), _NAMED) * 0.9) if named else _BEFORE
        axes.plot(
            values, scores, "o-", markersize=3, color=color, label=curve.name if named else None, zorder=2 + named
        )
    title = "most sensitive first" if len(order) <= _NAMED else f"the {_NAMED} most sensitive; {len(order)} in all"
    axes.legend(title=title, fontsize=7, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    if kind == "bits":
        axes.invert_xaxis()
    return _svg(figure, f"Score against {label}")


def widths(rows: Iterable[tuple[str, int, int]]) -> str | None:
    """Widths of layers before and after: (layer, before, after)."""
    items = list(rows)
    if not items:
        return None
    figure, axes = _axes(9, 0.9 + 0.2 * len(items), "width", "")
    places = range(len(items))
    axes.barh(places, [before for _, before, _ in items], color=_BEFORE, height=0.72, label="before")
    axes.barh(places, [after for _, _, after in items], color=_AFTER, height=0.72, label="after")
    for place, (_, before, after) in enumerate(items):
        axes.annotate(
            f"{after} of {before}", (max(before, after), place), (4, 0), textcoords="offset points", va="center",
            fontsize=7, color=_LINE,
        )  # fmt: skip
    axes.set_yticks(places, [name for name, _, _ in items], fontsize=7)
    axes.set_ylim(len(items) - 0.4, -0.6)
    axes.grid(axis="y", alpha=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return _svg(figure, "Widths before and after")


def history(search: SearchHistory) -> str | None:
    """The score of every trial, and the best so far."""
    done = [(trial.number, trial.score) for trial in search.trials if trial.score is not None]
    if not done:
        return None
    figure, axes = _axes(5.4, 3.4, "trial", "score")
    axes.locator_params(axis="x", integer=True)
    axes.plot(*zip(*done, strict=True), "o", color=_AFTER, markersize=3.5, alpha=0.6, label="trial")
    best = search.progress()
    steps = [*best, (search.trials[-1].number, best[-1][1])]
    axes.step(*zip(*steps, strict=True), where="post", color=_LINE, linewidth=1.2, label="best so far")
    if search.dense is not None:
        axes.axhline(search.dense, color=_LINE, linestyle="--", linewidth=1, label="dense")
    low = min(score for _, score in done)
    if search.failed:
        axes.plot([t.number for t in search.failed], [low] * len(search.failed), "x", color=_BAD, label="failed")
    if search.chosen is not None and search.chosen.score is not None:
        axes.plot(search.chosen.number, search.chosen.score, "*", color=_TAKEN, markersize=12, label="taken")
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure, f"History of {search.name}")


def front(search: SearchHistory) -> str | None:
    """Scores against what trials cost, and those that no other one beats in both."""
    costs = {name for trial in search.trials if trial.score is not None for name in trial.proposal.cost}
    asked = [name for name in search.budget if name in costs] or sorted(costs)
    if not asked:
        return None
    figure_name = asked[0]
    having = [t for t in search.trials if t.score is not None and figure_name in t.proposal.cost]
    figure, axes = _axes(5.4, 3.4, f"{figure_name}, as a fraction of the dense model's", "score")
    axes.plot(
        [t.proposal.cost[figure_name] for t in having], [t.score for t in having], "o", color=_AFTER, markersize=3.5,
        alpha=0.6, label="trial",
    )  # fmt: skip
    best = search.front(figure_name)
    axes.step(
        [t.proposal.cost[figure_name] for t in best], [t.score for t in best], where="post", color=_LINE,
        linewidth=1.2, label="Pareto front",
    )  # fmt: skip
    if figure_name in search.budget:
        axes.axvline(search.budget[figure_name], color=_LINE, linestyle="--", linewidth=1, label="budget")
    taken = search.chosen
    if taken is not None and figure_name in taken.proposal.cost:
        axes.plot(taken.proposal.cost[figure_name], taken.score, "*", color=_TAKEN, markersize=12, label="taken")
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure, f"Score against cost of {search.name}")


def latencies(before: Latency, after: Latency) -> str:
    """Medians with interquartile ranges."""
    figure, axes = _axes(9, 1.5, "milliseconds: median, and interquartile range", "")
    for place, (found, color) in enumerate(((before, _BEFORE), (after, _AFTER))):
        axes.barh(place, found.median * 1e3, color=color, height=0.6, xerr=found.iqr * 500, ecolor=_LINE, capsize=3)
        axes.annotate(f"{found.median * 1e3:.3f}", (0, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks((0, 1), ("before", "after"))
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0)
    return _svg(figure, "Latency before and after")


def groups(graph: nx.DiGraph[str]) -> str | None:
    """Channel groups from left to right in the order of the model; a line for every layer between two of them."""
    if not graph:
        return None
    flat = nx.condensation(graph)
    layer: dict[str, int] = {}
    for depth, generation in enumerate(nx.topological_generations(flat)):
        for number in generation:
            layer |= dict.fromkeys(flat.nodes[number]["members"], depth)
    columns: dict[int, list[str]] = {}
    for name in graph:
        columns.setdefault(layer[name], []).append(name)
    place = {
        name: (depth, (len(names) - 1) / 2 - row) for depth, names in columns.items() for row, name in enumerate(names)
    }
    tallest = max(map(len, columns.values()))
    figure = _figure(max(9.0, 0.55 * len(columns)), min(max(2.2, 0.6 * tallest + 1.2), 9))
    axes = figure.add_subplot()
    axes.axis("off")
    colors = [_AFTER if graph.nodes[name]["removable"] else _BEFORE for name in graph]
    sizes = [30 + 1.2 * min(graph.nodes[name]["width"], 400) for name in graph]
    nx.draw_networkx_edges(
        graph, place, ax=axes, edge_color=_LINE, alpha=0.35, arrowsize=6, width=0.7, node_size=sizes,
        connectionstyle="arc3,rad=0.12",
    )  # fmt: skip
    nx.draw_networkx_nodes(graph, place, ax=axes, node_color=colors, node_size=sizes)
    if len(graph) <= 60:
        for name, (x, y) in place.items():
            text = f"{name}\n{graph.nodes[name]['width']}"
            axes.annotate(
                text, (x, y), (0, -11), textcoords="offset points", ha="right", va="top", fontsize=6, rotation=30,
                rotation_mode="anchor",
            )  # fmt: skip
    axes.margins(0.08, 0.3)
    return _svg(figure, "Channel groups")
