"""What a study takes for itself of the process that it runs in, given back."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nsgd.curvature.guard import RandomState

_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # in which Lightning keeps the seed for processes that it starts


@contextmanager
def as_found() -> Iterator[None]:
    """Leave torch's threads, the global seed and random state, and levels of logging as found, also after an exception.

    The random state is that of torch, on the CPU and on GPUs, of Python and of NumPy. As a decorator it
    holds for every call.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = range(torch.cuda.device_count()) if in_use else []
    mps = torch.device("mps") if torch.backends.mps.is_available() else None
    threads, random_state = torch.get_num_threads(), RandomState(mps)
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    levels = {logger: logger.level for logger in (logging.root, *_loggers())}
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        random_state.restore()
        if not in_use and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(torch.initial_seed())  # as a generator would have begun that nobody had used
        torch.set_num_threads(threads)


def _loggers() -> list[logging.Logger]:
    """Those that exist; a name may also stand for the loggers below it alone."""
    return [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
