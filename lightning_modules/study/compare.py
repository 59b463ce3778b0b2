"""The study behind ``nsgd compare``: methods x seeds x read-outs, tuned alike, with paired statistics.

Every method starts from the same weights and sees the same batches for the same seed, so differences are paired.
Work is counted in gradients (forward and backward passes on a training batch), refreshes included.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from lightning_modules.study.options import Study
from lightning_modules.study.runs.check import check_study
from lightning_modules.study.runs.launch import Launcher, launch
from lightning_modules.study.runs.plan import Run, plan_runs, settle, steps_of
from lightning_modules.study.runs.subject import Subject
from lightning_modules.study.runs.tables import write_tables
from lightning_modules.study.runs.train import make_run, predicted_seconds, rehearse_method
from lightning_modules.support.as_found import as_found
from lightning_modules.support.progress import Update, read_line
from lightning_modules.support.study_folder import StudyFolder

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
    folder.claim({"config": yaml.safe_load(yaml.safe_dump(study.resolved()))}, packages=_PACKAGES)
    return subject, folder


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
        jobs: Runs at a time, each in a process of its own where there is more than one.
        launcher: "local", or "ray" for tasks of a Ray cluster.
        say: Called with the predicted time, before anything runs, and with every death.

    Returns:
        Names of the runs that died twice.

    Raises:
        ValueError: If the study cannot run, or the folder holds another study, and nothing is written then; if no run
            of the study survived.
    """
    if jobs < 1:
        raise ValueError(f"expected --jobs of at least 1, got {jobs}")
    began = time.process_time()  # what it took to come here each process of its own takes too
    subject, folder = claim(study, out)
    plan = plan_runs(study)
    # Once the settings are settled, a trial could no longer be chosen.
    left = [run for run in plan if not folder.run(run.name).finished and not (folder.settled and run.stage == "tune")]
    for method in dict.fromkeys(run.method for run in left):
        with suppress(Exception):  # of a module of the user's: the run that meets it dies, and says so
            rehearse_method(subject, folder, method)
    if left:
        start = began if jobs > 1 or launcher != "local" else 0.0
        say(_forecast(subject, folder, left, jobs, launcher, start))
    counted = _Counter(subject, folder, plan, progress)
    while wave := [run for run in left if not set(run.needs) & {other.number for other in left}]:
        left = [run for run in left if run not in wave]
        if wave[0].stage != "tune":
            settle(study, folder)  # at once, and before the first run that counts
        for attempt in (1, 2):
            wave = list(_attempt(subject, folder, wave, counted, jobs, launcher, attempt, say))
    settle(study, folder)
    return write_tables(study, folder, plan)


def _attempt(
    subject: Subject,
    folder: StudyFolder,
    wave: Sequence[Run],
    counted: _Counter,
    jobs: int,
    launcher: Launcher,
    attempt: int,
    say: Callable[[str], None],
) -> Iterator[Run]:
    """Make runs, and yield those that died."""
    by_number = {run.number: run for run in wave}
    if jobs == 1 and launcher == "local":
        ended = _in_this_process(subject, folder, wave, counted)
    else:
        commands = {run.number: command_of(folder, run) for run in wave}
        ended = launch(commands, launcher=launcher, jobs=jobs, threads=subject.study.threads, on_line=counted.read)
    for number, said in ended:
        run = by_number[number]
        if said is None:
            counted.end(run)
            continue
        again = "it is tried once more" if attempt == 1 else "it is left out"
        say(f"{run.name} died, {again}: {said.strip().splitlines()[-1]}")
        if attempt == 2:
            folder.run(run.name).fail(said)
            counted.end(run)
        yield run


def _in_this_process(
    subject: Subject, folder: StudyFolder, wave: Sequence[Run], counted: _Counter
) -> Iterator[tuple[int, str | None]]:
    for run in wave:

        def on_step(step: int, loss: float, number: int = run.number) -> None:
            counted.step(number, step, f"loss {loss:.3f}")

        try:
            make_run(subject, folder, run, on_step)
            yield run.number, None
        except Exception:  # whatever it was, the others go on: it is said, kept in failed.txt, and never a success
            yield run.number, traceback.format_exc()


def command_of(folder: StudyFolder, run: Run) -> list[str]:
    """The command line of one run, that another machine with the same folder understands as well."""
    config = str(folder.file("config").resolve())
    return [
        *(sys.executable, "-m", "lightning_modules", "compare", config),
        *("--out", str(folder.path.resolve()), "--run", str(run.number)),
    ]


def _forecast(
    subject: Subject, folder: StudyFolder, left: Sequence[Run], jobs: int, launcher: Launcher, start: float
) -> str:
    where = "on one core of this machine each, one after the other" if launcher == "ray" else f"{jobs} at a time"
    to_make = f"{len(left)} run{'s' if len(left) > 1 else ''} to make, {where}"
    try:
        seconds = predicted_seconds(subject, folder, left) + start * len(left)
    except Exception as error:  # of a module of the user's: the run that meets it dies, and says so
        return f"{to_make}: no time is predicted, for a first step ended with {type(error).__name__}: {error}"
    seconds = max(1.0, seconds / (jobs if launcher == "local" else 1))
    long = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{round(seconds / 60)} minutes"
    return f"{to_make}: about {long if seconds > 90 else 'a second' if seconds < 1.5 else f'{seconds:.0f} seconds'}"


class _Counter:
    """Turns the steps of many runs, which may go on side by side, into one progress."""

    def __init__(self, subject: Subject, folder: StudyFolder, plan: Sequence[Run], progress: Update) -> None:
        self._progress, self._plan = progress, plan
        self._steps = {run.number: steps_of(subject, folder, run) for run in plan}
        self._done = {run.number: self._steps[run.number] if folder.run(run.name).finished else 0 for run in plan}

    def step(self, number: int, step: int, said: str | None) -> None:
        self._done[number] = step
        self._steps[number] = max(self._steps[number], step)  # more where it is given another's gradients
        finished = sum(self._done[n] >= self._steps[n] for n in self._steps)
        name = f"run {min(finished + 1, len(self._plan))} of {len(self._plan)}: {self._plan[number].name}"
        self._progress(name, sum(self._done.values()), sum(self._steps.values()), said)

    def end(self, run: Run) -> None:
        self.step(run.number, self._steps[run.number], None)

    def read(self, number: int, line: str) -> None:
        """Take a line that the process of a run printed."""
        if found := read_line(line):
            self.step(number, *found)
