"""A report as one HTML page that needs no other file, no network and no script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxcompress.errors import InputError


@dataclass(frozen=True)
class Tile:
    """One number to be seen at a glance.

    Attributes:
        name: what it is of.
        value: in words.
        detail: before and after.
        good: whether it got better; None where that says nothing.
    """

    name: str
    value: str
    detail: str
    good: bool | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: what is to be seen.
        plots: ``<svg>`` elements.
        head: of a table.
        rows: of a table, the first cell of each the name.
    """

    title: str
    text: str = ""
    plots: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #0f172a; background: #f1f5f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 16px; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 0 0 12px; color: #475569; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile, section { background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; padding: 16px; }
.tile b { display: block; font-size: 26px; line-height: 1.2; font-weight: 600; }
.tile span { color: #475569; }
.good b { color: #15803d; }
.bad b { color: #b91c1c; }
section { margin-bottom: 16px; overflow-x: auto; }
.plots { display: flex; flex-wrap: wrap; gap: 16px; }
.plots svg { flex: 1 1 400px; max-width: 100%; height: auto; font-family: system-ui, sans-serif; }
.plots svg.wide { flex-basis: 100%; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid #e2e8f0; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<div class="tiles">
{% for tile in tiles %}
<div class="tile{{ {true: ' good', false: ' bad'}.get(tile.good, '') }}">
<span>{{ tile.name }}</span><b>{{ tile.value }}</b><span>{{ tile.detail }}</span></div>
{% endfor %}
</div>
{% for part in sections %}
<section>
<h2>{{ part.title }}</h2>
{% if part.text %}<p>{{ part.text }}</p>{% endif %}
{% if part.plots %}<div class="plots">{% for plot in part.plots %}{{ plot|safe }}{% endfor %}</div>{% endif %}
{% if part.rows %}
<table><thead><tr>{% for cell in part.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in part.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table>
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""


def page(title: str, tiles: tuple[Tile, ...], sections: tuple[Section, ...]) -> str:
    """The page; all text is escaped.

    Raises:
        InputError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise InputError(
            f"a report as HTML needs jinja2, which cannot be imported ({error}). Install it: "
            "pip install 'fxcompress[plot]'."
        ) from error
    environment: Any = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text: str = environment.from_string(_PAGE).render(title=title, tiles=tiles, sections=sections)
    return text
