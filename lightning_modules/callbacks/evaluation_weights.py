"""EvaluationWeights: for optimizers that train at other weights than those that they find, as schedule-free ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn


def has_evaluation_weights(optimizer: Any) -> bool:
    """Whether an optimizer, or a class of them, switches between two sets of weights, by ``train()`` and ``eval()``."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@contextmanager
def evaluation_weights(optimizers: Sequence[Any]) -> Iterator[None]:
    """Hold the parameters at the weights that optimizers would be judged by; bit for bit as before on leaving.

    Going back by ``train()`` alone would round, so that looking would change the training. Costs a copy of the
    parameters, and nothing with optimizers that have one set of weights.
    """
    switching = [optimizer for optimizer in optimizers if has_evaluation_weights(optimizer)]
    params = [p for optimizer in switching for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in params]
    for optimizer in switching:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in switching:
            optimizer.train()
        with torch.no_grad():
            for p, value in zip(params, trained, strict=True):
                p.copy_(value)


class EvaluationWeights(pl.Callback):
    """Validate at the weights that the optimizer is judged by, and end at them.

    Checkpoints on the way hold those that are trained, which training goes on from.

    Args:
        apart: Around every switch, such as :meth:`RecordSteps.apart`, which leaves its seconds out.
    """

    def __init__(self, apart: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._held, self._apart = ExitStack(), apart

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the weights that are trained."""
        with self._apart():
            for optimizer in filter(has_evaluation_weights, trainer.optimizers):
                optimizer.train()  # type: ignore[attr-defined]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch, where it is in training: elsewhere the weights are those that are to be validated."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._held.enter_context(evaluation_weights(trainer.optimizers))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch back."""
        with self._apart():
            self._held.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Switch back."""
        self._held.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the weights that the optimizer found."""
        for optimizer in filter(has_evaluation_weights, trainer.optimizers):
            optimizer.eval()  # type: ignore[attr-defined]
