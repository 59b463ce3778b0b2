"""The loss of a LightningModule on a batch of its own choosing, with nothing left behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor

from nsgd.curvature.copies import fresh_batch
from nsgd.curvature.guard import untouched


def batch_loss(module: pl.LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """The training loss of a batch, with its graph, as if it had never been computed: :func:`batch_losses`, once."""
    with batch_losses(module) as loss:
        return loss(batch, batch_idx)


@contextmanager
def batch_losses(module: pl.LightningModule) -> Iterator[Callable[[Any, int], Tensor]]:
    """A function from a batch and its index to its training loss; on leaving, nothing is left behind.

    The loss is ``module.curvature_loss(batch)``, or ``(batch, batch_idx)``, where the module defines that, else its
    ``training_step``; all under :func:`unnoticed` and the trainer's precision. Each call has a copy of its batch, which
    it may consume.

    Args:
        module: Any LightningModule. One with manual optimization needs ``curvature_loss``, since its
            ``training_step`` would take optimizer steps. Batches have to be on its device already.

    Raises:
        ValueError: If the module optimizes manually without ``curvature_loss``; from the function, if a batch cannot be
            copied, or no loss comes back.
    """
    curvature_loss = getattr(module, "curvature_loss", None)
    if curvature_loss is None and not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually, so its training_step cannot be run for its loss alone; "
            "define curvature_loss(self, batch), returning the loss"
        )
    trainer = module._trainer

    def loss_of(batch: Any, batch_idx: int) -> Tensor:
        batch = fresh_batch(batch)
        with nullcontext() if trainer is None else trainer.precision_plugin.train_step_context():
            if curvature_loss is None:
                output = run_step(module.training_step, batch, batch_idx)
            elif "batch_idx" in inspect.signature(curvature_loss).parameters:
                output = curvature_loss(batch, batch_idx)
            else:
                output = curvature_loss(batch)
        return loss_in(output, module)

    with unnoticed(module):
        yield loss_of


@contextmanager
def unnoticed(module: pl.LightningModule) -> Iterator[None]:
    """Steps of a module that leave nothing behind: ``log`` and loggers are muted inside.

    Parameters' values, buffers, modes, random state, metric states and the module's own attributes (counters, lists of
    outputs) are as before afterwards.
    """
    guards = (torch.inference_mode(False), torch.enable_grad(), _no_loggers(module._trainer))
    with ExitStack() as stack:
        for guard in (*guards, untouched(module, device=module.device)):
            stack.enter_context(guard)
        vars(module).update(log=_muted, log_dict=_muted)
        yield


def run_step(step: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
    """The output of a ``training_step`` for a batch, with its index where it takes one."""
    parameters = list(inspect.signature(step).parameters.values())
    takes_one = len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
    return step(batch) if takes_one else step(batch, batch_idx)


def loss_in(output: Any, module: pl.LightningModule) -> Tensor:
    """The loss that a module's ``training_step`` gave back, alone or in a dict.

    Raises:
        ValueError: If there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"expected training_step of {type(module).__name__} to return a loss, or a dict with one under "
            f"'loss', got {type(loss).__name__}"
        )
    return loss


def _muted(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log`` and ``log_dict``."""


@contextmanager
def _no_loggers(trainer: pl.Trainer | None) -> Iterator[None]:
    """Give direct calls of ``self.logger`` one that writes nothing."""
    if trainer is None or not trainer.loggers:
        yield
        return
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger()]
    try:
        yield
    finally:
        trainer.loggers = loggers
