"""The price of a refresh in seconds of training, measured once, without waiting for the device.

A count of gradients hides what launches and averaging take. So the seconds of refreshes and of steps are noted as they
pass, and when enough are known, the interval at which refreshes cost the wanted share of training is settled.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from nsgd.directions.processes import of_the_first

_LOG = logging.getLogger("nsgd")

# Refreshes and steps that are timed before the interval is settled. The first refresh, which may compile kernels and
# make buffers, is not, nor are the steps up to it.
_REFRESHES, _STEPS = 3, 9
_KEPT = 64  # steps without a refresh that are kept, where refreshes are far apart

_MOST = 10**9  # steps between two refreshes, where the clock is too coarse to see a step


class Pace:
    """Notes when refreshes begin and end, and when steps end, until the interval is settled.

    On the CPU by the clock, elsewhere by events in the device's stream, which tell afterwards how long the device took
    from one to the next, its waits for the host included.
    """

    def __init__(self) -> None:
        self._refreshes: list[tuple[Any, Any, Any, Any]] = []  # begin of the step, of the refresh, and the ends of both
        self._steps: deque[tuple[Any, Any]] = deque(maxlen=_KEPT)  # begin and end of those without a refresh
        self._ended: Any = None  # the last step
        self._refresh: tuple[Any, Any] | None = None  # since then
        self._begun = False  # whether there was a refresh

    def __getstate__(self) -> dict[str, Any]:
        return vars(Pace())  # times are of this process

    @property
    def is_known(self) -> bool:
        """Whether enough has been timed; in a run that is repeated at the same step, whatever the times are."""
        return len(self._refreshes) >= _REFRESHES and len(self._refreshes) + len(self._steps) >= _STEPS

    @contextmanager
    def refresh(self, device: torch.device) -> Iterator[None]:
        """Around a refresh."""
        began = now(device)
        yield
        # Several in one step are one, from the first to the last.
        self._refresh = (began if self._refresh is None else self._refresh[0], now(device))

    def end_step(self, device: torch.device) -> None:
        """Called at the end of every step."""
        began, self._ended = self._ended, now(device)
        refresh, self._refresh = self._refresh, None
        if self._begun and refresh is None:
            self._steps.append((began, self._ended))
        elif self._begun and refresh is not None:
            self._refreshes.append((began, *refresh, self._ended))
        self._begun = self._begun or refresh is not None

    def price(self) -> tuple[float, float]:
        """Seconds of a refresh, and of a step without one, each a median; waits for the device to have come so far."""
        if hasattr(self._ended, "synchronize"):
            self._ended.synchronize()
        steps = [seconds(began, ended) for began, ended in self._steps]
        refreshes = []
        for began, first, last, ended in self._refreshes:
            refreshes.append(seconds(first, last))
            steps.append(seconds(began, first) + seconds(last, ended))
        return median(refreshes), median(steps)


def now(device: torch.device) -> Any:
    """The time, or an event that will hold it once the device has come so far."""
    if device.type == "cpu":
        return time.perf_counter()
    module = torch.get_device_module(device)
    event = module.Event(enable_timing=True)
    # Metal has one stream, which it does not name.
    event.record(*([module.current_stream(device)] if hasattr(module, "current_stream") else []))
    return event


def seconds(began: Any, ended: Any) -> float:
    """From one time to another."""
    return float(ended - began) if isinstance(began, float) else float(began.elapsed_time(ended)) / 1000


def settled_interval(pace: Pace, overhead: float, device: torch.device) -> int:
    """Steps between two refreshes that cost a share of training, one at least; said in the log of "nsgd".

    Waits for the device once. Of several processes the first decides, and all take its number.

    Args:
        pace: What was timed.
        overhead: Seconds of refreshes for each second of steps.
        device: Where the parameters are.
    """
    refresh, step = pace.price()
    (shared,) = of_the_first(device, torch.tensor([interval_of(refresh, step, overhead)], device="cpu"))
    interval = int(shared)
    _LOG.info(
        "the directions are refreshed every %d steps from here on: a refresh took %.3g ms, a step %.3g ms, and "
        "overhead is %g; refresh_every=%d repeats it",
        *(interval, 1e3 * refresh, 1e3 * step, overhead, interval),
    )
    return interval


def interval_of(refresh: float, step: float, overhead: float) -> int:
    """Steps between two refreshes, given the seconds of both; one at least."""
    price = refresh / step if step > 0 else math.inf
    return max(1, math.ceil(min(price / overhead, _MOST)))
