"""The study behind ``nsgd compare``: methods x seeds x read-outs, tuned alike, with paired statistics.

Every method starts from the same weights and sees the same batches for the same seed, so differences are paired.
Work is counted in gradients (forward and backward passes on a training batch), refreshes included.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.study.options import Study
from lightning_modules.study.runs.check import check_study
from lightning_modules.study.runs.launch import Launcher, launch_on_ray
from lightning_modules.study.runs.plan import (
    Run,
    check_trials,
    decide,
    has_trial,
    plan_runs,
    runs_left,
    settle,
    steps_of,
)
from lightning_modules.study.runs.subject import Subject
from lightning_modules.study.runs.tables import write_tables
from lightning_modules.study.runs.train import OnStep, make_run, predicted_seconds, rehearse_method, warm_up
from lightning_modules.study.runs.workers import Workers, serve
from lightning_modules.support.as_found import as_found
from lightning_modules.support.in_use import held
from lightning_modules.support.progress import Update
from lightning_modules.support.study_folder import Document, StudyFolder
from lightning_modules.support.whole_files import unwritable

_Ends = Generator[tuple[int, str | None]]  # numbers of runs as they end, with what was said where one died

_UNMEASURED = {"measure_samples": None, "measure_overhead": 0.15}
_PACKAGES = ("nsgd", "torch", "pytorch-lightning", "numpy", "scipy", "scikit-learn")


def claim(study: Study, out: Path) -> tuple[Subject, StudyFolder]:
    """Check a study, and make a folder its own.

    Returns:
        What the study trains, and its folder.

    Raises:
        ValueError: If the study cannot run, or the folder holds another study; nothing is written then.
    """
    subject, folder = Subject(study), StudyFolder(out)
    check_study(subject)
    _claim_folder(subject, folder)
    check_trials(study, folder)
    return subject, folder


def _claim_folder(subject: Subject, folder: StudyFolder) -> None:
    config = yaml.safe_load(yaml.safe_dump(subject.resolved()))
    methods = subject.study.described_methods()
    # What folders of before do not say was so.
    unsaid: dict[str, dict[str, Any]] = {
        "config": {"endpoint": subject.main_score, "precision": "32-true", "averages": [], **_UNMEASURED},
        "methods": {name: {"damping": options["damping"]} for name, options in methods.items()},
    }
    documents: dict[Document, Any] = {"config": config, "methods": methods}
    folder.claim(documents, unsaid=unsaid, packages=_PACKAGES, device=subject.devices.name)


@as_found()
def run_one(study: Study, out: Path, number: int, progress: Update) -> str:
    """Make one run of a study, whatever becomes of the others; returns its name.

    Raises:
        ValueError: If there is no such run, or it needs others first.
    """
    runs = plan_runs(study)
    if not 0 <= number < len(runs):
        raise ValueError(f"expected --run to be from 0 to {len(runs) - 1}, the runs of this study, got {number}")
    subject, folder = claim(study, out)
    run = runs[number]
    if not folder.run(run.name).finished:
        steps = steps_of(subject, folder, run)
        make_run(subject, folder, run, lambda step, loss: progress(run.name, step, steps, f"loss {loss:.3f}"))
    return run.name


@as_found()
def run_study(
    study: Study,
    out: Path,
    progress: Update,
    *,
    jobs: int = 1,
    launcher: Launcher = "local",
    say: Callable[[str], None] = lambda words: None,
) -> list[str]:
    """Make the runs that are not finished yet, and write results.csv, summary.csv and the other tables into a folder.

    A run that dies is tried once more; one that dies again is left out of every table, and counts as a miss where a
    target was to be reached. Starting again makes the runs that are missing. How often a method refreshes its
    directions, where its options leave that to the clock, is measured once before its runs and kept in ``rehearsals``:
    with a copy of that and of config.yaml, another folder holds the same study. Torch's threads, the global seed and
    random state, and levels of logging are as found afterwards.

    Args:
        study: The study.
        out: Its folder.
        progress: Called as the runs go on.
        jobs: Runs at a time; where there is more than one, in as many processes that take one run after the other.
        launcher: "local", or "ray" for tasks of a Ray cluster.
        say: Called with the predicted time, before anything runs, and with every death.

    Returns:
        Names of the runs that died twice.

    Raises:
        ValueError: If the study cannot run, or the folder holds another study, and nothing is written then; if another
            process makes this study there; if no run of the study survived.
    """
    if jobs < 1:
        raise ValueError(f"expected --jobs of at least 1, got {jobs}")
    began = time.process_time()  # what it took to come here each other process takes too
    subject, folder = claim(study, out)
    with held(folder.path):
        plan = plan_runs(study)
        left = runs_left(folder, plan)
        for method in dict.fromkeys(run.method for run in left):
            with suppress(Exception):  # of a module of the user's: the run that meets it dies, and says so
                rehearse_method(subject, folder, method)
        if left:
            start = began if jobs > 1 or launcher != "local" else 0.0
            say(_forecast(subject, folder, left, jobs, launcher, start))
        counted = _Counter(
            subject, folder, [run for run in plan if run in left or folder.run(run.name).finished], progress
        )
        with _maker(subject, folder, counted, jobs, launcher) as make:
            while wave := [run for run in left if not set(run.needs) & {other.number for other in left}]:
                left = [run for run in left if run not in wave]
                for run in wave:
                    decide(study, folder, run)  # at once, and before the first run that goes by it
                for run in (run for run in wave if not has_trial(folder, run)):
                    counted.end(run)
                wave = [run for run in wave if has_trial(folder, run)]
                for attempt in (1, 2):
                    wave = list(_attempt(make, folder, wave, counted, attempt, say))
        settle(study, folder)
        return write_tables(study, folder, plan)


def serve_runs(study: Study, out: Path, watched: Callable[[OnStep], OnStep] = lambda on_step: on_step) -> None:
    """Make the runs of a study whose numbers come on standard input, as one of several workers; see ``workers``.

    Before the first run of a method, a few steps of it are made that count nowhere. Otherwise this run alone would pay
    for what a process does once; runs in one process have had theirs when their time was predicted.

    Args:
        study: The study.
        out: Its folder.
        watched: Makes, of what is called after each step, what may also end the process there.

    Raises:
        ValueError: If the folder holds another study.
    """
    subject, folder, plan = Subject(study), StudyFolder(out), plan_runs(study)
    _claim_folder(subject, folder)
    warm: set[str] = set()

    def make(number: int, on_step: OnStep) -> None:
        method = plan[number].method
        if method not in warm:
            warm.add(method)
            with as_found(), suppress(Exception):  # of a module of the user's: the run dies as well, and says so
                warm_up(subject, folder, method)
        make_run(subject, folder, plan[number], watched(on_step))

    serve(make)


@contextmanager
def _maker(
    subject: Subject, folder: StudyFolder, counted: _Counter, jobs: int, launcher: Launcher
) -> Iterator[Callable[[Sequence[Run]], _Ends]]:
    """What makes runs: this process, workers, or a Ray cluster."""
    if launcher == "ray":
        threads, gpus = subject.study.threads, int(subject.devices.accelerator == "cuda")
        yield lambda wave: launch_on_ray(
            {run.number: command_of(subject, folder, run) for run in wave}, threads=threads, gpus=gpus
        )
    elif jobs == 1:
        yield lambda wave: _in_this_process(subject, folder, wave, counted)
    else:
        command, places = _command(subject, folder, "--worker"), subject.devices.places
        with Workers(command, jobs=jobs, on_step=counted.on_step, places=places) as workers:
            yield lambda wave: workers.make(run.number for run in wave)


def _attempt(
    make: Callable[[Sequence[Run]], _Ends],
    folder: StudyFolder,
    wave: Sequence[Run],
    counted: _Counter,
    attempt: int,
    say: Callable[[str], None],
) -> Iterator[Run]:
    """Make runs, and yield those that died."""
    by_number = {run.number: run for run in wave}
    with closing(make(wave)) as ends:
        for number, words in ends:
            run = by_number[number]
            if words is None:
                counted.end(run)
                continue
            again = "it is tried once more" if attempt == 1 else "it is left out"
            say(f"{run.name} died, {again}: {words.strip().splitlines()[-1]}")
            if attempt == 2:
                folder.run(run.name).fail(words)
                counted.end(run)
            yield run


def _in_this_process(subject: Subject, folder: StudyFolder, wave: Sequence[Run], counted: _Counter) -> _Ends:
    for run in wave:
        try:
            make_run(subject, folder, run, partial(counted.on_step, run.number))
            yield run.number, None
        except Exception as error:  # the others go on: it is said, kept in failed.txt, and never a success
            if unwritable(error):  # which no run is to blame for, and the others would meet
                raise
            yield run.number, traceback.format_exc()


def command_of(subject: Subject, folder: StudyFolder, run: Run) -> list[str]:
    """The command line of one run, that another machine with the same folder understands as well."""
    return _command(subject, folder, "--run", str(run.number))


def _command(subject: Subject, folder: StudyFolder, *options: str) -> list[str]:
    config, out = str(folder.file("config").resolve()), str(folder.path.resolve())
    accelerator = ["--accelerator", subject.devices.accelerator]  # not what "auto" might find there
    return [sys.executable, "-m", "lightning_modules", "compare", config, "--out", out, *accelerator, *options]


def _forecast(
    subject: Subject, folder: StudyFolder, left: Sequence[Run], jobs: int, launcher: Launcher, start: float
) -> str:
    """How long it will take, and where one run at a time would take less, that.

    Args:
        subject: What is trained.
        folder: Of the study.
        left: Runs that are left to make.
        jobs: Runs at a time.
        launcher: Where they are made.
        start: Seconds that a process takes to start.
    """
    where = "on one core of this machine each, one after the other" if launcher == "ray" else f"{jobs} at a time"
    to_make = f"{len(left)} run{'s' if len(left) > 1 else ''} to make, {where}"
    try:
        alone = predicted_seconds(subject, folder, left)
    except Exception as error:  # of a module of the user's: the run that meets it dies, and says so
        return f"{to_make}: no time is predicted, for a first step ended with {type(error).__name__}: {error}"
    if launcher == "ray":
        return f"{to_make}: about {_words(alone + start * len(left))}"
    if jobs == 1:
        return f"{to_make}: about {_words(alone)}"
    cores, devices = _cores() // subject.study.threads, subject.devices
    if devices.accelerator != "cpu":
        cores = min(cores, len(devices.places))
    seconds = seconds_side_by_side(alone, len(left), jobs=jobs, cores=cores, start=start)
    if devices.accelerator != "cpu" and jobs > len(devices.places):  # what sharing one gains is not known beforehand
        return f"{to_make}, on {len(devices.places)} x {devices.name}: at most about {_words(seconds)}"
    less = f"; --jobs 1 takes less, about {_words(alone)}" if alone < seconds else ""
    return f"{to_make}: about {_words(seconds)}{less}"


def seconds_side_by_side(alone: float, runs: int, *, jobs: int, cores: int, start: float) -> float:
    """What runs take in several workers, of which more than there are cores for share these.

    Args:
        alone: Seconds of all runs, one after the other.
        runs: How many there are.
        jobs: Workers.
        cores: Workers that have cores of their own.
        start: Seconds that a worker takes to start, once.
    """
    workers = min(jobs, runs)
    return (alone + start * workers) / max(1, min(workers, cores))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(seconds: float) -> str:
    if seconds > 90:
        return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{round(seconds / 60)} minutes"
    return "a second" if seconds < 1.5 else f"{seconds:.0f} seconds"


class _Counter:
    """Turns the steps of many runs, which may go on side by side, into one progress."""

    def __init__(self, subject: Subject, folder: StudyFolder, plan: Sequence[Run], progress: Update) -> None:
        self._progress, self._plan = progress, {run.number: run for run in plan}
        self._steps = {run.number: steps_of(subject, folder, run) for run in plan}
        self._done = {run.number: self._steps[run.number] if folder.run(run.name).finished else 0 for run in plan}

    def on_step(self, number: int, step: int, loss: float) -> None:
        """Count the steps of a run so far."""
        self._count(number, step, f"loss {loss:.3f}")

    def end(self, run: Run) -> None:
        """Count all steps of a run."""
        self._count(run.number, self._steps[run.number], None)

    def _count(self, number: int, step: int, stands: str | None) -> None:
        self._done[number] = step
        self._steps[number] = max(self._steps[number], step)  # more where it is given another's gradients
        finished = sum(self._done[n] >= self._steps[n] for n in self._steps)
        name = f"run {min(finished + 1, len(self._plan))} of {len(self._plan)}: {self._plan[number].name}"
        self._progress(name, sum(self._done.values()), sum(self._steps.values()), stands)
