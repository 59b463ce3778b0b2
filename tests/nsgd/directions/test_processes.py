"""NSGD under DistributedDataParallel, over gloo: every process follows the same directions, those of one process."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from several import assert_close, assert_same, batch, found, fresh, several
from torch import Tensor, distributed, nn
from torch.multiprocessing import start_processes
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import nsgd.directions.differences
from nsgd import NSGD, damp
from nsgd.directions.processes import settled

MAKERS = {
    "nsgd": lambda params: NSGD(params, lr=0.1, momentum=0.9, k=3),
    "adamw": lambda params: damp(torch.optim.AdamW(params, lr=0.01), k=3),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rank: int, world: int, passes: int) -> None:
    """Steps of some passes each; a process takes every ``world``-th sample. One process sees each step's batch whole.

    So that the latter takes differences of whole gradients too, and no rows of single passes.
    """
    for i in range(steps):
        optimizer.zero_grad()
        batches = [batch(passes * i + j) for j in range(passes)]
        if world == 1:
            batches = [tuple(map(torch.cat, zip(*batches, strict=True)))]
        for j, (x, y) in enumerate(batches):
            quiet = isinstance(model, DistributedDataParallel) and j + 1 < passes
            with model.no_sync() if quiet else nullcontext():
                (cross_entropy(model(x[rank::world]), y[rank::world]) / len(batches)).backward()
        optimizer.step()


def trained(rank: int, world: int, maker: str, steps: int, passes: int) -> dict[str, Any]:
    model = DistributedDataParallel(fresh())
    optimizer = MAKERS[maker](model.parameters())
    train(model, optimizer, steps, rank, world, passes)
    return found(model, optimizer)


@pytest.mark.parametrize(("world", "steps"), [(2, 1000), (3, 300)])
def test_directions_stay_bitwise_equal_in_every_process(tmp_path, world, steps):
    first, *others = several(trained, world, tmp_path, "nsgd", steps, 1)
    assert len(first["weights"]) == 3
    for other in others:
        assert_same(first, other)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("passes", [1, 2])  # with no_sync
def test_the_path_is_that_of_one_process_on_the_whole_batch(tmp_path, maker, passes):
    split = several(trained, 2, tmp_path, maker, 30, passes)[0]
    model = fresh()
    optimizer = MAKERS[maker](model.parameters())
    train(model, optimizer, 30, 0, 1, passes)
    whole = found(model, optimizer)
    assert_close(split, whole, 1e-10)
    assert split["weights"] == pytest.approx(whole["weights"], rel=1e-8)


class Branches(nn.Module):
    """A trunk, and heads of which one pass runs some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
        self.double()

    def forward(self, x: Tensor, heads: list[int]) -> Tensor:
        trunk = self.trunk(x).tanh()
        return sum(self.heads[i](trunk) for i in heads)


def branching(rank: int, world: int) -> dict[str, Any]:
    """Passes of unequal sizes, that use other parameters in each process; the last head is used now and then."""
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    optimizer = MAKERS["nsgd"](model.parameters())
    for i in range(30):
        x, y = batch(i % 3)
        cut = 7 if i % 5 == 4 else 6  # an uneven last batch
        losses = []
        for r in range(2) if world == 1 else [rank]:
            part = slice(cut) if r == 0 else slice(cut, None)
            heads = [0, *([1] if r == 1 else []), *([2] if i % 4 == 3 else [])]
            losses.append(cross_entropy(wrapped(x[part], heads), y[part]))
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()  # as DDP weights it: each process alike
        optimizer.step()
    return found(model, optimizer)


def test_unused_parameters_and_uneven_batches_are_those_of_one_process(tmp_path):
    first, second = several(branching, 2, tmp_path)
    assert_same(first, second)
    one = branching(0, 1)
    assert_close(first, one, 1e-10)
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-8)


def unequal(rank: int, world: int) -> dict[str, Any]:
    """A machine that rounds in another way."""
    exact = nsgd.directions.differences.top_of_sum

    def rounded(gram: Tensor, weights: Tensor, k: int, **options: float) -> tuple[Tensor, Tensor]:
        gram = gram * (1 + 1e-10 * torch.rand(gram.shape, dtype=gram.dtype, generator=generator))
        return exact((gram + gram.T) / 2, weights, k, **options)

    generator = torch.Generator().manual_seed(rank)
    nsgd.directions.differences.top_of_sum = rounded
    try:
        results = trained(rank, world, "nsgd", 40, 1)
    finally:
        nsgd.directions.differences.top_of_sum = exact
    gram = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64) * (1 + 1e-9 * rank)
    vector, matrix = torch.full((3,), 1.0 + rank), torch.full((2, 5), 2.0 + rank, dtype=torch.float64)
    plain = [nn.Parameter(torch.ones(3))]
    results["alike"] = settled(gram, plain, vector.double(), matrix)
    results["other model"] = settled(gram * (1 + rank), plain, vector.double(), matrix)
    results["broken"] = settled(gram * torch.nan, plain, vector.double(), matrix)
    return results


def test_unequal_machines_do_not_drift_apart_and_other_models_are_left_alone(tmp_path):
    first, second = several(unequal, 2, tmp_path)
    assert_same(first, second)
    for case, factor in (("alike", 1.0), ("other model", 2.0), ("broken", 2.0)):
        assert torch.equal(first[case][0], torch.ones(3, dtype=torch.float64))
        assert torch.equal(second[case][0], factor * first[case][0])
        assert float(second[case][1][0, 0]) == (2.0 if factor == 1 else 3.0)


PATIENCE = 5  # seconds that a process waits for the others


def deserted(rank: int, world: int, folder: str, way: str) -> None:
    """Training in which the last process dies, with a word of how the other one ends."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    model = fresh()
    if way == "ddp":
        model = DistributedDataParallel(model)
    optimizer = MAKERS["nsgd"](model.parameters())
    train(model, optimizer, 5, rank, world, 1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        train(model, optimizer, 100, rank, world, 1)
        said = "went on"
    except RuntimeError as error:
        said = f"RuntimeError: {error}"
    (Path(folder) / "end").write_text(f"{time.monotonic() - began}\n{said}", encoding="utf-8")


@pytest.mark.parametrize("way", ["ddp", "folds alone"])  # in a reduction of gradients, and in one of ours
def test_a_process_that_dies_ends_the_others_with_an_error(tmp_path, way):
    context = start_processes(deserted, (2, str(tmp_path), way), nprocs=2, start_method="forkserver", join=False)
    assert context is not None
    deadline = time.monotonic() + 60
    for process in context.processes:
        process.join(max(0.0, deadline - time.monotonic()))
        assert not process.is_alive()
    assert context.processes[1].exitcode == -signal.SIGKILL
    seconds, said = (tmp_path / "end").read_text(encoding="utf-8").split("\n", 1)
    assert said.startswith("RuntimeError")
    assert float(seconds) < 4 * PATIENCE
