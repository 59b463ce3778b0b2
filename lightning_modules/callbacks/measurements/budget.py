"""When a measurement is taken, on how many samples, and what it has cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nsgd.curvature.checks import count_or_none

_LEAST, _MOST = 16, 512  # evaluation samples, where the overhead decides


@dataclass(frozen=True)
class Plan:
    """The step at which a measurement begins, and its number of samples."""

    starts: list[int]  # optimizer steps taken before
    samples: int


def plan(
    *,
    steps: float,
    price: float,
    fixed: float,
    samples: int | None,
    times: int,
    length: int,
    overhead: float,
    batch: int,
    most: int,
) -> Plan:
    """Spread measurements over a run so that they cost no more than an overhead, on as many samples as that pays.

    Fewer of them where the least number of samples costs too much; one at least, whatever it costs.

    Args:
        steps: Optimizer steps of the run.
        price: Gradients of a measurement on as many evaluation samples as a training batch has.
        fixed: Gradients of a measurement that no number of samples changes.
        samples: Evaluation samples, or None for 16 or more.
        times: Measurements that are wanted.
        length: Steps that one extends over.
        overhead: Gradients a step that they may cost.
        batch: Samples of a training batch.
        most: Evaluation samples where the overhead would pay more.
    """
    fewest = min(_LEAST, most) if samples is None else samples
    times = min(times, int(overhead * steps / (fixed + price * fewest / batch)), int(steps) // length)
    times = max(1, times)
    if samples is None:
        samples = min(max(fewest, int((overhead * steps / times - fixed) / price * batch)), most)
    last = max(0, int(steps) - length)
    starts = {round(last * i / (times - 1)) for i in range(times)} if times > 1 else {last // 2}
    return Plan(sorted(starts), samples)


class Budget:
    """The cost of a measurement, allowed and so far, in gradients and seconds, and when it is due.

    Args:
        every: Optimizer steps from the beginning of one measurement to that of the next; None to spread them.
        overhead: Gradients that measuring may cost for each gradient of training.

    Attributes:
        gradients: Spent so far, of one training batch each.
        seconds: Spent so far.
        plan: Made from the first batch of a run; None before.
        micro_batch: Samples of a running batch.
        batch: Samples of a gradient, which several running batches may give.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, *, every: int | None, overhead: float) -> None:
        if not 0 < overhead < math.inf:
            raise ValueError(f"expected overhead to be a finite number above 0, got {overhead}")
        self.every, self.overhead = count_or_none("every", every), overhead
        self.gradients, self.seconds = 0.0, 0.0
        self.plan: Plan | None = None
        self.micro_batch, self.batch = 1, 1
        self._last_step = -1  # optimizer steps when a batch last came

    def restart(self, step: int) -> None:
        """Forget the plan of an earlier run, and what that cost where this one begins with step 0."""
        if step == 0:
            self.gradients, self.seconds = 0.0, 0.0
        self.plan, self._last_step = None, step - 1

    def make_plan(
        self,
        *,
        steps: float,
        price: float,
        fixed: float,
        samples: int | None,
        times: int,
        length: int,
        micro_batch: int,
        accumulated: int,
    ) -> Plan:
        """Decide when and on how many samples, once the first batch says how large batches are.

        Args:
            steps: Optimizer steps of the run; with ``every`` those from one measurement to the next.
            price: As for :func:`plan`.
            fixed: Gradients of running batches, of which ``accumulated`` make one of training's.
            samples: As for :func:`plan`.
            times: As for :func:`plan`.
            length: As for :func:`plan`.
            micro_batch: Samples of a running batch.
            accumulated: Running batches of a gradient.
        """
        self.micro_batch, self.batch = micro_batch, micro_batch * accumulated
        spread = plan(
            steps=steps,
            price=price,
            fixed=fixed / accumulated,
            samples=samples,
            times=1 if self.every else times,
            length=length,
            overhead=self.overhead,
            batch=self.batch,
            most=min(_MOST, micro_batch),  # so that one graph holds them all
        )
        self.plan = Plan([], spread.samples) if self.every else spread
        return self.plan

    def is_due(self, step: int) -> bool:
        """Whether a measurement begins after so many optimizer steps; several may have been taken since last asked."""
        last, self._last_step = self._last_step, step
        if self.every:
            return step // self.every > last // self.every
        return self.plan is not None and any(last < start <= step for start in self.plan.starts)

    def spend(self, gradients: float, *, samples: int) -> None:
        """Count work on so many samples, in gradients of these."""
        self.gradients += gradients * samples / self.batch

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the seconds inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
