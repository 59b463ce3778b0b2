"""A limit on the time of a call, for tests that look for calls that hang."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Raises where a call hangs, of this process alone."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"still running after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
