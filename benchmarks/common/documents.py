"""What the documents are made of: tables, lines of text, and figures that are drawn the same each time."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_modules.report.drawing import lay_out

LINE = 120  # letters of a line of a document


def markdown(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """A table; lines of a cell stay apart."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line).replace("\n", "<br>") + " |" for line in lines)


def wrapped(words: str) -> str:
    """Lines of a document, none of which ends inside code or before a per cent."""
    kept = re.sub(r"`[^`]*`| %", lambda place: place[0].replace(" ", "\0"), words)
    return fill(kept, LINE, break_on_hyphens=False).replace("\0", " ")


def _place(name: str) -> str:
    """A pattern of a table between its markers."""
    return rf"(<!-- {re.escape(name)}: benchmarks/evidence.py -->\n)(.*?)(<!-- /{re.escape(name)} -->)"


def with_places(text: str, names: Iterable[str]) -> str:
    """A document with empty places for the studies of plans that have none, below those that have.

    Args:
        text: Of the document.
        names: Of all its tables; those of plans begin with ``cifar10/``.
    """
    for name in names:
        if name.startswith("cifar10/") and not re.search(_place(name), text, flags=re.S):
            end = max((found.end() for found in re.finditer(r"<!-- /cifar10/.*? -->\n", text)), default=len(text))
            text = f"{text[:end]}\n<!-- {name}: benchmarks/evidence.py -->\n<!-- /{name} -->\n{text[end:]}"
    return text


def rendered(text: str, contents: Mapping[str, str], document: str) -> tuple[str, list[str]]:
    """A document with every table made anew, and the names of those that were others.

    Args:
        text: Of the document.
        contents: Table by name.
        document: Its path, for errors.

    Raises:
        ValueError: If a table has not one place, or a place no table.
    """
    differing = []
    for name, content in contents.items():
        found = re.findall(_place(name), text, flags=re.S)
        if len(found) != 1:
            raise ValueError(f"expected one place for the table {name} in {document}, got {len(found)}")
        wanted = f"\n{content}\n\n"
        if found[0][1] != wanted:
            differing.append(name)
        text = re.sub(_place(name), lambda at, w=wanted: f"{at[1]}{w}{at[3]}", text, flags=re.S)
    if left := set(re.findall(r"<!-- (\S+): benchmarks/evidence\.py -->", text)) - set(contents):
        raise ValueError(
            f"expected files for the table {min(left)} in {document}, got none; remove its place, or restore them"
        )
    return text, differing


def svg(figure: Figure) -> str:
    """The drawing, its letters as outlines and its background white, for any font and any theme; the same each time."""
    file, about = io.StringIO(), {"Date": None, "Description": drawn(figure)}
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "picture"}):
        lay_out(figure)
        figure.savefig(file, format="svg", facecolor="white", metadata=about)
    # A tenth of a point is enough, and half the bytes.
    short = re.sub(
        r' (?:d|x|y)="[^"]*"',
        lambda place: re.sub(r"\d+\.\d\d+", lambda number: f"{float(number[0]):.1f}", place[0]).replace(" \nL ", "L"),
        file.getvalue(),
    )
    return re.sub(r">\s+<", "><", short)


def drawn(figure: Figure) -> str:
    """A hash of every line and word of a figure, whatever matplotlib makes of them; the drawing carries it."""
    said = json.dumps([_said(axes) for axes in figure.axes])
    return f"sha256 of what is drawn: {hashlib.sha256(said.encode()).hexdigest()}"


def _said(axes: Axes) -> list[Any]:
    words = [axes.get_title(loc="left"), axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    words += [axes.get_xscale(), axes.get_yscale(), *(text.get_text() for text in axes.texts)]
    # Six digits are more than can be seen, and the same on every processor.
    lines = [
        [str(line.get_label()), to_hex(line.get_color()), [f"{v:.6g}" for v in np.asarray(line.get_xydata()).flat]]
        for line in axes.get_lines()
    ]
    return [words, lines]


def is_of(path: Path, figure: Figure) -> bool:
    """Whether a drawing is that of a figure: to the byte where the same matplotlib drew it, else in what it shows."""
    if not path.exists():
        return False
    written = path.read_text(encoding="utf-8")
    if re.findall(r"Matplotlib v([\w.]+)", written) == [matplotlib.__version__]:
        return _with_numbered_ids(svg(figure)) == _with_numbered_ids(written)
    return drawn(figure) in written


def _with_numbered_ids(drawing: str) -> str:
    """The drawing without matplotlib's hashes of clips and markers, in which the last bit of a processor shows."""
    numbers: dict[str, str] = {}
    return re.sub(r"\b[mp][0-9a-f]{10}\b", lambda found: numbers.setdefault(found[0], f"{len(numbers)}"), drawing)
