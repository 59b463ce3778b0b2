"""A study whose runs are made in other processes: side by side, killed, resumed, on Ray."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from studies import finished, silent, study, without_seconds

from lightning_modules.study import compare
from lightning_modules.study.compare import run_study, seconds_side_by_side
from lightning_modules.study.runs import train
from lightning_modules.study.runs.plan import plan_runs
from lightning_modules.support.as_found import as_found
from lightning_modules.support.files import read_csv
from lightning_modules.support.study_folder import Document, StudyFolder


def test_runs_side_by_side_give_the_files_of_runs_one_after_the_other(tmp_path):
    seen: list[Any] = []
    workers: set[int] = set()

    def progress(*call: Any) -> None:
        seen.append(call)
        workers.update(processes(str(tmp_path / "two")))

    chosen = study(methods=["sgd", "nsgd", "sgd-more"], tune=1, lr=None)
    died = run_study(chosen, tmp_path / "two", progress, jobs=2)
    assert died == []
    assert len(workers) == 2  # as many as jobs, however many runs
    assert processes(str(tmp_path / "two")) == []
    finished(tmp_path / "one", methods=["sgd", "nsgd", "sgd-more"], tune=1, lr=None)
    assert without_seconds(tmp_path / "two") == without_seconds(tmp_path / "one")
    assert (tmp_path / "two" / "results.csv").read_bytes() == (tmp_path / "one" / "results.csv").read_bytes()
    assert seen[-1][1] == seen[-1][2]
    assert any(said and said.startswith("loss ") for *_, said in seen)  # from the other processes


def test_a_worker_makes_a_few_steps_of_each_method_before_its_first_run(tmp_path, monkeypatch, random_state):
    """They count nowhere, and random state is as found; where they die, the run is made all the same."""
    chosen = study(methods=["sgd", "nsgd"], seeds=2, epochs=1)
    runs = {run.name.split("/")[-1]: run for run in plan_runs(chosen)}
    happened: list[Any] = []

    def warm_up(subject: Any, folder: Any, method: str) -> None:
        happened.append(("warm-up", method, train.warm_up(subject, folder, method).rows[-1]["step"]))
        if method == "nsgd":
            raise ZeroDivisionError

    def make_run(subject: Any, folder: Any, run: Any, on_step: Any) -> None:
        happened.append(("run", run.name.split("/")[-1], random_state() == before))
        train.make_run(subject, folder, run, on_step)

    def serve(make: Any) -> None:
        nonlocal before
        for name in ("sgd-0", "nsgd-0", "sgd-1", "nsgd-1"):
            before = random_state()
            make(runs[name].number, lambda step, loss: told.append(step))

    before: Any = None
    told: list[int] = []
    for name, function in (("warm_up", warm_up), ("make_run", make_run), ("serve", serve)):
        monkeypatch.setattr(compare, name, function)
    with as_found():
        compare.serve_runs(chosen, tmp_path / "out")
    assert happened == [
        ("warm-up", "sgd", 8),
        ("run", "sgd-0", True),
        ("warm-up", "nsgd", 8),
        ("run", "nsgd-0", True),
        ("run", "sgd-1", True),
        ("run", "nsgd-1", True),
    ]
    assert told == [1, 2, 3, 4] * 4
    monkeypatch.undo()
    whole = finished(tmp_path / "one", methods=["sgd", "nsgd"], seeds=2, epochs=1)
    assert without_seconds(tmp_path / "out" / "runs") == without_seconds(whole / "runs")


def processes(marker: str) -> list[int]:
    """Those with a marker in their command line; one that has ended, and is not waited for, has none."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended just now
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def gone(marker: str) -> None:
    """Wait until no process has the marker, and fail after some seconds."""
    deadline = time.monotonic() + 20
    while left := processes(marker):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from studies import silent, study
from lightning_modules.study.compare import run_study
chosen = study(methods=["sgd", "nsgd"], tune=1, lr=None, seeds=3, epochs=10)
run_study(chosen, Path(sys.argv[1]), silent, jobs=int(sys.argv[2]))
"""


def test_runs_that_start_at_the_same_time_claim_one_folder(tmp_path):
    """As on a cluster, where nobody comes first."""
    config: dict[Document, dict[str, int]] = {"config": {"a": 1}}
    with ThreadPoolExecutor(8) as pool:
        for i in range(20):
            folder = StudyFolder(tmp_path / str(i))
            list(pool.map(lambda _, to=folder: to.claim(config, packages=("numpy",)), range(8)))
    assert {path.name for path in tmp_path.glob("*/*")} == {"config.yaml", "environment.yaml"}


def test_of_two_studies_that_claim_one_folder_at_once_one_is_refused(tmp_path):
    """Whatever the moment, the folder holds one of them whole."""
    documents = [{"config": {"a": i, "b": 1}, "methods": {"c": i}} for i in (1, 2)]
    refused: list[str] = []

    def claimed(number: int, folder: StudyFolder) -> bool:
        try:
            folder.claim(documents[number], packages=("numpy",))  # type: ignore[arg-type]
        except ValueError as error:
            refused.append(str(error))
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        for i in range(40):
            folder = StudyFolder(tmp_path / str(i))
            won = list(pool.map(claimed, (0, 1), (folder, folder)))
            assert sorted(won) == [False, True]
            winner = documents[won.index(True)]
            assert {name: folder.document(name) for name in winner} == winner  # type: ignore[arg-type]
    assert all("holds another study: a was" in words for words in refused)


TOGETHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from studies import silent, study
from lightning_modules.study.compare import run_study
print("ready", flush=True)
sys.stdin.readline()
try:
    run_study(study(epochs=int(sys.argv[3])), Path(sys.argv[1]), silent)
except ValueError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize(
    "epochs",
    [pytest.param((20, 20), id="the same study", marks=pytest.mark.slow), pytest.param((20, 10), id="two studies")],
)
def test_two_studies_begun_on_one_folder_at_once_leave_one_whole(tmp_path, epochs):
    """The second is refused in a sentence, or, where the first had ended by then, finds all runs made."""
    command = [sys.executable, "-c", TOGETHER, str(tmp_path / "out"), str(Path(__file__).parents[1])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(count)], **pipes) for count in epochs]
    for process in both:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0] for process in both]
    codes = [process.returncode for process in both]
    first = codes.index(0)
    assert codes[1 - first] in ((0, 2) if epochs[0] == epochs[1] else (2,))
    if codes[1 - first] == 2:
        assert "is in use: another process makes this study" in said[1 - first] or "another study" in said[1 - first]
    whole = finished(tmp_path / "whole", epochs=epochs[first])
    assert without_seconds(tmp_path / "out") == without_seconds(whole)


def test_a_folder_is_free_again_once_a_study_has_ended_however(tmp_path):
    class Ended(BaseException):
        pass

    def broken(*_: Any) -> None:
        with pytest.raises(ValueError, match="is in use: another process makes this study; wait for its end"):
            run_study(study(epochs=1), tmp_path / "out", silent)
        raise Ended

    with pytest.raises(Ended):
        run_study(study(epochs=1), tmp_path / "out", broken)
    assert run_study(study(epochs=1), tmp_path / "out", silent) == []


@pytest.mark.parametrize(
    ("jobs", "times"), [(2, 1), *(pytest.param(jobs, 3, marks=pytest.mark.slow) for jobs in (1, 2))]
)
def test_a_study_that_is_killed_ends_with_the_results_of_one_that_was_not(tmp_path, jobs, times):
    options: dict[str, Any] = {"methods": ["sgd", "nsgd"], "tune": 1, "lr": None, "seeds": 3, "epochs": 10}
    whole, folder = finished(tmp_path / "whole", **options), tmp_path / "killed"
    rng = random.Random(jobs)
    kills = 0
    for _ in range(times):
        here = str(Path(__file__).parents[1])
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(jobs), here], start_new_session=True)
        done = len(list(folder.rglob("results.csv")))
        deadline = time.monotonic() + 60  # whatever it has done by then
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(folder.rglob("results.csv"))) > done:
                time.sleep(rng.random() / 20)  # much less than a run takes, or the study ends before it is killed
                break
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)  # the study alone: its workers end by themselves
            kills += 1
        process.wait()
        gone(str(folder.resolve()))
    assert kills >= (times + 1) // 2
    run_study(study(**options), folder, silent)
    assert (folder / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert without_seconds(folder) == without_seconds(whole)


@pytest.mark.parametrize(
    "sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)  # SIGKILL: above
def test_a_study_that_is_ended_leaves_no_process(tmp_path, sent):
    here = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "out"), "2", here], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("run.yaml")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [pid for pid in processes(str(tmp_path / "out")) if pid != process.pid]
    process.send_signal(sent)
    assert process.wait(timeout=60) != 0
    gone(str(tmp_path / "out"))
    assert workers


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        pytest.param(signal.SIGKILL, "ended by signal 9", id="SIGKILL"),
        pytest.param(signal.SIGTERM, "nsgd: ended by SIGTERM", id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_is_killed_takes_one_run_with_it_which_is_tried_again(tmp_path, sent, words):
    killed: list[int] = []
    said: list[str] = []

    def progress(*_: Any) -> None:
        if not killed:
            killed.append(processes(str(tmp_path / "two"))[0])
            os.kill(killed[0], sent)

    options: dict[str, Any] = {"methods": ["sgd", "nsgd"], "seeds": 2, "epochs": 10}
    assert run_study(study(**options), tmp_path / "two", progress, jobs=2, say=said.append) == []
    assert [line.partition(" died, it is tried once more: ")[2] for line in said[1:]] == [words]
    assert without_seconds(tmp_path / "two") == without_seconds(finished(tmp_path / "one", **options))


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({"jobs": 2, "cores": 2, "start": 5.0}, (60 + 10) / 2),
        ({"jobs": 4, "cores": 2, "start": 5.0}, (60 + 20) / 2),  # four share two cores
        ({"jobs": 4, "cores": 8, "start": 5.0, "runs": 2}, (60 + 10) / 2),  # no more workers than runs
        ({"jobs": 2, "cores": 0, "start": 0.0}, 60.0),  # fewer cores than one run has threads
    ],
)
def test_workers_share_cores_and_each_starts_once(options, seconds):
    assert seconds_side_by_side(60.0, options.pop("runs", 12), **options) == seconds


def test_jobs_that_take_longer_are_said_to(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "predicted_seconds", lambda *_: 4.0)
    monkeypatch.setattr(compare, "_cores", lambda: 2)
    words: dict[float, str] = {}
    for start in (1.0, 8.0):
        monkeypatch.setattr(compare.time, "process_time", lambda start=start: start)

        def said(sentence: str, start: float = start) -> NoReturn:
            words[start] = sentence
            raise KeyboardInterrupt  # before any worker starts

        with pytest.raises(KeyboardInterrupt):
            run_study(study(methods=["sgd"], epochs=1), tmp_path / str(start), silent, jobs=2, say=said)
    assert words[1.0] == "2 runs to make, 2 at a time: about 3 seconds"
    assert words[8.0] == "2 runs to make, 2 at a time: about 10 seconds; --jobs 1 takes less, about 4 seconds"


def test_a_study_on_ray_gives_the_same_files(tmp_path):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert run_study(study(seeds=1), tmp_path / "ray", silent, launcher="ray") == []
    finally:
        ray.shutdown()
    assert without_seconds(tmp_path / "ray") == without_seconds(finished(tmp_path / "one", seeds=1))
    assert len(read_csv(tmp_path / "ray" / "results.csv")) == 8


def test_ray_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--launcher ray needs the extra: pip install 'nsgd\[ray\]'"):
        run_study(study(), tmp_path, silent, launcher="ray")
