"""A progress bar of steps: drawn on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[[str, int, int, str | None], None]  # what is running, steps done, steps in all, how it stands


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Update]:
    """A bar of steps; it is updated with what is running, steps done, steps in all, and how that stands."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, {task.fields[said]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console)
    task = progress.add_task("", said="")
    shown = -1

    def update(name: str, done: int, total: int, said: str | None) -> None:
        nonlocal shown
        if not console.file.isatty():  # a line for each per cent
            if 100 * done // total > shown:
                shown = 100 * done // total
                print(f"step {done} of {total}, {name}: {said or 'done'}", flush=True)
            return
        progress.start()  # not before: bad input is said without a bar
        progress.update(task, completed=done, total=total, description=name)
        if said is not None:
            progress.update(task, said=said)

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()
