"""Long runs: memory and time of a step stay flat, and counters are exact."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsgd import NSGD, sample_losses

K = 3
OBJECTS = 100  # that Python may hold more of at the end: caches of the interpreter
BYTES = 4 << 20  # the process: what its allocator holds

# Runs in the quick form, and in the slow one.
REFRESHES = [pytest.param(100, id="quick"), pytest.param(10_000, id="long", marks=pytest.mark.slow)]
STEPS = [pytest.param(500, id="quick"), pytest.param(100_000, id="long", marks=pytest.mark.slow)]


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Run:
    """A small network, and batches that come again and again."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = NSGD(self.model.parameters(), lr=0.02, momentum=0.9, k=K, **options)
        self.batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(50)]

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(x), y)

    def step(self, i: int, source: str) -> None:
        x, y = self.batches[i % len(self.batches)]
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        if source == "products" or source == "random":
            assert self.optimizer.refresh_if_due(loss)
        elif source != "training gradients":
            module = self.model if source == "samples at once" else None
            assert self.optimizer.refresh_if_due(sample_losses(self.loss, x, y, module=module))
        loss.backward()
        self.optimizer.step()


def flat(run: Run, source: str, count: int, record_property: Any) -> None:
    """Make so many steps; neither objects nor memory grow between a tenth of them and the end."""
    tenth, held, seconds = count // 10, [], []
    for i in range(10):
        begun = time.process_time()
        for step in range(i * tenth, (i + 1) * tenth):
            run.step(step, source)
        seconds.append(time.process_time() - begun)
        if i in (1, 9):
            gc.collect()
            held.append((len(gc.get_objects()), resident()))
    # The first tenth fills caches.
    (objects, memory), (objects_after, memory_after) = held
    assert objects_after - objects < OBJECTS
    assert memory_after - memory < BYTES
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    kib, ratio = max(0, memory_after - memory) // 1024, seconds[-1] / seconds[1]
    record_property(
        f"measured: {source}",
        f"{count:,} steps and {run.optimizer.refreshes:,} changes of the directions, {kib} KiB more memory and "
        f"{ratio:.2f} times the processor seconds in the last tenth, against the second",
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("count", REFRESHES)
@pytest.mark.parametrize("source", ["samples at once", "samples one by one", "products", "random"])
def test_refreshes_leave_nothing_behind(record_property, source, count):
    solver = {"products": "lanczos", "random": "random"}.get(source, "gradients")
    run = Run(solver=solver, refresh_every=1)
    flat(run, source, count, record_property)
    optimizer = run.optimizer
    assert optimizer.refreshes == count
    assert optimizer.skipped_refreshes == 0
    hvps = 2 * K + 2 if source == "products" else 0
    assert optimizer.hvps == hvps * count
    if source == "products":
        assert optimizer.cost_gradients == (1 + 2 * hvps) * count
    record_property(f"reliability: refreshes by {source}", count)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("count", STEPS)
def test_steps_leave_nothing_behind(record_property, count):
    run = Run()
    flat(run, "training gradients", count, record_property)
    saved = run.optimizer.state_dict()
    assert run.optimizer.cost_gradients == 0
    # From the second step on a row; folded after 1, 1, 1 ... rows, and in the end after each ten.
    rows, folds, pending = count - 1, 0, 0
    for recorded in range(1, rows + 1):
        pending += 1
        if pending >= max(1, min(10, recorded // 4)):
            folds, pending = folds + 1, 0
    assert run.optimizer.refreshes == folds
    assert all(len(entry["directions"]) == K for entry in saved["state"].values())
    record_property("reliability: steps of the drop-in", count)
