"""Several processes over gloo on this machine, and what they train."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import start_processes

BATCH = 12  # of all processes together


def several(work: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """What a function of a module gives in each process: it is called with its rank, the number of them, and more."""
    folder.mkdir(exist_ok=True)
    # Forked from one process that has imported torch: a fresh interpreter each takes seconds to do that.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.fsdp", "nsgd"])
    start_processes(_one, (world, str(folder), work, args), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _one(rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(work(rank, world, *args), Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def fresh() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch(i: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (size,), generator=generator)


def found(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Parameters, directions and their weights."""
    params = list(model.parameters())
    vectors = [p.detach().clone() for p in params]
    return {"params": vectors, "directions": optimizer.directions(params), "weights": optimizer.weights}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bitwise."""
    assert torch.equal(one["directions"], other["directions"])
    assert one["weights"] == other["weights"]
    assert all(torch.equal(p, q) for p, q in zip(one["params"], other["params"], strict=True))


def assert_close(one: dict[str, Any], other: dict[str, Any], atol: float) -> None:
    for p, q in zip(one["params"], other["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)
