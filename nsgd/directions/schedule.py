"""When a refresh is due: directions from a second look at the loss are paid from a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nsgd.options import DampingOptions


@dataclass
class Counts:
    """Counts of what has been done and spent so far: plain numbers, saved with a checkpoint."""

    steps: int = 0
    refreshed_at: int = -1  # value of steps when the directions last changed
    attempted_at: int = -1  # and at the last refresh, also one that met a NaN
    refreshes: int = 0
    skipped_refreshes: int = 0
    hvps: int = 0
    cost_gradients: float = 0.0
    sample_flops: float = 0.0  # of a forward pass on one sample; 0 until it is counted
    interval: int = 0  # steps between two refreshes, from their price in seconds; 0 until that is known
    spared_gradients: float = 0.0  # by directions drawn in place of estimates


def refresh_due(counts: Counts, options: DampingOptions, *, known: bool, alarm: bool) -> bool:
    """Whether a refresh is due before the step that comes.

    Args:
        counts: Of the run so far.
        options: Of the optimizer.
        known: Whether there are directions from a refresh.
        alarm: Whether the last step has left them: then refreshes may cost twice as much.
    """
    steps = counts.steps
    if steps < options.warmup_steps or counts.attempted_at == steps:
        return False
    if not known:
        return True
    if options.refresh_every != "auto":
        return steps - counts.refreshed_at >= options.refresh_every
    if counts.interval:
        return steps - counts.attempted_at >= math.ceil(counts.interval / (2 if alarm else 1))
    budget = options.overhead * (steps - options.warmup_steps) * (2 if alarm else 1)
    return counts.cost_gradients + counts.spared_gradients <= budget
