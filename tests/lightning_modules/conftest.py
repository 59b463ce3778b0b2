"""What every test of lightning_modules runs in: one thread, a private Hugging Face cache, no network, no chatter."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure

from lightning_modules.report import drawing


@pytest.fixture(scope="session", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Before anything imports `datasets`, which reads these once."""
    home = tmp_path_factory.mktemp("huggingface")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        yield


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Give back threads, random state, the seeds that Lightning leaves in the environment, and its log level."""
    threads, state, python, numpy = (
        torch.get_num_threads(),
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
    )
    seeds = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    yield
    lightning.setLevel(level)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    random.setstate(python)
    np.random.set_state(numpy)
    for name, value in seeds.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _plain_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a short study's seconds: fixtures of modules do it, and tests that are marked so."""
    if request.node.get_closest_marker("draws"):
        return
    nothing = drawing.Drawn([drawing.Panel("a panel", "0 0 1 1", "", None, "", [])], [])
    monkeypatch.setattr(drawing, "lay_out", lambda figure: None)
    monkeypatch.setattr(drawing, "draw", lambda figure, heading, prefix: nothing)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"a figure"))


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """A silent trainer on the CPU that writes nothing of its own accord."""

    def make(**options: Any) -> pl.Trainer:
        silent = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**{**silent, **options})

    return make


@pytest.fixture
def random_state() -> Callable[[], list[Any]]:
    """Random state of torch, Python and NumPy, comparable by equality."""

    def read() -> list[Any]:
        name, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]

    return read
