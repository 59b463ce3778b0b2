"""A page of tables and figures: one self-contained HTML file, and each figure as PNG beside it."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")


def new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(4.4 * columns, 3.6), layout="constrained")
    panels = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels


def write_page(
    path: Path,
    *,
    title: str,
    figures: Mapping[str, tuple[Figure, str]],
    tables: Sequence[Mapping[str, Any]] = (),
    text_columns: Collection[str] = (),
    caption: str = "",
    appendix: Mapping[str, str] | None = None,
) -> Path:
    """Write a page, and its figures beside it; returns its path.

    Args:
        path: The HTML file.
        title: Of the page.
        figures: Name to figure and caption.
        tables: Each with a title, a header and rows of text.
        text_columns: Columns that are not numbers.
        caption: Under the tables.
        appendix: Heading to preformatted text.
    """
    pictures = []
    for name, (figure, words) in figures.items():
        picture = path.parent / f"{name}.png"
        figure.savefig(picture, dpi=120)
        pictures.append({"data": base64.b64encode(picture.read_bytes()).decode(), "caption": words, "name": name})
    page = Environment(autoescape=True).from_string(_TEMPLATE)
    text = page.render(
        title=title,
        tables=tables,
        text_columns=text_columns,
        caption=caption,
        pictures=pictures,
        appendix=appendix or {},
    )
    path.write_text(text, encoding="utf-8")
    return path


def print_tables(
    console: Console,
    tables: Sequence[Mapping[str, Any]],
    *,
    text_columns: Collection[str],
    wrapped: Collection[str] = (),
) -> None:
    """Print the tables of a page to a terminal.

    Args:
        console: Where to.
        tables: Each with a title, a header and rows of text.
        text_columns: Columns that are not numbers.
        wrapped: Columns that may take several lines.
    """
    for table in tables:
        grid = Table(title=table["title"], title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in table["header"]:
            grid.add_column(name, justify="left" if name in text_columns else "right", no_wrap=name not in wrapped)
        for row in table["rows"]:
            grid.add_row(*row)
        console.print(grid)


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: 0.3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #1a1a1a; } tr.first td { border-top: 1px solid #bbb; }
.text { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption, .caption { color: #444; font-size: 0.88rem; }
pre { background: #f4f4f4; padding: 0.8rem; overflow-x: auto; font-size: 0.82rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{%- if tables %}
<h2>Results</h2>
{%- endif %}
{%- for table in tables %}
<h3>{{ table.title }}</h3>
<div class="scroll"><table>
<thead><tr>
{%- for name in table.header %}
<th scope="col"{% if name in text_columns %} class="text"{% endif %}>{{ name }}</th>
{%- endfor %}
</tr></thead>
<tbody>
{%- for row in table.rows %}
<tr{% if row[0] %} class="first"{% endif %}>
{%- for cell in row %}
<td{% if table.header[loop.index0] in text_columns %} class="text"{% endif %}>{{ cell }}</td>
{%- endfor %}
</tr>
{%- endfor %}
</tbody>
</table></div>
{%- endfor %}
{%- if caption %}
<p class="caption">{{ caption }}</p>
{%- endif %}
{%- for picture in pictures %}
<h2>{{ picture.name.replace("-", " ").capitalize() }}</h2>
<figure><img src="data:image/png;base64,{{ picture.data }}" alt="{{ picture.caption }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{%- endfor %}
{%- for name, text in appendix.items() %}
<h2>{{ name }}</h2>
<pre>{{ text }}</pre>
{%- endfor %}
</body>
</html>
"""
