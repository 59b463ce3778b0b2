"""How the `nsgd` command ends: exit codes, signals, pipes that nobody reads, and what is there before any import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch

from lightning_modules.commands import compare, escape
from lightning_modules.commands.main import main
from lightning_modules.study.runs.workers import Workers
from lightning_modules.support.files import read_csv

NSGD = [sys.executable, "-m", "lightning_modules"]


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nsgd {version('nsgd')}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"]])
def test_a_reader_that_goes_early_ends_it_quietly(tmp_path, args, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)  # nobody reads, as when head has ended
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(
        [*NSGD, *args], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, check=False
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_a_study_with_its_code_and_one_line(capsys, monkeypatch, sent, code, said):
    monkeypatch.setattr(escape, "run_escape", lambda *_: signal.raise_signal(sent))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["escape"]) == code
    assert capsys.readouterr().err == f"nsgd: {said}; the same command keeps the finished runs and goes on\n"
    assert signal.getsignal(signal.SIGTERM) is before


class Dropping:
    """An exception in a destructor is dropped, and SIGTERM may come there as anywhere."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("then", ["goes on", "returns", "raises", "exits"])
def test_a_signal_that_python_drops_ends_a_command_at_its_next_step_or_at_its_end(capsys, monkeypatch, then):
    seen: list[str] = []

    def run(study: Any, out: Any, progress: Any) -> None:
        def made() -> None:
            Dropping()

        made()
        seen.append("dropped")
        if then == "goes on":
            progress("a step", 1, 2, None)
            seen.append("went on")
        if then == "raises":
            raise AssertionError
        if then == "exits":
            raise SystemExit(0)  # as Lightning's loop does

    monkeypatch.setattr(escape, "run_escape", run)
    monkeypatch.setattr(escape, "write_escape", lambda out: seen.append("reported"))
    monkeypatch.setattr(escape, "print_escape", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["escape"]) == 143
    assert seen == ["dropped"] + (["reported"] if then == "returns" else [])
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "nsgd: ended by SIGTERM; the same command keeps the finished runs and goes on"
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(["--version"]) == 0  # the next one knows nothing of it


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_a_dropped_signal_ends_is_unfinished_and_the_same_command_goes_on(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = ["compare", "--data.limit", "300", "--data.batch_size", "50", "--epochs", "2", "--seeds", "1"]
    command += ["--lr", "0.2", "--methods", "[sgd,sgd-momentum]"]
    assert main([*command, "--out", "whole"]) == 0
    step = torch.optim.SGD.step
    steps: list[int] = []

    def stepping(self: Any, closure: Any = None) -> Any:
        steps.append(0)
        if len(steps) == at:
            Dropping()
        return step(self, closure)

    for at, finished in ((20, 0), (27, 1)):  # of 2 x 8 timed ones, and 8 of each run
        steps.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.SGD, "step", stepping)
            assert main([*command, "--out", f"cut-{at}"]) == 143
        assert len(steps) == at, "it went on"
        out = tmp_path / f"cut-{at}"
        assert len(list(out.rglob("runs/*/results.csv"))) == finished
        assert list(out.rglob("failed.txt")) == []
        assert main([*command, "--out", str(out)]) == 0
        assert read_csv(out / "results.csv") == read_csv(tmp_path / "whole" / "results.csv")


FIT = [
    *(
        "fit",
        "--optimizer",
        "torch.optim.SGD",
        "--optimizer.lr",
        "0.1",
        "--data.batch_size",
        "50",
        "--data.limit",
        "600",
    ),
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
RUN = [
    *("compare", "--run", "0", "--data.limit", "300", "--data.batch_size", "50", "--epochs", "2", "--seeds", "1"),
    *("--lr", "0.2", "--methods", "[sgd]", "--out", "out"),
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    ("command", "again"),
    [(FIT, ""), (RUN, "; the same command keeps the finished runs and goes on")],
    ids=["fit", "compare --run"],
)
def test_a_signal_in_a_step_ends_it_there_with_its_code_and_one_line(
    capsys, monkeypatch, tmp_path, command, again, dropped
):
    monkeypatch.chdir(tmp_path)
    step = torch.optim.SGD.step
    steps: list[int] = []

    def stepping(self: Any, closure: Any = None) -> Any:
        steps.append(0)
        if len(steps) == 5:
            Dropping() if dropped else signal.raise_signal(signal.SIGTERM)
        return step(self, closure)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.SGD, "step", stepping)
        assert main(command) == 143
    assert len(steps) == 5, "it went on"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nsgd:") or not dropped]
    assert said == [f"nsgd: ended by SIGTERM{again}"]
    assert signal.getsignal(signal.SIGTERM) is before
    if command is RUN:
        assert list(tmp_path.rglob("results.csv")) == list(tmp_path.rglob("failed.txt")) == []
        assert main(command) == 0
        assert len(list(tmp_path.rglob("results.csv"))) == 1


def test_the_processes_of_a_study_end_with_it(capsys, monkeypatch):
    code = "import os, time; input(); print(f'[{os.getpid()}, 0.5, null]', flush=True); time.sleep(600)"
    worker = [sys.executable, "-c", code]
    seen: list[int] = []

    def on_step(number: int, step: int, loss: float) -> None:
        seen.append(step)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def run_study(*_: Any, **__: Any) -> None:
        with Workers(worker, jobs=2, on_step=on_step) as workers:
            list(workers.make([0, 1]))

    monkeypatch.setattr(compare, "run_study", run_study)
    assert main(["compare"]) == 143
    assert "nsgd: ended by SIGTERM" in capsys.readouterr().err
    assert len(seen) == 2
    for process in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_terminal_hears_of_the_imports_before_they_begin(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)\n")
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}  # as if it were a terminal, to rich
    ended = subprocess.run([*NSGD, "fit"], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 7
    assert "importing torch and Lightning" in ended.stderr


@pytest.mark.parametrize("command", ["fit", "test", "compare", "escape"])
def test_dashes_alone_are_no_value(capsys, command):
    assert main([command, "--config=--"]) == 2
    assert capsys.readouterr().err == "nsgd: expected a value after --config, got --; give another\n"


def test_a_name_that_is_too_long_for_a_file_is_said(capsys):
    assert main(["escape", "--out", "x" * 3000]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nsgd: expected a path that can be read and written, got {'x' * 3000}")
    assert said.endswith(" (File name too long); give another\n")
