"""RefreshDirections: gives NSGD, or any damped optimizer, its directions inside Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_modules.callbacks.curvature_batches import (
    WAYS_OUT,
    CurvatureBatches,
    Parts,
    columns_of,
    follows_samples,
)
from lightning_modules.data.cutting import as_it_was, batch_size_of, samples_first
from lightning_modules.models.batch_loss import batch_loss, batch_losses
from nsgd.curvature.copies import fresh_batch
from nsgd.curvature.hessian import NoProductError
from nsgd.damping.step import Damped
from nsgd.directions.batch_dim import BatchDim
from nsgd.directions.processes import alike
from nsgd.directions.samples import SampleLosses, checked_chunk_size
from nsgd.options import Estimator


class RefreshDirections(pl.Callback):
    """Refresh the directions of every damped optimizer when they are due; works with any LightningModule unmodified.

    For directions from single samples or from products. By themselves, without this callback, NSGD and damped
    optimizers take theirs from the gradients that training leaves.

    Training itself stays bit-identical: batch, parameters, buffers, attributes, random state, metrics and logged values
    see one forward pass; what ``on_train_batch_start`` of the module does to a batch is not repeated. To the module's
    loggers, at most once in ``log_every_n_steps`` of the trainer, go the largest weight of the directions and the sum
    of all (``nsgd/weight_1``, ``nsgd/weight_sum``), the same of the eigenvalues where products found some
    (``nsgd/lambda_1``, ``nsgd/lambda_sum``), ``nsgd/overlap`` with the last basis, ``nsgd/alignment`` of the last step
    with it, and ``nsgd/hvps`` and ``nsgd/cost_gradients`` so far; and, there and in the progress bar,
    ``nsgd/cost_per_step``, the gradients that refreshes have cost for each step. Those of several damped optimizers go
    under ``nsgd-0/``, ``nsgd-1/`` ... All weights are ``optimizer.weights``.

    With the solver "auto" or "gradients" the directions come from the gradients of small groups of samples, otherwise
    from Hessian-vector products. A running batch that cannot be cut, and the loss of a module that optimizes manually
    and has no ``curvature_loss(batch)``, give products of the loss itself. With "auto" so do samples that have no loss
    alone, such as nodes of a graph; and where torch has no products either, directions stay those of training's own
    gradients.

    With several processes (``strategy="ddp"``) each takes samples of its own batch, and all follow the same directions.
    Where only some of them can cut their batch into samples, none refreshes on it. Parameters have to be whole in each.

    Args:
        samples: Samples that the directions come from, of all processes together, in at most 64 groups in each; None
            for the whole running batch, or, with ``source="train"``, for 2,560, the paper's number. For products a
            running batch that is no larger is used whole, at no extra forward pass.
        group_size: Samples in a group; by default 1, or 8 where the module has BatchNorm layers, whose statistics of
            one sample say little.
        source: "batch" for a slice of the running batch, "train" for a sample of the training set, fresh each time.
        optimizer: Index of the one optimizer to refresh, of several; by default all damped ones. With several, a loss
            refreshes those whose every trainable parameter it reaches, or the named one if it reaches any; the others
            pass it over. A GAN toggles its optimizers, so that the generator's loss does not reach the discriminator.
        seed: Seeds the samples of the training set.
        chunk_size: Groups whose gradients are computed at once, as in :func:`nsgd.sample_losses`; fewer take less
            memory.
        batch_dim: The dimension that counts samples, one for all tensors of a batch or one for each, in their order, as
            in :func:`nsgd.sample_losses`: 1 for time-major batches.

    Raises:
        ValueError: If an option is out of range; when training starts, if no optimizer is damped; in training, if the
            loss of a batch is to be computed again that cannot be copied, a batch has no such ``batch_dim``, or the
            solver is "gradients" and a batch cannot be cut into samples.
    """

    def __init__(
        self,
        samples: int | None = 32,
        group_size: int | None = None,
        source: Literal["batch", "train"] = "batch",
        optimizer: int | None = None,
        seed: int = 0,
        chunk_size: int | None = None,
        batch_dim: BatchDim = 0,
    ) -> None:
        self._batches = CurvatureBatches(samples, group_size, source, seed, batch_dim)
        self.optimizer, self.chunk_size = optimizer, checked_chunk_size(chunk_size)
        self._batch: Any = None
        self._copied: Any = None  # before the training_step had it: a copy, or why there is none
        self._batch_idx = 0
        self._full_size = 1  # samples in the largest batch so far: the last of an epoch may be short
        self._logged: dict[int, int] = {}  # optimizer to the step that it was last logged at
        self._told: set[str] = set()
        self._at_once = True  # until vmap meets a training_step that it cannot run
        self.one_by_one = False  # once gradients of samples have been taken so, which is slower
        self._in_samples = True  # until a batch of which single samples have no loss
        self._left: set[Damped] = set()  # to the gradients of training, as torch has no products of their loss

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to refresh."""
        self._full_size, self._logged, self._at_once, self._in_samples = 1, {}, True, True
        self.one_by_one = False
        self._told.clear()
        self._left.clear()
        names = ", ".join(type(o).__name__ for o in trainer.optimizers)
        if self.optimizer is not None and not 0 <= self.optimizer < len(trainer.optimizers):
            raise ValueError(f"expected optimizer to be an index into {len(trainer.optimizers)}, got {self.optimizer}")
        solvers = [o.options.solver for o in self._candidates(trainer) if isinstance(o, Damped)]
        self.check_samples(solvers, pl_module)
        if solvers and all(solver == "differences" for solver in solvers):
            raise ValueError(
                "RefreshDirections expected an optimizer whose directions come from a second look at the loss, got "
                "solver='differences'; leave the callback out, or take solver='auto' or 'lanczos'"
            )
        if not solvers:
            raise ValueError(
                f"RefreshDirections expected an NSGD or damped optimizer, got {names}; return nsgd.NSGD(...) or "
                "nsgd.damp(...) from configure_optimizers"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the running batch, with a copy where a refresh may come: the training_step may consume it."""
        self._batch, self._batch_idx, self._copied = batch, batch_idx, None
        # Manual optimization may step, and so be due for a refresh, within the batch.
        due = (o for o in self._candidates(trainer) if isinstance(o, Damped))
        if any(o.refresh_due or not pl_module.automatic_optimization for o in due):
            try:
                self._copied = fresh_batch(batch)
            except ValueError as error:  # of no matter, unless its loss is computed again
                self._copied = error

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the batch go, and tell the progress bar what refreshes have cost for each step so far."""
        self._batch = self._copied = None
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Damped) and optimizer.refreshes and not optimizer.from_training_gradients:
                # Not by module.log, whose results are the module's own: in callback_metrics, and reset with them.
                name = f"{_prefix(trainer, optimizer)}/cost_per_step"
                steps = max(1, optimizer.steps)  # none before the first, with accumulation
                trainer.progress_bar_metrics[name] = optimizer.cost_gradients / steps

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Refresh what is due."""
        damped = [o for o in self._candidates(trainer) if isinstance(o, Damped) and o not in self._left]
        if not any(o.refresh_due for o in damped):
            return
        if len(trainer.optimizers) > 1:  # this may be the loss of another network
            reached = _reached(loss)
            trainable = {o: {p for g in o.param_groups for p in g["params"] if p.requires_grad} for o in damped}
            if self.optimizer is None:
                damped = [o for o in damped if trainable[o] and trainable[o] <= reached]
            else:
                damped = [o for o in damped if trainable[o] & reached]
        for optimizer in damped:
            if optimizer.refresh_due:
                self._refresh(trainer, pl_module, optimizer, loss)

    def _candidates(self, trainer: pl.Trainer) -> list[Any]:
        return list(trainer.optimizers) if self.optimizer is None else [trainer.optimizers[self.optimizer]]

    def _refresh(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Damped, loss: Tensor) -> None:
        alignment = optimizer.alignment  # of the last step, in the basis that goes
        accumulate = trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = 1.0 if scaler is None else float(scaler.get_scale())
        batch = self._batch if isinstance(self._copied, ValueError) else self._copied
        parts = self._batches.parts(trainer, module, optimizer, batch, self._tell_once)
        in_groups = parts is not None and len(parts) > 1 and optimizer.options.solver in ("auto", "gradients")
        if not alike(-1 if parts is None else in_groups, module.device) or parts is None:
            return
        if parts and isinstance(self._copied, ValueError) and self._batches.source == "batch":
            raise self._copied
        batch, dims = samples_first(batch, self._batches.batch_dim)
        size = batch_size_of(batch) or 1
        self._full_size = max(self._full_size, size)
        part_of_step = 1 / (self._full_size * accumulate)
        if parts and self._in_samples:
            fraction = sum(n for _, n in parts) * part_of_step
            # With manual optimization curvature_loss may be another.
            batch_loss = loss.detach() * accumulate / factor if module.automatic_optimization else None
            options = {"scale": factor, "batch_fraction": fraction, "batch_loss": batch_loss}
            try:
                if self._refresh_on(parts, dims, module, optimizer, options):
                    self._log(trainer, optimizer, alignment)
                return
            except Exception as error:
                mine = isinstance(error, _SamplesAloneError)
                if not alike(mine, module.device) or not mine:
                    raise
                if optimizer.options.solver != "auto" and error.__cause__ is not None:
                    error.__cause__.add_note(f"raised by the loss of some samples of the batch alone; {WAYS_OUT}")
                    raise error.__cause__ from None
                if follows_samples(optimizer):  # products would drive their average out
                    self._tell_once(f"RefreshDirections passes a batch over, since {error}; {WAYS_OUT}")
                    return
                self._in_samples = False
                self._tell_once(
                    "RefreshDirections takes the directions from Hessian-vector products of the whole loss, since "
                    f"{error}; {WAYS_OUT}"
                )
        if module.automatic_optimization:
            factor /= accumulate
        try:
            done = optimizer.refresh(loss, scale=factor, batch_fraction=size * part_of_step)
        except NoProductError as error:
            if optimizer.options.solver != "auto" or not optimizer.from_training_gradients:
                raise
            self._left.add(optimizer)
            self._tell_once(
                "RefreshDirections leaves the directions to the gradients of training, since this loss cannot be cut "
                f"into samples and has no second derivatives ({error}); {WAYS_OUT}"
            )
            return
        if done:
            self._log(trainer, optimizer, alignment)

    def _refresh_on(
        self,
        parts: Parts,
        dims: tuple[int, ...],
        module: pl.LightningModule,
        optimizer: Damped,
        options: dict[str, Any],
    ) -> bool:
        """Refresh from the losses of these batches; gradients of groups are taken at once where they can be."""

        scale: float = options["scale"]

        def scaled(loss_of: Callable[[Any, int], Tensor], batch: Any) -> Tensor:
            return scale * loss_of(as_it_was(batch, dims), self._batch_idx)

        def alone(loss_of: Callable[[Any, int], Tensor], batch: Any) -> Tensor:
            try:
                return scaled(loss_of, batch)
            except (FloatingPointError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of any kind: a training_step may hold anything
                if self._batches.source == "train":  # those are batches of their own
                    raise
                reason = (str(error) or type(error).__name__).strip().splitlines()[0]
                raise _SamplesAloneError(f"the loss of some samples of the batch alone fails ({reason})") from error

        if len(parts) == 1:
            with batch_losses(module) as loss_of:
                return optimizer.refresh(partial(alone, loss_of, parts[0][0]), **options)
        if optimizer.options.solver not in ("auto", "gradients"):
            # A product needs the same loss every time.
            pairs = [(partial(alone, partial(batch_loss, module), batch), n) for batch, n in parts]
            return optimizer.refresh(pairs, **options)
        columns = columns_of(parts) if self._at_once else None  # copies the samples
        if not alike(columns is not None, module.device):
            columns = None
        if self._at_once and columns is None:
            self._tell_once(
                "RefreshDirections takes the gradients of the samples one by one, which is slower: torch.func.vmap "
                "wants batches of tensors alone, with one row a sample"
            )
        if columns is not None:
            tensors, batch_of = columns
            try:
                with batch_losses(module) as loss_of:
                    losses = SampleLosses(
                        lambda *columns: scaled(loss_of, batch_of(columns)),
                        tensors,
                        parts[0][1],
                        module,
                        self.chunk_size,
                    )
                    return optimizer.refresh(losses, **options)
            except Exception as error:  # of any kind: a training_step may hold anything; a real fault raises below too
                self._at_once = False
                cause = error.__cause__ or error
                reason = (str(cause) or type(cause).__name__).strip().splitlines()[0]
                self._tell_once(
                    "RefreshDirections takes the gradients of the samples one by one, which is slower: torch.func.vmap "
                    f"cannot run this training_step ({reason})"
                )
        self.one_by_one = True
        with batch_losses(module) as loss_of:  # gradients need each loss only once: one guard serves for all
            return optimizer.refresh([(partial(alone, loss_of, batch), n) for batch, n in parts], **options)

    def _log(self, trainer: pl.Trainer, optimizer: Damped, alignment: float | None = None) -> None:
        step, number = trainer.global_step, trainer.optimizers.index(optimizer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its logger connector
        if every == 0 or step - self._logged.get(number, -every) < every:
            return
        self._logged[number] = step
        alignment = optimizer.alignment if alignment is None else alignment  # waits for the device
        metrics: dict[str, float] = {}
        for quantity, values in (("weight", optimizer.weights), ("lambda", optimizer.eigenvalues)):
            if values:  # the largest and the sum: k curves of each would fill a logger's page
                metrics |= {f"{quantity}_1": values[0], f"{quantity}_sum": sum(values)}
        cost = optimizer.cost_gradients / (optimizer.steps + 1)  # with the step that comes
        metrics |= {"hvps": float(optimizer.hvps), "cost_gradients": optimizer.cost_gradients, "cost_per_step": cost}
        metrics |= {"overlap": optimizer.overlap, "alignment": alignment}
        prefix = _prefix(trainer, optimizer)
        known = {f"{prefix}/{name}": value for name, value in metrics.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=step)

    def check_samples(self, solvers: list[Estimator], module: nn.Module) -> None:
        """Raise a ValueError where gradients of groups are wanted and the samples make no two groups."""
        self._batches.check(solvers, module)

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            rank_zero_info(message)
        self._told.add(message)


class _SamplesAloneError(Exception):
    """The loss of some samples of a batch fails, where that of the whole batch did not."""


def _prefix(trainer: pl.Trainer, optimizer: Damped) -> str:
    """The prefix of the logged values of an optimizer."""
    several = sum(isinstance(o, Damped) for o in trainer.optimizers) > 1
    return f"nsgd-{trainer.optimizers.index(optimizer)}" if several else "nsgd"


def _reached(loss: Tensor) -> set[Tensor]:
    """The parameters that a loss depends on: the leaves of its graph."""
    parameters: set[Tensor] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            parameters.add(node.variable)
        nodes.extend(child for child, _ in node.next_functions)
    return parameters
