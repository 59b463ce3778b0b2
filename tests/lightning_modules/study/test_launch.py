"""Commands in processes of their own, and a study whose runs are such commands: killed, resumed, on Ray."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from studies import finished, silent, study, without_seconds

from lightning_modules.study.compare import run_study
from lightning_modules.study.runs.launch import launch
from lightning_modules.support.files import read_csv
from lightning_modules.support.study_folder import Document, StudyFolder


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def local(commands: dict[int, list[str]], jobs: int = 2) -> tuple[dict[int, str | None], list[tuple[int, str]]]:
    lines: list[tuple[int, str]] = []
    ends = launch(commands, launcher="local", jobs=jobs, threads=1, on_line=lambda n, line: lines.append((n, line)))
    return dict(ends), lines


def test_commands_end_well_or_say_how_they_died():
    killed = "import os, signal; print('so far'); os.kill(os.getpid(), signal.SIGKILL)"
    ends, lines = local({3: python("print('a'); print('b')"), 5: python("raise SystemExit('no')"), 7: python(killed)})
    assert ends[3] is None
    assert [line for n, line in lines if n == 3] == ["a", "b"]
    assert ends[5] == "ended with exit code 1\nno\n"
    assert str(ends[7]).splitlines()[-1] == "ended by signal 9"


def test_no_more_commands_than_jobs_run_at_a_time(tmp_path):
    code = "import time, sys; print(time.time()); time.sleep(0.3); print(time.time())"
    _, lines = local({n: python(code) for n in range(4)}, jobs=2)
    spans = [tuple(float(t) for n, t in lines if n == number) for number in range(4)]
    for begin, _ in spans:
        assert sum(b <= begin < e for b, e in spans) <= 2


def test_what_is_abandoned_is_killed(tmp_path):
    long = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    ends = launch({0: python(""), 1: python(long)}, launcher="local", jobs=2, threads=1, on_line=lambda n, line: None)
    assert next(ends) == (0, None)
    ends.close()
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_runs_side_by_side_give_the_files_of_runs_one_after_the_other(tmp_path):
    seen: list[Any] = []
    chosen = study(methods=["sgd", "nsgd", "sgd-more"], tune=1, lr=None)
    died = run_study(chosen, tmp_path / "two", lambda *call: seen.append(call), jobs=2)
    assert died == []
    finished(tmp_path / "one", methods=["sgd", "nsgd", "sgd-more"], tune=1, lr=None)
    assert without_seconds(tmp_path / "two") == without_seconds(tmp_path / "one")
    assert (tmp_path / "two" / "results.csv").read_bytes() == (tmp_path / "one" / "results.csv").read_bytes()
    assert seen[-1][1] == seen[-1][2]
    assert any(said and said.startswith("loss ") for *_, said in seen)  # from the other processes


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from studies import silent, study
from lightning_modules.study.compare import run_study
chosen = study(methods=["sgd", "nsgd"], tune=1, lr=None, seeds=3, epochs=20)
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


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_killed_five_times_ends_with_the_results_of_one_that_was_not(tmp_path, jobs):
    options: dict[str, Any] = {"methods": ["sgd", "nsgd"], "tune": 1, "lr": None, "seeds": 3, "epochs": 20}
    whole, folder = finished(tmp_path / "whole", **options), tmp_path / "killed"
    rng = random.Random(jobs)
    kills = 0
    for _ in range(5):
        here = str(Path(__file__).parents[1])
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(jobs), here], start_new_session=True)
        done = len(list(folder.rglob("results.csv")))
        deadline = time.monotonic() + 60  # whatever it has done by then
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(folder.rglob("results.csv"))) > done:
                time.sleep(rng.random())
                break
            time.sleep(0.02)
        if process.poll() is None:
            # The study alone: the processes of its runs end by themselves, since nobody reads what they print.
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    run_study(study(**options), folder, silent)
    assert (folder / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert without_seconds(folder) == without_seconds(whole)


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
