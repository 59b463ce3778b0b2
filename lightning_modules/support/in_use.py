"""A folder that one process works in, and no other beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is held
    fcntl = None  # type: ignore[assignment]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder while the context lasts, or this process; where a file system has no locks, it is not held.

    It leaves no file. A process that is killed holds nothing.

    Raises:
        ValueError: If another holds it.
    """
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use: another process makes this study; wait for its end, and give the same command "
                "again, or choose another folder with --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(number)
