"""What every measurement along a training path shares: when, on which samples, at what cost, and where it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_modules.data.cutting import batch_size_of
from lightning_modules.data.training_samples import in_batches, seed_generators, training_samples
from lightning_modules.models.batch_loss import batch_losses
from lightning_modules.support.files import Rows, unused, write_csv
from nsgd.curvature.hessian import Closure, Losses
from nsgd.trajectory.sharpness import own_batch

LossOf = Callable[[Any, int], Tensor]
Parts = list[tuple[Any, int]]  # batches with their sample counts

FORWARD = 1 / 3  # of a gradient
_LEAST, _MOST = 16, 512  # evaluation samples, where the overhead decides


@dataclass(frozen=True)
class Plan:
    """When a measurement begins, and on how many samples."""

    starts: list[int]  # optimizer steps taken before
    samples: int


def plan(
    *,
    steps: float,
    price: float,
    fixed: float,
    samples: int | None,
    times: int,
    length: int,
    overhead: float,
    batch: int,
    most: int,
) -> Plan:
    """Spread measurements over a run so that they cost no more than an overhead, on as many samples as that pays.

    Fewer of them where the least number of samples costs too much; one at least, whatever it costs.

    Args:
        steps: Optimizer steps of the run.
        price: Gradients of a measurement on as many evaluation samples as a training batch has.
        fixed: Gradients of a measurement that no number of samples changes.
        samples: Evaluation samples, or None for 16 or more.
        times: Measurements that are wanted.
        length: Steps that one extends over.
        overhead: Gradients a step that they may cost.
        batch: Samples of a training batch.
        most: Evaluation samples where the overhead would pay more.
    """
    fewest = min(_LEAST, most) if samples is None else samples
    times = min(times, int(overhead * steps / (fixed + price * fewest / batch)), int(steps) // length)
    times = max(1, times)
    if samples is None:
        samples = min(max(fewest, int((overhead * steps / times - fixed) / price * batch)), most)
    last = max(0, int(steps) - length)
    starts = {round(last * i / (times - 1)) for i in range(times)} if times > 1 else {last // 2}
    return Plan(sorted(starts), samples)


class Measurement(pl.Callback):
    """Base of the measurements: training stays bit-identical, and what they cost is counted.

    Losses are those of :func:`lightning_modules.models.batch_loss.batch_losses` on a fixed sample of the training set,
    drawn once with its augmentation, cut into the same batches each time and evaluated with the same random numbers.
    Rows go to one CSV file: the number of the measurement, the optimizer steps before, a quantity, what it is of, where
    it is, and its value.

    Args:
        samples: Evaluation samples; None for as many as the overhead pays, from 16 up to the running batch or 512.
        every: Optimizer steps from the beginning of one measurement to that of the next, also where they cost more
            than the overhead; None to spread them over the run.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        path: The CSV file; None for one named after the measurement in the folder of the logger, or in
            ``default_root_dir`` where there is none.
        seed: Draws the samples.

    Raises:
        ValueError: If an option is out of range; when training starts, if the number of steps is not known and
            ``every`` is not given, or if the training set is a stream.
    """

    name: ClassVar[str]
    times: ClassVar[int]  # measurements in a run, if the overhead pays them
    length = 1  # optimizer steps that one extends over
    fresh = 0  # training batches that one draws

    def __init__(
        self,
        samples: int | None = None,
        every: int | None = None,
        overhead: float = 0.15,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        for name, count in (("samples", samples), ("every", every)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"expected {name} of at least 1, or None for the default, got {count!r}")
        if not 0 < overhead < math.inf:
            raise ValueError(f"expected overhead to be a finite number above 0, got {overhead}")
        self.samples, self.every, self.overhead, self.seed = samples, every, overhead, seed
        self.path = None if path is None else Path(path)
        self.rows: Rows = []
        self.gradients, self.seconds = 0.0, 0.0  # what measuring has cost so far
        self.planned: Plan | None = None
        self._batch_size = 1  # samples of a gradient, accumulation included
        self.evaluation: Parts = []
        self._begun, self._seen = 0, -1  # measurements so far, and optimizer steps when a batch last came
        self._file: Path | None = None

    # -- what a measurement says of itself ---------------------------------------------------------------------

    def price(self, product: int) -> float:
        """Gradients of one measurement on as many evaluation samples as a training batch has.

        Args:
            product: Gradients of a Hessian-vector product, 2 on one graph, 3 where there is one a batch.
        """
        raise NotImplementedError

    def fixed_price(self) -> float:
        """Gradients, of one running batch each, that a measurement takes on batches of its own."""
        return 0.0

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """Measure, or begin to, before the step that comes."""
        raise NotImplementedError

    # -- what they share -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier run."""
        if trainer.global_step == 0:
            self.rows, self._begun, self.gradients, self.seconds = [], 0, 0.0, 0.0
        self._seen = trainer.global_step - 1
        self.planned, self.evaluation, self._file = None, [], None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is due."""
        if self.planned is None:
            self.planned = self._planned(trainer, batch)
            self._prepare(trainer, pl_module)
        step = trainer.global_step
        due, self._seen = self.is_due(step), step
        if due:
            self.measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what it cost."""
        if self._file is not None and trainer.global_step:
            rank_zero_info(
                f"{type(self).__name__} measured {self._begun} times at {self.gradients:.0f} gradients, "
                f"{100 * self.gradients / trainer.global_step:.0f} % of training's {trainer.global_step}, in "
                f"{self.seconds:.1f} s: {self._file}"
            )

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin a measurement, and write what it found."""
        self._begun += 1
        with self.measuring(trainer, module) as loss_of:
            try:
                self.begin(trainer, module, loss_of)
            except FloatingPointError as error:  # training has diverged, which is not for a measurement to end
                rank_zero_info(f"{type(self).__name__} measures nothing at step {trainer.global_step}: {error}")
        self.write(trainer)

    def _planned(self, trainer: pl.Trainer, batch: Any) -> Plan:
        size = batch_size_of(batch) or 1
        self._batch_size = size * trainer.accumulate_grad_batches
        steps = float(self.every or trainer.estimated_stepping_batches)  # that the overhead is of
        if not 0 < steps < math.inf:
            raise ValueError(
                f"{type(self).__name__} spreads its measurements over the run, whose number of steps is not known; "
                "give every=, or the trainer max_steps="
            )
        product = 2 if (self.samples or 0) <= size else 3
        found = plan(
            steps=steps,
            price=self.price(product),
            fixed=self.fixed_price() / trainer.accumulate_grad_batches,
            samples=self.samples,
            times=1 if self.every else self.times,
            length=self.length,
            overhead=self.overhead,
            batch=self._batch_size,
            most=min(_MOST, size),  # so that one graph holds them all
        )
        return Plan([], found.samples) if self.every else found

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw the evaluation samples, and find out before the first step what would end the run at a later one."""
        assert self.planned is not None
        with batch_losses(module):
            if self.planned.samples:
                self.evaluation = self.draw(trainer, module, self.planned.samples, seed=self.seed)
            if self.fresh:
                self.draw_batches(trainer, module, self.fresh)

    def is_due(self, step: int) -> bool:
        """Whether a measurement begins after so many optimizer steps; several may have been taken on one batch."""
        if self.every:
            return step // self.every > self._seen // self.every
        assert self.planned is not None
        return any(self._seen < start <= step for start in self.planned.starts)

    @contextmanager
    def measuring(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[LossOf]:
        """A function from a batch to its loss, by the clock of the measurement."""
        began = time.perf_counter()
        try:
            with batch_losses(module) as loss_of:
                yield loss_of
        finally:
            self.seconds += time.perf_counter() - began

    @staticmethod
    def params(module: pl.LightningModule) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for p in module.parameters() if p.requires_grad]

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule, count: int, *, seed: int) -> Parts:
        """Training samples in batches no larger than a training batch."""
        micro = self._batch_size // trainer.accumulate_grad_batches
        otherwise = f"take {type(self).__name__} out"
        return training_samples(trainer, module, count, seed=seed, parts=in_batches(micro), otherwise=otherwise)

    def draw_batches(self, trainer: pl.Trainer, module: pl.LightningModule, count: int) -> Parts:
        """So many training batches, fresh at each optimizer step; none has a sample of another."""
        size = self._batch_size // trainer.accumulate_grad_batches
        batches = self.draw(trainer, module, count * size, seed=self.seed + 1 + trainer.global_step)
        if len(batches) < count or batches[-1][1] < size:
            raise ValueError(
                f"{type(self).__name__} expected a training set of {count} batches or more, got "
                f"{sum(n for _, n in batches)} samples for batches of {size}; lower the batch size"
            )
        return batches

    def loss(self, loss_of: LossOf, parts: Parts | None = None) -> Closure:
        """The mean loss of batches, by default of the evaluation samples, whose forward passes are counted."""
        parts = self.evaluation if parts is None else parts
        total = sum(n for _, n in parts)

        def mean() -> Tensor:
            self.spend(FORWARD, parts)
            losses = [self._seeded(loss_of, batch)() * (n / total) for batch, n in parts]
            return torch.stack(losses).sum()

        return mean

    def curvature_loss(self, loss_of: LossOf, parts: Parts | None = None) -> Closure | Losses:
        """The same for Hessian-vector products, whose cost the caller counts: one graph, or one for each batch."""
        parts = self.evaluation if parts is None else parts
        pairs = [(self._seeded(loss_of, batch), n) for batch, n in parts]
        return pairs[0][0] if len(pairs) == 1 else pairs

    def along_gradient(self, loss_of: LossOf, batch: Parts, params: list[nn.Parameter]) -> tuple[Tensor, float, float]:
        """A batch's gradient g (P,), its square |g|^2 and the curvature along it g^T H g; counted."""
        gradient, own = own_batch(self.loss(loss_of, batch), params)
        self.spend(3 - FORWARD, batch)  # the forward pass is counted
        return gradient, own.squared_gradient, own.curvature

    def _seeded(self, loss_of: LossOf, batch: Any) -> Closure:
        """The loss of a batch with the same dropout masks each time."""

        def loss() -> Tensor:
            seed_generators(self.seed)
            return loss_of(batch, 0)

        return loss

    def spend(self, gradients: float, parts: Parts | None = None) -> None:
        """Count work on batches, by default on the evaluation samples."""
        samples = sum(n for _, n in (self.evaluation if parts is None else parts))
        self.gradients += gradients * samples / self._batch_size

    def note(self, step: int, quantity: str, value: float | Tensor, *, of: str = "", at: float | None = None) -> None:
        """Add a row."""
        row = {"measurement": self._begun, "step": step, "quantity": quantity, "of": of}
        self.rows.append({**row, "at": "" if at is None else at, "value": float(value)})

    def write(self, trainer: pl.Trainer) -> None:
        """Write the rows so far."""
        if self._file is None:
            self._file = unused(self.path or Path(trainer.log_dir or trainer.default_root_dir) / f"{self.name}.csv")
        if trainer.is_global_zero:
            write_csv(self._file, self.rows)

    @property
    def key_options(self) -> dict[str, Any]:
        """Several measurements of a kind may stand beside each other, if one of these options differs."""
        options = {"samples": self.samples, "every": self.every, "overhead": self.overhead, "seed": self.seed}
        return {**options, "path": None if self.path is None else str(self.path)}

    @property
    def state_key(self) -> str:
        """What a checkpoint knows this measurement by."""
        return self._generate_state_key(**self.key_options)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and what they cost."""
        return {"rows": self.rows, "begun": self._begun, "gradients": self.gradients, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved rows."""
        self.rows, self._begun = state_dict["rows"], state_dict["begun"]
        self.gradients, self.seconds = state_dict["gradients"], state_dict["seconds"]
