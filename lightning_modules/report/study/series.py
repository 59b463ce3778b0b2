"""One page for several studies of one subject, such as small and large batches: what each says, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_modules.report.page import Section, write_page
from lightning_modules.report.study.curves import loss_figure
from lightning_modules.report.study.files import Files, read_folder
from lightning_modules.report.study.tables import TEXT_COLUMNS, overview
from lightning_modules.report.study.verdict import verdict
from lightning_modules.report.study.words import notes, title


def write_series(path: Path, studies: Sequence[Path]) -> Path:
    """Write a page that puts finished studies beside each other, each with a link to its own; returns its path.

    Args:
        path: The HTML file.
        studies: Folders of the studies, inside that of the page.
    """
    found = {folder: read_folder(folder) for folder in studies}
    return write_page(
        path,
        title=" and ".join(_regime(files).lower() if i else _regime(files) for i, files in enumerate(found.values())),
        verdict=[f"{_regime(files)}: {verdict(files)}" for files in found.values()],
        figures={},
        text_columns=TEXT_COLUMNS,
        sections=[_section(files) for files in found.values()],
        links={
            f"{_regime(files)}: the whole report": f"{folder.relative_to(path.parent)}/report.html"
            for folder, files in found.items()
        },
    )


def _section(files: Files) -> Section:
    figures = {f"{files.folder.name}-{name}": drawn for name, drawn in loss_figure(files).items()}
    return Section(_regime(files), [title(files)], [overview(files)], figures, caption=notes(files))


def _regime(files: Files) -> str:
    """What tells a study from the others: its batches, where they are known."""
    size = ((files.config.get("data") or {}).get("init_args") or {}).get("batch_size")
    return files.folder.name if size is None else f"Batches of {size:,}"
