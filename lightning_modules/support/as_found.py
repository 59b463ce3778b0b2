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

    The random state is that of torch, on the CPU and on GPUs that are in use, of Python and of NumPy. As a decorator it
    holds for every call.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    threads, random_state = torch.get_num_threads(), RandomState(None)
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
        torch.set_num_threads(threads)


def _loggers() -> list[logging.Logger]:
    """Those that exist; a name may also stand for the loggers below it alone."""
    return [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
