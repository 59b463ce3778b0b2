"""NSGD under DistributedDataParallel, over gloo: every process follows the same directions, those of one process."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from nsgd import NSGD, damp

BATCH = 12  # of all processes together
MAKERS = {
    "nsgd": lambda params: NSGD(params, lr=0.1, momentum=0.9, k=3),
    "adamw": lambda params: damp(torch.optim.AdamW(params, lr=0.01), k=3),
}


def fresh() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (BATCH,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rank: int, world: int, passes: int) -> None:
    """Steps of some passes each; a process takes every ``world``-th sample. One on its own takes them at once."""
    for i in range(steps):
        optimizer.zero_grad()
        losses = []
        for j in range(passes):
            x, y = batch(passes * i + j)
            losses.append((lambda x, y: cross_entropy(model(x), y) / passes, x[rank::world], y[rank::world]))
        if world == 1:  # whose passes would be rows of their own
            sum(loss(x, y) for loss, x, y in losses).backward()
        else:
            for j, (loss, x, y) in enumerate(losses):
                with model.no_sync() if j + 1 < passes else nullcontext():
                    loss(x, y).backward()
        optimizer.step()


def found(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    params = list(model.parameters())
    vectors = [p.detach().clone() for p in params]
    return {"params": vectors, "directions": optimizer.directions(params), "weights": optimizer.weights}


def one_of_several(rank: int, world: int, folder: str, maker: str, steps: int, passes: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = DistributedDataParallel(fresh())
    optimizer = MAKERS[maker](model.parameters())
    train(model, optimizer, steps, rank, world, passes)
    torch.save(found(model, optimizer), Path(folder) / f"{rank}.pt")
    del model, optimizer  # before the group that the reducer's threads talk to
    distributed.barrier()
    distributed.destroy_process_group()


def several(tmp_path: Path, world: int, maker: str, steps: int, passes: int) -> list[dict[str, Any]]:
    spawn(one_of_several, (world, str(tmp_path), maker, steps, passes), nprocs=world)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize(("world", "steps"), [(2, 1000), (3, 300)])
def test_directions_stay_bitwise_equal_in_every_process(tmp_path, world, steps):
    first, *others = several(tmp_path, world, "nsgd", steps, 1)
    assert len(first["weights"]) == 3
    for other in others:
        assert torch.equal(first["directions"], other["directions"])
        assert first["weights"] == other["weights"]
        assert all(torch.equal(p, q) for p, q in zip(first["params"], other["params"], strict=True))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("passes", [1, 2])  # with no_sync
def test_the_path_is_that_of_one_process_on_the_whole_batch(tmp_path, maker, passes):
    split = several(tmp_path, 2, maker, 30, passes)[0]
    model = fresh()
    optimizer = MAKERS[maker](model.parameters())
    train(model, optimizer, 30, 0, 1, passes)
    whole = found(model, optimizer)
    for p, q in zip(split["params"], whole["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
    assert split["weights"] == pytest.approx(whole["weights"], rel=1e-8)
