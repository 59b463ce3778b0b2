"""The progress bar: on a terminal at once, elsewhere a line for each tenth of the work."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lightning_modules.support.progress import progress_bar, starting


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_elsewhere_there_is_a_line_for_each_tenth_of_the_work(capsys):
    with progress_bar(Console(file=io.StringIO())) as update:
        for step in range(1001):
            update("run 1 of 2: runs/sgd-0", step, 1000, f"loss {step}")
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 11
    assert found[0] == "step 0 of 1000, run 1 of 2: runs/sgd-0: loss 0"
    assert re.fullmatch(
        r"step 500 of 1000, 0:00:0\d elapsed, 0:00:0\d left, run 1 of 2: runs/sgd-0: loss 500", found[5]
    )


def test_what_is_left_goes_by_the_pace_since_the_first_update(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("lightning_modules.support.progress.time.monotonic", lambda: now)
    with progress_bar(Console(file=io.StringIO())) as update:
        now += 60
        update("runs/a", 400, 1000, None)  # of a study that goes on, and was prepared for a minute
        now += 10
        update("runs/a", 600, 1000, None)
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "step 600 of 1000, 0:00:10 elapsed, 0:00:20 left, runs/a: done"


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_the_bar_is_there_at_once_and_stays_when_something_ran(capsys, width):
    console = terminal(width)
    with progress_bar(console) as update:
        assert "getting ready" in printed(console)
        update("run 1 of 20: runs/sgd-momentum-more-0", 3000, 6000, "loss 0.5")
    last = [line for line in printed(console).splitlines() if line.strip()][-1]
    assert re.search(r" 0:00:\d\d elapsed, .:..:.. left step 3000 of 6000, run 1 of 20", last)
    assert len(last) <= width
    assert last.rstrip().endswith("loss 0.5" if width == 120 else "…")
    assert capsys.readouterr().out == ""


def test_the_bar_goes_where_nothing_ran():
    console = terminal()

    def bad() -> None:
        with progress_bar(console):
            raise ValueError("bad input")

    with pytest.raises(ValueError, match="bad input"):
        bad()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("\x1b[2K")  # the line is cleared


def test_starting_says_nothing_to_a_file(capsys):
    with starting("importing torch"):
        pass
    said = capsys.readouterr()
    assert said.out == said.err == ""
