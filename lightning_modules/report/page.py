"""A page of tables and figures: one self-contained HTML file, and each figure as PNG and PDF beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # matplotlib takes a second, which reading a report's words does without
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import BboxBase

_PAD = 3  # points around a panel
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # nor a date, which would change the file
_GREY = re.compile(r"(?<=: )#(([0-9a-f]{2})\2\2)(?=[;\"])")
_USED = re.compile(r"var\(--grey-(\w+)\)")


@dataclass(frozen=True)
class Section:
    """A part of a page in words.

    Attributes:
        heading: Above it.
        paragraphs: Of text.
    """

    heading: str
    paragraphs: Sequence[str]


def new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, on a canvas of its own: the backend of pyplot stays the user's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
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
    summary: Sequence[str] = (),
    sections: Sequence[Section] = (),
    links: Mapping[str, str] | None = None,
    appendix: Mapping[str, str] | None = None,
) -> Path:
    """Write a page, and its figures beside it; returns its path.

    The page asks for no other file: its figures are drawings (SVG) inside it, each panel on its own, side by side on a
    screen and below each other on a phone. It follows the reader's choice of a light or a dark screen, and its tables
    sort by the column whose header is pressed. The same arguments give the same bytes.

    Args:
        path: The HTML file.
        title: Of the page.
        figures: Name to figure and caption. Each of a figure's axes is a panel.
        tables: Each with a title, a header and rows of text. In a text column, an empty first cell
            repeats the one above.
        text_columns: Columns that are not numbers.
        caption: Under the tables.
        summary: Sentences above the tables.
        sections: Between tables and figures.
        links: Label to the path of a file, relative to the page.
        appendix: Heading to preformatted text.
    """
    import matplotlib

    pictures, drawn = [], ""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page", "pdf.fonttype": 42}):  # text stays text
        for number, (name, (figure, words)) in enumerate(figures.items()):
            _lay_out(figure)
            figure.savefig(path.parent / f"{name}.png", dpi=120)
            figure.savefig(path.parent / f"{name}.pdf", metadata={"CreationDate": None})
            heading = name.replace("-", " ").capitalize()
            panels = _panels(figure, heading, f"figure-{number}")
            drawn += "".join(panel["drawing"] for panel in panels)
            pictures.append({"name": name, "heading": heading, "caption": words, "panels": panels})
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template("page.html").render(
        title=title,
        tables=tables,
        text_columns=text_columns,
        caption=caption,
        summary=summary,
        sections=sections,
        pictures=pictures,
        greys={grey: f"{255 - int(grey[:2], 16):02x}" * 3 for grey in sorted(set(_USED.findall(drawn)))},
        links=links or {},
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


def _lay_out(figure: Figure) -> None:
    """Place everything, once for all files, and hide tick labels that overlap others of their axis."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        taken: list[BboxBase] = []
        # Those of minor ticks come last, so that they give way.
        for label in (*axis.get_majorticklabels(), *axis.get_minorticklabels()):
            extent = label.get_window_extent()
            label.set_visible(label.get_visible() and not any(extent.overlaps(other) for other in taken))
            taken += [extent] if label.get_visible() and label.get_text() else []


def _panels(figure: Figure, heading: str, prefix: str) -> list[dict[str, str]]:
    """Each axes of a figure as a drawing of its own, with what it shows in words."""
    from matplotlib.transforms import Bbox

    shown = [(axes, axes.bbox.frozen(), tight) for axes in figure.axes if (tight := axes.get_tightbbox()) is not None]
    # Equal room at the left and right, and above, so that equal frames line up, side by side or below each other.
    left, right = (
        max(frame.x0 - tight.x0 for _, frame, tight in shown),
        max(tight.x1 - frame.x1 for _, frame, tight in shown),
    )
    above, pad = max(tight.y1 - frame.y1 for _, frame, tight in shown), _PAD * figure.dpi / 72
    drawings = []
    for i, (axes, frame, tight) in enumerate(shown):
        for other, *_ in shown:
            other.set_visible(other is axes)
        crop = Bbox.from_extents(frame.x0 - left - pad, tight.y0 - pad, frame.x1 + right + pad, frame.y1 + above + pad)
        file, inches = io.StringIO(), crop.transformed(figure.dpi_scale_trans.inverted())
        figure.savefig(file, format="svg", transparent=True, bbox_inches=inches, metadata=_NO_METADATA)
        place = f"{heading}, panel {i + 1} of {len(shown)}" if len(shown) > 1 else heading
        drawings.append({"label": f"{place}: {_words(axes)}", **_drawing(file.getvalue(), f"{prefix}-{i}")})
    for axes, *_ in shown:
        axes.set_visible(True)
    return drawings


def _words(axes: Axes) -> str:
    """What a panel shows, for those who do not see it."""
    plane = " against ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
    return "; ".join(filter(None, (axes.get_title(), plane, ", ".join(axes.get_legend_handles_labels()[1]))))


def _drawing(svg: str, prefix: str) -> dict[str, str]:
    """The inside of matplotlib's SVG, with ids of its own, and black and greys that follow the screen."""
    head, _, inside = svg.partition("<svg ")[2].partition(">")
    inside = re.sub(r">\s+<", "><", inside.rpartition("</svg>")[0])
    inside = re.sub(r"<style.*?</style>", "", inside, flags=re.DOTALL)  # would hold for the whole page
    inside = re.sub(r"font-family: [^;\"]*;? ?", "", inside)
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", inside)
    inside = inside.replace(": #000000", ": currentColor").replace(": #ffffff", ": var(--paper)")
    inside = _GREY.sub(r"var(--grey-\g<1>)", inside)
    return {"view_box": re.findall('viewBox="(.*?)"', head)[0], "drawing": inside}
