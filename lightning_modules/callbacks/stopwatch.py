"""Seconds of training, on a device that may be behind the host, and without what is no part of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsgd.directions.pace import now, seconds


class Stopwatch:
    """Counts from when it is made, but for its pauses; nothing waits for the device before :meth:`seconds`.

    On the CPU by the clock, elsewhere by events in the device's stream.

    Args:
        device: What is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = now(device)
        self._depth, self._paused_at = 0, self._began
        self._pauses: deque[tuple[Any, Any]] = deque()  # begin and end of those that no mark has passed
        self._number, self._passed, self._paused = 0, 0, 0.0  # pauses so far, those of the last mark, their seconds

    def pause(self) -> None:
        """What comes is no part of training; a pause within a pause changes nothing."""
        if not self._depth:
            self._paused_at = now(self._device)
        self._depth += 1

    def resume(self) -> None:
        """Go on after a pause."""
        self._depth -= 1
        if not self._depth:
            self._pauses.append((self._paused_at, now(self._device)))
            self._number += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of training."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def mark(self) -> tuple[Any, int]:
        """This moment, to be read later."""
        return now(self._device), self._number

    def seconds(self, mark: tuple[Any, int]) -> float:
        """What the watch showed at a mark; of several, the earlier are read first. Waits for the device to be there."""
        at, number = mark
        if hasattr(at, "synchronize"):
            at.synchronize()
        while self._passed < number:
            self._paused += seconds(*self._pauses.popleft())
            self._passed += 1
        return seconds(self._began, at) - self._paused
