"""A page of figures and tables: one self-contained HTML file, and each figure as PNG and PDF beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, FileSystemLoader
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_modules.support.whole_files import write_bytes, write_text

if TYPE_CHECKING:  # matplotlib takes a second, which reading a report's words does without
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = Mapping[str, tuple["Figure", str]]  # name to figure and caption
Tables = Sequence[Mapping[str, Any]]  # each with a title, a header and rows of text


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: Above it.
        paragraphs: Of text.
        tables: Below the figures, as in :func:`write_page`.
        figures: Below the text, as in :func:`write_page`.
        caption: Under the tables.
        folded: Whether it is shown only once its heading is pressed, or in print.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Tables = ()
    figures: Figures = field(default_factory=dict)
    caption: str = ""
    folded: bool = False


def new_figure(columns: int, *, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels, row by row, on a canvas of its own: the backend of pyplot stays the user's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels


def write_page(
    path: Path,
    *,
    title: str,
    figures: Figures,
    verdict: str | Sequence[str] = (),
    tables: Tables = (),
    text_columns: Collection[str] = (),
    caption: str = "",
    summary: Sequence[str] = (),
    sections: Sequence[Section] = (),
    links: Mapping[str, str] | None = None,
    appendix: Mapping[str, str] | None = None,
) -> Path:
    """Write a page, and its figures beside it; returns its path.

    The page asks for no other file: its figures are drawings (SVG) inside it, each panel on its own, side by side on a
    screen and below each other on a phone, with their legends beside them. A press on a legend's entry hides its lines,
    and a line says its values under the pointer. The page follows the reader's choice of a light or a dark screen, and
    its tables sort by the column whose header is pressed. The same arguments give the same bytes.

    Args:
        path: The HTML file.
        title: Of the page.
        figures: Name to figure and caption. Each of a figure's axes is a panel.
        verdict: What came out, in one line below the title; further lines are printed smaller. Or several of these.
        tables: Each with a title, a header and rows of text, and ``cards`` where each row is to be a card on a phone.
            In a text column, an empty first cell repeats the one above. Further lines of a cell are small print.
        text_columns: Columns that are not numbers.
        caption: Under the tables.
        summary: Sentences below the verdict.
        sections: After figures and tables.
        links: Label to the path of a file, relative to the page.
        appendix: Heading to preformatted text.
    """
    import matplotlib

    from lightning_modules.report.drawing import draw, greys, lay_out

    drawings: list[str] = []
    pictures: list[list[dict[str, Any]]] = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page", "pdf.fonttype": 42}):  # text stays text
        for part, of in enumerate((figures, *(section.figures for section in sections))):
            pictures.append([])
            for number, (name, (figure, words)) in enumerate(of.items()):
                lay_out(figure)
                kinds: dict[str, dict[str, Any]] = {"png": {"dpi": 120}, "pdf": {"metadata": {"CreationDate": None}}}
                for kind, options in kinds.items():
                    picture = BytesIO()
                    figure.savefig(picture, format=kind, **options)
                    write_bytes(path.parent / f"{name}.{kind}", picture.getvalue())
                heading = name.replace("-", " ").capitalize()
                drawn = draw(figure, heading, f"figure-{part}-{number}")
                drawings += [panel.drawing for panel in drawn.panels]
                drawings += [key.drawing for keys in (drawn.keys, *(p.keys for p in drawn.panels)) for key in keys]
                pictures[-1].append({"name": name, "heading": heading, "caption": words, "drawn": drawn})
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template("page.html").render(
        title=title,
        verdicts=[verdict] if isinstance(verdict, str) else verdict,
        tables=tables,
        text_columns=text_columns,
        caption=caption,
        summary=summary,
        sections=list(zip(sections, pictures[1:], strict=True)),
        pictures=pictures[0],
        greys={grey: f"{255 - int(grey[:2], 16):02x}" * 3 for grey in greys("".join(drawings))},
        links=links or {},
        appendix=appendix or {},
    )
    write_text(path, text)
    return path


def print_tables(
    console: Console,
    tables: Tables,
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
        # Not as the table's own title, which would be cut to its width.
        console.print(f"\n{table['title']}", style="italic", markup=False, highlight=False)
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in table["header"]:
            justify: Literal["left", "right"] = "left" if name in text_columns else "right"
            grid.add_column(Text(name), justify=justify, no_wrap=name not in wrapped, overflow="fold")
        for row in table["rows"]:
            grid.add_row(*map(Text, row))  # brackets in a name are no markup
        console.print(grid)
