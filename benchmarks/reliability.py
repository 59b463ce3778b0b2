"""Inject faults, try models, end commands and make long runs; count what was lost. Hours on one core.

python benchmarks/reliability.py --jobs 2   # writes benchmarks/results/reliability.md, test after test
python benchmarks/reliability.py --quick    # the short form, in minutes: no command is ended, and runs are short
python benchmarks/reliability.py --smoke    # a few faults, and writes nothing
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reliability.md"
TESTS = (
    "nsgd/test_models.py",
    "nsgd/test_faults.py",
    "nsgd/test_bad_input.py",
    "lightning_modules/commands/test_bad_command_lines.py",
    "nsgd/directions/test_chunks.py",
    "lightning_modules/callbacks/test_exceptions.py",
    "nsgd/test_long_runs.py",
    "lightning_modules/study/test_kills.py",
)


class Counts:
    """What the tests say that they did, as properties "reliability: what" and "measured: what".

    Args:
        path: Is written after each test that says something; None to write nothing.
        command: That the page says it is made by.
    """

    def __init__(self, path: Path | None, command: str = "python benchmarks/reliability.py") -> None:
        self.command, self.finished = command, False
        self.path, self.times, self.lost = path, Counter[str](), Counter[str]()
        self.measured: dict[str, str] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test; what it did is lost where it failed."""
        if report.when != "call":
            return
        if report.failed:
            self.failed.append(report.nodeid)
        for name, value in report.user_properties:
            kind, _, what = name.partition(": ")
            if kind == "reliability":
                self.times[what] += int(str(value))
                self.lost[what] += int(str(value)) if report.failed else 0
            elif kind == "measured":
                self.measured[what] = str(value)
        self._write()

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Say that all tests ran."""
        self.finished = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The counts as a page."""
        lines = ["# Reliability", "", f"By `{self.command}`, torch {torch.__version__}, "]
        lines[-1] += f"Python {platform.python_version()}, CPU. Lost or corrupted: that a test found so."
        lines[-1] += "" if self.finished else " The run has not come to its end."
        lines += ["", "| what | times | lost or corrupted |", "| --- | ---: | ---: |"]
        lines += [f"| {what} | {count:,} | {self.lost[what]:,} |" for what, count in self.times.items() if count]
        lines += ["", "Long runs:", ""] if self.measured else []
        lines += [f"- {what}: {found}." for what, found in self.measured.items()]
        lines += ["", "Tests that failed:", ""] if self.failed else []
        lines += [f"- `{name}`" for name in self.failed]
        return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the short form")
    parser.add_argument("--smoke", action="store_true", help="a few faults, and write nothing")
    parser.add_argument("--jobs", type=int, default=1, help="tests side by side")
    args = parser.parse_args()
    os.chdir(ROOT)
    command = f"python benchmarks/reliability.py{' --quick' if args.quick else ''}"
    counts = Counts(None if args.smoke else RESULTS, command)
    chosen = [] if args.quick else ["-m", "", "-k", "not quick"]
    chosen += ["-n", str(args.jobs)] if args.jobs > 1 else []
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    if args.smoke:
        chosen, tests = ["-k", "batch_of_one"], [str(ROOT / "tests" / "nsgd" / "test_faults.py")]
    code = pytest.main(["-q", "-p", "no:cacheprovider", *chosen, *tests], plugins=[counts])
    if args.smoke:
        assert counts.times["batches of one"] > 0
        assert "| batches of one |" in counts.text()
    sys.exit(int(code))


if __name__ == "__main__":
    main()
