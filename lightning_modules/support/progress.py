"""A progress bar of steps: drawn on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

_TIMES = "0:00:00 elapsed, 0:00:00 left"

Update = Callable[[str, int, int, str | None], None]  # what is running, steps done, steps in all, how it stands

_LINES = 10  # in all, where there is no terminal


@contextlib.contextmanager
def starting(words: str) -> Iterator[None]:
    """Say on a terminal what goes on before there is a bar, and for how long; it is gone afterwards."""
    console = Console(stderr=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn(words),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,  # modules that are imported meanwhile keep the streams that they find
        redirect_stderr=False,
        disable=not console.is_terminal,
    )
    with progress:
        progress.add_task("", total=None)
        yield


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Update]:
    """A bar of steps; it is updated with what is running, steps done, steps in all, and how that stands.

    Args:
        console: On a terminal the bar is there at once, and gone where nothing ever ran, as with bad input; elsewhere a
            line is printed for each tenth of the work.
    """
    bar = 20 if console.width >= 100 else 10
    rest = Column(no_wrap=True, overflow="ellipsis", max_width=max(10, console.width - bar - len(_TIMES) - 2))
    columns = (
        BarColumn(bar_width=bar),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.description}", table_column=rest, markup=False),  # last, and cut where a terminal is narrow
    )
    drawn = console.is_terminal
    progress = Progress(*columns, console=console, disable=not drawn)
    task = progress.add_task("getting ready", total=None)
    shown, last_state = -1, ""
    began, done_before = time.monotonic(), -1  # since the first update

    def update(name: str, done: int, total: int, state: str | None) -> None:
        nonlocal shown, last_state, began, done_before
        if done_before < 0:
            began, done_before = time.monotonic(), done
        if drawn:
            last_state = last_state if state is None else state
            description = f"{name}, {last_state}" if last_state else name
            progress.update(task, completed=done, total=total, description=f"step {done} of {total}, {description}")
        elif _LINES * done // total > shown:
            shown = _LINES * done // total
            times = _times(time.monotonic() - began, done - done_before, total - done)
            print(f"step {done} of {total}, {times}{name}: {state or 'done'}", flush=True)

    with progress:
        try:
            yield update
        finally:
            progress.live.transient = done_before < 0


def _times(elapsed: float, done: int, left: int) -> str:
    """Seconds gone for some steps, and what those that are left will take at that pace."""
    if done <= 0:
        return ""
    gone, to_come = (timedelta(seconds=round(seconds)) for seconds in (elapsed, elapsed / done * left))
    return f"{gone} elapsed, {to_come} left, "
