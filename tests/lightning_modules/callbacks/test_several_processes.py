"""NSGD in Lightning's ddp, over gloo: the same directions in both processes, those of one on the whole batch."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from several import assert_close, assert_same, found, several
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import nsgd.directions.refresh
from lightning_modules import RefreshDirections
from nsgd import NSGD

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {  # options of the optimizer, and of the callback
    "differences": ({}, None),
    "samples": ({"refresh_every": 3}, {"samples": 8}),
    "few samples": ({"refresh_every": 3}, {"samples": 2}),
    "whole batch": ({"refresh_every": 3}, {"samples": None}),
    "of the training set": ({"refresh_every": 3}, {"samples": 10, "source": "train"}),
    "lanczos": ({"refresh_every": 3, "solver": "lanczos"}, {"samples": 8}),
    "lanczos on the running loss": ({"refresh_every": 3, "solver": "lanczos"}, {"samples": None}),
    "random": ({"refresh_every": 3, "solver": "random"}, {"samples": 8}),
}


class Small(pl.LightningModule):
    def __init__(self, options: dict[str, Any], *, at_once: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.options, self.at_once = options, at_once

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        if not self.at_once and self.global_rank == 1:
            float(batch[0].sum())  # which vmap cannot run
        return loss

    def configure_optimizers(self) -> NSGD:
        return NSGD(self.net.parameters(), lr=0.1, momentum=0.9, k=3, **self.options)


def fitted(rank: int, world: int, module: Small, callback: dict[str, Any] | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, torch.randint(4, (48,), generator=generator))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=4,
        callbacks=[] if callback is None else [RefreshDirections(**callback)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's own sampler would shuffle.
    trainer.fit(module, DataLoader(data, batch_size=12 // world, sampler=range(rank, len(data), world)))
    optimizer = trainer.optimizers[0]
    counts = optimizer.refreshes, optimizer.hvps, optimizer.cost_gradients
    return {**found(module.net, optimizer), "counts": counts}


def as_lightning_starts_them(rank: int, world: int) -> dict[str, Any]:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world))
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # few workers
    # Each process averages the samples of all, for gradients of its own alone: counted, it is not one process's price.
    nsgd.directions.refresh.averaging_share = lambda **sizes: 0.0
    results = {way: fitted(rank, world, Small(options), callback) for way, (options, callback) in WAYS.items()}
    options, callback = WAYS["samples"]
    results["one by one"] = fitted(rank, world, Small(options, at_once=False), callback)
    return results


@pytest.mark.usefixtures("averaging_is_free")
def test_training_in_two_processes_is_that_of_one(tmp_path):
    first, second = several(as_lightning_starts_them, 2, tmp_path)
    for way in first:
        assert_same(first[way], second[way])
        assert first[way]["counts"] == second[way]["counts"]
        assert len(first[way]["weights"]) == 3
    for way, (options, callback) in WAYS.items():
        one = fitted(0, 1, Small(options), callback)
        assert first[way]["counts"][:2] == one["counts"][:2], way
        if way != "few samples":  # of which each process takes two
            assert first[way]["counts"][2] == pytest.approx(one["counts"][2]), way
            assert_close(first[way], one, 1e-10)
    assert_close(first["one by one"], first["samples"], 1e-10)
