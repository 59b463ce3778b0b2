"""Inject faults, try models, end commands and make long runs; count what was lost. Hours on one core.

python benchmarks/reliability.py --jobs 2   # writes benchmarks/results/reliability.md, test after test
python benchmarks/reliability.py --again    # what failed in that run, in its place there
python benchmarks/reliability.py --quick    # the short form, in minutes: no command is ended, and runs are short
python benchmarks/reliability.py --smoke    # a few faults, and writes nothing
"""

from __future__ import annotations

import argparse
import os
import platform
import re
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

# Of a page that was written before.
_ROW = re.compile(r"^\| ([^|]+?) \| ([\d,]+) \| ([\d,]+) \|$", re.M)
_MEASURED = re.compile(r"^- ([^`:]+): (.*)\.$", re.M)
_FAILED = re.compile(r"^- `(.*)`$", re.M)
_AGAIN = re.compile(r"were mended: (\d+) of the tests")


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
        self.again = 0  # tests that failed and were run again

    def go_on(self, page: str) -> list[str]:
        """Take over a finished page but for the tests that failed, which are returned."""
        if "has not come to its end" in page:
            raise SystemExit("expected a run that has come to its end, got one that has not; leave --again out")
        for what, times, lost in _ROW.findall(page):
            self.times[what] = int(times.replace(",", "")) - int(lost.replace(",", ""))
        self.measured |= dict(_MEASURED.findall(page))
        failed = _FAILED.findall(page)
        self.again = len(failed) + sum(map(int, _AGAIN.findall(page)))
        return failed

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
        if self.again:
            lines += ["", f"Run again by `--again`, after they had failed and were mended: {self.again} of the tests."]
        return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the short form")
    parser.add_argument("--smoke", action="store_true", help="a few faults, and write nothing")
    parser.add_argument("--again", action="store_true", help="run again what failed, after it is mended")
    parser.add_argument("--jobs", type=int, default=1, help="tests side by side")
    args = parser.parse_args()
    os.chdir(ROOT)
    command = f"python benchmarks/reliability.py{' --quick' if args.quick else ''}"
    counts = Counts(None if args.smoke else RESULTS, command)
    chosen = [] if args.quick else ["-m", "", "-k", "not quick"]
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    if args.again:
        tests = counts.go_on(RESULTS.read_text(encoding="utf-8"))
        chosen = ["-m", ""]
        if not tests:
            raise SystemExit("expected a test that failed in benchmarks/results/reliability.md, got none")
    if args.smoke:
        chosen, tests = ["-k", "batch_of_one"], [str(ROOT / "tests" / "nsgd" / "test_faults.py")]
    chosen += ["-n", str(args.jobs)] if args.jobs > 1 else []
    code = pytest.main(["-q", "-p", "no:cacheprovider", *chosen, *tests], plugins=[counts])
    if args.smoke:
        assert counts.times["batches of one"] > 0
        assert "| batches of one |" in counts.text()
        page = counts.text()
        twin = Counts(None)
        assert twin.go_on(page) == []
        twin.finished = True
        assert twin.text() == page
    sys.exit(int(code))


if __name__ == "__main__":
    main()
