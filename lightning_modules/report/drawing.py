"""Figures as drawings (SVG) inside a page: each panel on its own, with its legend beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter
from matplotlib.transforms import Bbox, BboxBase

_PAD = 3  # points around a panel
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # nor a date, which would change the file
_GREY = re.compile(r"(?<=: )#(([0-9a-f]{2})\2\2)(?=[;\"])")
_SERIES = re.compile(r'(<g id="[^"]*series-(\d+)-(line|more)-\d+")')
_KEY_SIZE = (0.5, 0.16)  # inches


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a sample of its lines, its name, and the number that the lines have in their figure."""

    series: int
    name: str
    view_box: str
    drawing: str


@dataclass(frozen=True)
class Panel:
    """One of a figure's axes.

    Attributes:
        label: What it shows, for those who do not see it.
        view_box: Its size, in points.
        drawing: The inside of its SVG.
        axes: Where its frame stands in the drawing, and the range and scale of both axes; none where a point has no
            number, as on a scale that is neither linear nor logarithmic.
        legend_title: Above its own legend.
        keys: Of its own legend.
    """

    label: str
    view_box: str
    drawing: str
    axes: dict[str, Any] | None
    legend_title: str
    keys: list[Key]


@dataclass(frozen=True)
class Drawn:
    """A figure's panels, the entries of the legend that they share, and the names of its series."""

    panels: list[Panel]
    keys: list[Key]
    names: list[str] = field(default_factory=list)


def legend_beside(figure: Figure, axes: Axes) -> None:
    """Give a figure one legend at the right of its panels, with what is labelled in one of them."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + 0.7 + 0.065 * max(map(len, labels)), height)  # the panels keep their width
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, handlelength=3.5)


def lay_out(figure: Figure) -> None:
    """Place everything, once for all files, and hide tick labels that overlap others of their axis."""
    for text in _words_of(figure):
        text.set_parse_math(False)  # a dollar in a name begins no formula
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        taken: list[BboxBase] = []
        # Those of minor ticks come last, so that they give way.
        for label in (*axis.get_majorticklabels(), *axis.get_minorticklabels()):
            extent = label.get_window_extent()
            label.set_visible(label.get_visible() and not any(extent.overlaps(other) for other in taken))
            taken += [extent] if label.get_visible() and label.get_text() else []


def _words_of(figure: Figure) -> Iterator[Text]:
    """Every text that somebody wrote; the numbers of an axis are matplotlib's, which writes powers as formulas."""
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        if legend is not None:
            yield from (*legend.get_texts(), legend.get_title())
    for axes in figure.axes:
        yield from (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter):  # names at its ticks
                yield from axis.get_majorticklabels()


def draw(figure: Figure, heading: str, prefix: str) -> Drawn:
    """A figure that is laid out, as drawings; it is left as it was.

    An artist with a gid belongs to the series of that name, as does what a legend names; the lines of a series can be
    found in the drawing by its number.

    Args:
        figure: With one or more axes.
        heading: Of the figure.
        prefix: Of every id in the drawings.
    """
    legends = [axes.get_legend() for axes in figure.axes]
    hidden = [legend for legend in (*figure.legends, *legends) if legend is not None and legend.get_visible()]
    for legend in hidden:  # the page has them beside the panels
        legend.set_visible(False)
    names: list[str] = []
    with _marked(figure, names):
        drawn = _panels(figure, heading, prefix, names)
    for legend in hidden:
        legend.set_visible(True)
    shared = [key for n, legend in enumerate(figure.legends) for key in _keys(legend, figure, names, f"{prefix}-s{n}")]
    return Drawn(drawn, shared, names)


def greys(drawings: str) -> list[str]:
    """The greys that drawings use, which follow the screen."""
    return sorted(set(re.findall(r"var\(--grey-(\w+)\)", drawings)))


@contextmanager
def _marked(figure: Figure, names: list[str]) -> Iterator[None]:
    """Give every artist of a series a gid that says so and no other artist has; ``names`` takes the series' names."""
    marked: list[tuple[Artist, str | None]] = []
    for axes in figure.axes:
        named = {
            part: str(label)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
            for part in _parts(handle)
        }
        for artist in axes.get_children():
            name = artist.get_gid() or named.get(artist)
            if name is None:
                continue
            if name not in names:
                names.append(name)
            line = isinstance(artist, Line2D) and artist in named
            marked.append((artist, artist.get_gid()))
            artist.set_gid(f"series-{names.index(name)}-{'line' if line else 'more'}-{len(marked)}")
    try:
        yield
    finally:
        for artist, gid in marked:
            artist.set_gid(gid)  # None is what it was


def _parts(handle: Any) -> list[Artist]:
    return handle.get_children() if isinstance(handle, Container) else [handle]


def _panels(figure: Figure, heading: str, prefix: str, names: list[str]) -> list[Panel]:
    """Each axes of a figure as a drawing of its own, with what it shows in words."""
    shown = [(axes, axes.bbox.frozen(), tight) for axes in figure.axes if (tight := axes.get_tightbbox()) is not None]
    # Equal room at the left and right, and above, so that equal frames line up, side by side or below each other.
    left, right = (
        max(frame.x0 - tight.x0 for _, frame, tight in shown),
        max(tight.x1 - frame.x1 for _, frame, tight in shown),
    )
    above, pad = max(tight.y1 - frame.y1 for _, frame, tight in shown), _PAD * figure.dpi / 72
    panels = []
    for i, (axes, frame, tight) in enumerate(shown):
        for other, *_ in shown:
            other.set_visible(other is axes)
        crop = Bbox.from_extents(frame.x0 - left - pad, tight.y0 - pad, frame.x1 + right + pad, frame.y1 + above + pad)
        view_box, drawing = _svg(
            figure, f"{prefix}-{i}", bbox_inches=crop.transformed(figure.dpi_scale_trans.inverted())
        )
        place = f"{heading}, panel {i + 1} of {len(shown)}" if len(shown) > 1 else heading
        legend = axes.get_legend()
        panels.append(
            Panel(
                label=f"{place}: {_words(axes)}",
                view_box=view_box,
                drawing=drawing,
                axes=_axes(axes, frame, crop, 72 / figure.dpi),
                legend_title="" if legend is None else legend.get_title().get_text(),
                keys=[] if legend is None else _keys(legend, axes, names, f"{prefix}-{i}-k"),
            )
        )
    for axes, *_ in shown:
        axes.set_visible(True)
    return panels


def _axes(axes: Axes, frame: BboxBase, crop: BboxBase, scale: float) -> dict[str, Any] | None:
    """Frame in points from the upper left of the drawing, and for both axes name, limits, and whether logarithmic."""
    if not {axes.get_xscale(), axes.get_yscale()} <= {"linear", "log"}:
        return None
    edges = (frame.x0 - crop.x0, crop.y1 - frame.y0, frame.x1 - crop.x0, crop.y1 - frame.y1)
    return {
        "frame": [round(scale * edge, 3) for edge in edges],
        "x": [axes.get_xlabel(), *map(float, axes.get_xlim()), axes.get_xscale() == "log"],
        "y": [axes.get_ylabel(), *map(float, axes.get_ylim()), axes.get_yscale() == "log"],
    }


def _words(axes: Axes) -> str:
    """What a panel shows, for those who do not see it."""
    plane = " against ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
    return "; ".join(filter(None, (axes.get_title(), plane, ", ".join(axes.get_legend_handles_labels()[1]))))


def _keys(legend: Legend, of: Figure | Axes, names: list[str], prefix: str) -> list[Key]:
    """The entries of a legend, each with a drawing of its sample."""
    every = of.axes if isinstance(of, Figure) else [of]
    handles: dict[str, Any] = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    keys = []
    for i, text in enumerate(legend.get_texts()):
        name = text.get_text()
        if name in handles and name in names:
            sample = Figure(figsize=_KEY_SIZE)
            spare = {"borderpad": 0, "handletextpad": 0, "borderaxespad": 0, "frameon": False}
            sample.legend([handles[name]], [""], loc="center", handlelength=3.5, fontsize=8, **spare)
            keys.append(Key(names.index(name), name, *_svg(sample, f"{prefix}{i}")))
    return keys


def _svg(figure: Figure, prefix: str, **options: Any) -> tuple[str, str]:
    """View box and inside of matplotlib's SVG, with ids of its own, and black and greys that follow the screen."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA, **options)
    head, _, inside = file.getvalue().partition("<svg ")[2].partition(">")
    inside = re.sub(r">\s+<", "><", inside.rpartition("</svg>")[0])
    inside = re.sub(r"<style.*?</style>", "", inside, flags=re.DOTALL)  # would hold for the whole page
    inside = re.sub(r"font-family: [^;\"]*;? ?", "", inside)
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", inside)
    inside = inside.replace(": #000000", ": currentColor").replace(": #ffffff", ": var(--paper)")
    inside = _GREY.sub(r"var(--grey-\g<1>)", inside)
    inside = _SERIES.sub(r'\g<1> data-series="\g<2>" data-kind="\g<3>"', inside)
    return re.findall('viewBox="(.*?)"', head)[0], inside
