"""A clock that is set back while a study runs: seconds are those that passed."""

from __future__ import annotations

import itertools
import math
import re
import time

from rich.console import Console
from studies import silent, study

from lightning_modules.study.compare import run_study
from lightning_modules.support.files import read_csv
from lightning_modules.support.progress import progress_bar


def test_no_duration_is_negative_where_the_clock_goes_backwards(tmp_path, monkeypatch, capsys):
    """By an hour at every look; no second of the study may go by it."""
    hours = itertools.count()
    plain = time.time
    monkeypatch.setattr(time, "time", lambda: plain() - 3600.0 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    said: list[str] = []
    began = time.perf_counter()
    with progress_bar(Console(width=100)) as update:
        chosen = study(epochs=2, tune=1, lr=None)
        assert run_study(chosen, tmp_path / "out", update, say=said.append) == []
    most = time.perf_counter() - began
    seconds = [
        row["seconds"] for path in (tmp_path / "out").rglob("*.csv") for row in read_csv(path) if "seconds" in row
    ]
    assert len(seconds) > 20
    reached = [value for value in seconds if value != math.inf]  # which stands for a target that was not
    assert [value for value in reached if not 0 <= value <= most] == []
    lines = capsys.readouterr().out
    assert len(re.findall(r"\d:\d\d:\d\d elapsed", lines)) > 3
    assert not re.search(r"days?, ", lines)  # a negative time is written "-1 day, 23:59:59"
    assert re.search(r"about (a second|\d+ seconds)", said[0])
    run_study(chosen, tmp_path / "out", silent)  # what is there is finished
