"""Workers, with small programs in place of Lightning: what they answer, and how they die."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from lightning_modules.study.runs.workers import Workers

# A worker: `make` is the body of what makes a run.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from lightning_modules.study.runs.workers import serve
print("imported")

def make(number, on_step):
    on_step(1, 0.5)
{body}

serve(make)
"""


def workers(body: str, jobs: int = 2, steps: list[Any] | None = None, **options: Any) -> Workers:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    seen = [] if steps is None else steps
    command = [sys.executable, "-c", PROGRAM.format(body=lines)]
    return Workers(command, jobs=jobs, on_step=lambda *step: seen.append(step), **options)


def test_runs_end_well_or_say_how_they_died_and_the_next_one_is_made():
    body = """
if number == 5:
    raise ZeroDivisionError("as planned")
if number == 6:
    print("so far")
    os.kill(os.getpid(), signal.SIGKILL)
if number == 7:
    raise SystemExit
print('[2, 0.5, null]')  # no word of the worker's
"""
    steps: list[Any] = []
    with workers(body, jobs=1, steps=steps) as pool:
        ends = dict(pool.make([4, 5, 6, 7, 8]))
        assert dict(pool.make([9])) == {9: None}
    assert [number for number, words in ends.items() if words is None] == [4, 8]
    assert str(ends[5]).splitlines()[-1] == "ZeroDivisionError: as planned"
    assert str(ends[6]).splitlines()[-2:] == ["so far", "ended by signal 9"]  # a line of run 4 may come late
    assert str(ends[7]).splitlines()[-1] == "ended before the run did"
    assert steps == [(number, 1, 0.5) for number in range(4, 10)]


def test_a_worker_takes_one_run_after_the_other_and_a_new_one_only_after_a_death(tmp_path):
    body = f"""
with Path({str(tmp_path / "pids")!r}).open("a") as file:
    file.write(f"{{os.getpid()}}\\n")
if number == 2:
    os._exit(3)
"""
    with workers(body, jobs=1) as pool:
        ends = dict(pool.make(range(5)))
        assert dict(pool.make([5])) == {5: None}
    assert str(ends[2]).splitlines()[0] == "ended with exit code 3"
    pids = (tmp_path / "pids").read_text().split()
    assert len(set(pids[:3])) == len(set(pids[3:])) == 1
    assert pids[2] != pids[3]


def test_a_worker_that_dies_while_it_waits_costs_no_run(tmp_path):
    body = f"""
Path({str(tmp_path)!r}, str(os.getpid())).touch()
if number == 0:
    import threading
    threading.Timer(0.1, os._exit, [1]).start()
"""
    with workers(body, jobs=1) as pool:
        assert dict(pool.make([0])) == {0: None}
        time.sleep(1)
        assert dict(pool.make([1])) == {1: None}
    assert len(list(tmp_path.iterdir())) == 2


def test_no_more_runs_than_jobs_are_made_at_a_time(tmp_path):
    body = f"""
began = time.time()
time.sleep(0.3)
Path({str(tmp_path)!r}, str(number)).write_text(f"{{began}} {{time.time()}}")
"""
    with workers(body, jobs=2) as pool:
        assert dict(pool.make(range(6))) == dict.fromkeys(range(6))
    spans = [tuple(map(float, path.read_text().split())) for path in tmp_path.iterdir()]
    assert len(spans) == 6
    assert max(sum(b <= begin < e for b, e in spans) for begin, _ in spans) <= 2


def test_what_is_abandoned_is_killed_with_what_it_started(tmp_path):
    body = f"""
if number == 1:
    import subprocess
    late = "import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / "late")!r}).touch()"
    subprocess.Popen([sys.executable, "-c", late])
    time.sleep(4)
    Path({str(tmp_path / "later")!r}).touch()
"""
    with workers(body, jobs=2) as pool:
        ends = pool.make([0, 1])
        assert next(ends) == (0, None)
        ends.close()
    time.sleep(5)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_starts_no_worker_is_said():
    with Workers([sys.executable, "-c", "raise SystemExit('no')"], jobs=1, on_step=lambda *_: None) as pool:
        assert dict(pool.make([0, 1])) == dict.fromkeys((0, 1), "ended with exit code 1\nno")


def test_a_run_that_reads_its_input_takes_no_numbers():
    body = "assert sys.stdin.read() == ''"
    with workers(body, jobs=1) as pool:
        assert dict(pool.make([0, 1])) == dict.fromkeys((0, 1))


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_losses_that_are_no_numbers_are_heard(loss):
    steps: list[Any] = []
    with workers(f"time.sleep(0.2); on_step(2, float('{loss}'))", jobs=1, steps=steps) as pool:
        assert dict(pool.make([0])) == {0: None}
    assert [(step, str(value)) for _, step, value in steps] == [(1, "0.5"), (2, loss)]


def test_a_killed_worker_is_noticed_though_what_it_forked_lives_on():
    """The child holds the worker's output open, which alone would not end before it does."""
    body = """
if number == 0:
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    began = time.monotonic()
    with workers(body, jobs=1) as pool:
        assert dict(pool.make([0, 1])) == {0: "imported\nended by signal 9", 1: None}
    assert time.monotonic() - began < 30


def test_workers_share_the_places_and_a_new_one_takes_that_of_the_dead(tmp_path):
    body = f"""
Path({str(tmp_path)!r}, str(number)).write_text(os.environ["PLACE"])
if number == 3:
    os._exit(1)
time.sleep(0.5)
"""
    with workers(body, jobs=4, places=[{"PLACE": "a"}, {"PLACE": "b"}]) as pool:
        assert set(dict(pool.make(range(4)))) == {0, 1, 2, 3}
        first = [(tmp_path / str(n)).read_text() for n in range(4)]
        assert sorted(first) == ["a", "a", "b", "b"]
        assert dict(pool.make(range(4, 8))) == dict.fromkeys(range(4, 8))
    assert sorted((tmp_path / str(n)).read_text() for n in range(4, 8)) == ["a", "a", "b", "b"]


def test_no_room_on_a_disk_is_no_runs_fault_and_ends_the_study():
    body = "raise OSError(28, 'No space left on device', 'runs/sgd-0/metrics.csv')"
    with workers(body) as pool, pytest.raises(OSError, match="No space left on device") as caught:
        list(pool.make([1, 2, 3]))
    assert (caught.value.errno, caught.value.filename) == (28, "runs/sgd-0/metrics.csv")


def test_a_folder_that_may_not_be_written_is_no_runs_fault_either():
    body = "raise CannotWrite(13, 'Permission denied', 'runs/sgd-0/metrics.csv')"
    body = f"from lightning_modules.support.whole_files import CannotWrite; {body}"
    with workers(body) as pool, pytest.raises(PermissionError) as caught:
        list(pool.make([1, 2, 3]))
    assert caught.value.filename == "runs/sgd-0/metrics.csv"


def test_what_a_run_may_not_read_is_its_own_fault():
    with workers("raise PermissionError(13, 'Permission denied', '/secret')") as pool:
        ((number, words),) = pool.make([1])
    assert (number, "PermissionError" in words) == (1, True)
