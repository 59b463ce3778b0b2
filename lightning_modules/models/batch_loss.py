"""The loss of a LightningModule on a batch of its own choosing, with nothing left behind."""

from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn

from nsgd.curvature.guard import untouched


def batch_loss(module: pl.LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """The training loss of a batch, with its graph, as if it had never been computed: :func:`batch_losses`, once."""
    with batch_losses(module) as loss:
        return loss(batch, batch_idx)


@contextmanager
def batch_losses(module: pl.LightningModule) -> Iterator[Callable[[Any, int], Tensor]]:
    """A function from a batch and its index to its training loss; on leaving, nothing is left behind.

    The loss is ``module.curvature_loss(batch)``, or ``(batch, batch_idx)``, where the module defines that, else its
    ``training_step``; all under :func:`unnoticed` and the trainer's precision.

    Args:
        module: Any LightningModule. One with manual optimization needs ``curvature_loss``, since its
            ``training_step`` would take optimizer steps. Batches have to be on its device already.

    Raises:
        ValueError: If the module optimizes manually without ``curvature_loss``, or no loss comes back.
    """
    curvature_loss = getattr(module, "curvature_loss", None)
    if curvature_loss is None and not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually, so its training_step cannot be run for its loss alone; "
            "define curvature_loss(self, batch), returning the loss"
        )
    trainer = module._trainer

    def loss_of(batch: Any, batch_idx: int) -> Tensor:
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

    Buffers, modes, random state, metric states and the module's own attributes (counters, lists of outputs) are as
    before afterwards.
    """
    guards = (torch.inference_mode(False), torch.enable_grad(), _shelved(module), _no_loggers(module._trainer))
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


@contextmanager
def _shelved(root: nn.Module) -> Iterator[None]:
    """Put every module's attributes back afterwards; inside, tensors, containers and plain objects are copies."""
    attributes_of_modules = [(module, dict(vars(module))) for module in root.modules()]
    try:
        for module, attributes in attributes_of_modules:
            vars(module).update({name: _copied(value) for name, value in attributes.items()})
        yield
    finally:
        for module, attributes in attributes_of_modules:
            vars(module).clear()
            vars(module).update(attributes)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if _is_own(value):
        same = object.__new__(type(value))
        same.__dict__.update({name: _container(inner) for name, inner in vars(value).items()})
        return same
    return _container(value)


def _is_own(value: Any) -> bool:
    """Whether an attribute is a plain object of the user's, such as a meter that sums up losses."""
    cls: Any = type(value)
    foreign = cls.__module__.split(".")[0] in ("torch", "torchmetrics", "pytorch_lightning", "lightning", "builtins")
    plain = cls.__new__ is object.__new__ and hasattr(value, "__dict__") and not hasattr(cls, "__slots__")
    return plain and not foreign and not callable(value) and not isinstance(value, nn.Module | type)


def _container(value: Any) -> Any:
    """A copy of a Python container and of those inside, and of a generator; everything else is itself."""
    if type(value) is list:
        return [_container(item) for item in value]
    if type(value) in (dict, defaultdict, OrderedDict):
        copied = copy.copy(value)
        copied.update((key, _container(item)) for key, item in value.items())
        return copied
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
        return copy.deepcopy(value)
    return copy.copy(value) if type(value) in (set, deque) else value
