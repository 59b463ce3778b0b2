"""Exceptions of a user, in the step that a refresh repeats and in callbacks beside it, leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strangers import classes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from lightning_modules import RefreshDirections
from nsgd import NSGD


class Stop(Exception):
    """A user's own."""


class Module(pl.LightningModule):
    """Calls what it is given in each call of its step, those of a refresh too."""

    def __init__(self, solver: str, called: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
        self.solver, self.called = solver, called

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.called()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return NSGD(self.parameters(), lr=0.1, k=3, solver=self.solver, refresh_every=1)


def raising(at: int) -> tuple[Callable[..., None], list[int]]:
    """A function that raises from one of its calls on, and their count."""
    calls: list[int] = []

    def called(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) >= at:
            raise Stop

    return called, calls


def train(module: Module, *callbacks: pl.Callback) -> None:
    data = torch.utils.data.DataLoader(classes(), batch_size=16)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    refresh = RefreshDirections(samples=8, group_size=4)
    pl.Trainer(max_steps=6, accelerator="cpu", callbacks=[refresh, *callbacks], **quiet).fit(module, data)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    hooks = len(torch_module._global_forward_pre_hooks)
    yield
    assert len(torch_module._global_forward_pre_hooks) == hooks
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("solver", ["gradients", "lanczos"])
def test_an_exception_in_the_step_that_a_refresh_repeats_is_the_users(record_property, solver):
    record_property("reliability: exceptions in a refresh, in Lightning", 1)
    called, calls = raising(2)  # the first is the step itself
    module = Module(solver, called)
    found = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(Stop):
        train(module)
    assert len(calls) == (3 if solver == "gradients" else 2)  # all samples at once, then one by one
    assert all(torch.equal(found[name], p) for name, p in module.named_parameters())
    assert int(module.net[1].num_batches_tracked) == 1  # of the step itself
    assert all(m.training for m in module.net.modules())
    again = Module(solver)
    again.load_state_dict(module.state_dict())
    train(again)
    assert int(again.net[1].num_batches_tracked) == 7
    assert all(bool(p.isfinite().all()) for p in again.parameters())


HOOKS = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("solver", ["gradients", "lanczos"])
def test_an_exception_in_a_callback_beside_is_the_users(record_property, solver, hook):
    record_property("reliability: exceptions in a callback, in Lightning", 1)
    called, calls = raising(3)
    beside = pl.Callback()
    setattr(beside, hook, called)
    module = Module(solver)
    with pytest.raises(Stop):
        train(module, beside)
    assert len(calls) == 3
    assert all(m.training for m in module.net.modules())
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert int(module.net[1].num_batches_tracked) == (2 if hook == "on_train_batch_start" else 3)
