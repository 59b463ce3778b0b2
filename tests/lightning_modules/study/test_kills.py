"""Commands that are ended at random moments, started again, and end with the results of a run that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from studies import without_seconds
from test_launch import gone

pytestmark = pytest.mark.slow

DATA = ["--data", "Digits", "--data.limit", "300", "--data.batch_size", "50"]
TIMES = {signal.SIGKILL: 20, signal.SIGTERM: 10}


def compare(folder: Path, jobs: int) -> list[str]:
    study = ["--methods", "[sgd,nsgd]", "--seeds", "2", "--epochs", "40", "--lr", "0.2", "--net", "mlp"]
    nsgd = ["--nsgd.solver", "gradients", "--nsgd.refresh_every", "3", "--nsgd.k", "3", "--nsgd.samples", "16"]
    return ["compare", *DATA, *study, *nsgd, "--jobs", str(jobs), "--out", str(folder)]


def fit(folder: Path) -> list[str]:
    nsgd = ["--optimizer", "NSGD", "--optimizer.lr", "0.1", "--optimizer.momentum", "0.9", "--optimizer.k", "3"]
    source = ["--optimizer.solver", "gradients", "--optimizer.refresh_every", "3"]
    trainer = ["--trainer.max_epochs", "60", "--trainer.logger.save_dir", str(folder), "--seed_everything", "0"]
    saved = sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    last = ["--ckpt_path", str(saved[-1])] if saved else []
    return ["fit", *DATA, *nsgd, *source, *trainer, "--trainer.enable_progress_bar", "false", *last]


def start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = [sys.executable, "-m", "lightning_modules", *command]
    return subprocess.Popen(run, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def whole(command: list[str]) -> float:
    """Let a command run to its end; the seconds that it took."""
    begun = time.monotonic()
    process = start(command)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said.decode()
    return time.monotonic() - begun


def results(folder: Path) -> dict[str, Any]:
    """What a study found: of its tables those that hold no seconds, or are without them."""
    found = without_seconds(folder)
    return {name: text for name, text in found.items() if name == "results.csv" or name.startswith("runs/")}


def weights(folder: Path) -> dict[str, Any]:
    """What a fit ends with."""
    last = max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    saved = torch.load(last, weights_only=True)
    tensors = {**saved["state_dict"], "step": torch.tensor(saved["global_step"])}
    for i, state in saved["optimizer_states"][0]["state"].items():
        tensors.update({f"{i}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)})
    return {name: (value.dtype, value.numpy().tobytes()) for name, value in tensors.items()}


def disturb(
    command: Callable[[Path], list[str]], found: Callable[[Path], Any], folder: Path, sent: signal.Signals
) -> int:
    """End a command at random moments of its time, and start it again; the number of folders that it finished.

    Each is compared with that of a command that nobody ended.
    """
    rng, finished, ended = random.Random(f"{folder.name} {sent}"), 0, 0
    seconds = whole(command(folder / "whole"))
    expected = found(folder / "whole")
    while True:
        out = folder / str(finished)
        if ended == TIMES[sent]:
            whole(command(out))
        else:
            process = start(command(out))
            try:
                _, said = process.communicate(timeout=rng.uniform(0.2, 1.0) * seconds)
                assert process.returncode == 0, said.decode()
            except subprocess.TimeoutExpired:
                process.send_signal(sent)
                process.communicate(timeout=120)
                ended += 1
                gone(str(out))
                continue
        assert found(out) == expected
        finished += 1
        if ended == TIMES[sent]:
            return finished


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=lambda sent: sent.name)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_that_is_ended_again_and_again_has_the_results_of_one_that_was_not(
    tmp_path, record_property, jobs, sent
):
    record_property(f"reliability: {sent.name} to nsgd compare --jobs {jobs}", TIMES[sent])
    finished = disturb(lambda out: compare(out, jobs), results, tmp_path, sent)
    record_property("reliability: studies finished after that", finished)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_fit_that_is_ended_again_and_again_has_the_weights_of_one_that_was_not(tmp_path, record_property, sent):
    """It goes on from the last checkpoint, of the end of an epoch."""
    record_property(f"reliability: {sent.name} to nsgd fit", TIMES[sent])
    finished = disturb(fit, weights, tmp_path, sent)
    record_property("reliability: fits finished after that", finished)
