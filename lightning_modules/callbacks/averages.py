"""Weight averages as read-outs of one run: EMA, SWA and two points beside the last weights.

An average is never a run of its own. All are gathered along the same trajectory, which they do not touch, and each
is read out with BatchNorm statistics recalibrated on the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from lightning_modules.callbacks.evaluation_weights import evaluation_weights
from lightning_modules.data.training_samples import in_batches, training_samples
from lightning_modules.models.batch_loss import batch_losses
from lightning_modules.support.read_outs import READ_OUTS, Average, Kind, averages, kind_of
from nsgd.curvature.guard import untouched
from nsgd.trajectory.averaging import swa_weights, two_point_weights


class ReadOuts(pl.Callback):
    """Gather averages of the weights while a module trains; training itself stays bit-identical.

    Args:
        ema_decay: Decay of the exponential moving average, updated every step; (1 + t) / (10 + t) while that is less.
        swa_share: Share of the steps, at the end, that the uniform average (SWA) runs over, step by step.
        two_point_share: Distance of the two averaged points, as a share of all steps; the second is the last.
        best_by: Name of what the module logs in validation, and whether less or more of it is better ("min", "max").
            The weights with the best of it are a read-out too, "best", and :attr:`start` holds those before training;
            None for neither.
        more: Names of averages at other settings, read out under these: "ema-0.9" (decay), "swa-0.5" (share of the
            steps), "two-point-16" (steps between the points).

    A run whose number of steps is not known beforehand has exponential averages only. Averages are kept in float32 at
    least, whatever the weights are in, and rounded where they are read out. Memory: three times the parameters, twice
    more with the best, and once more for each of ``more``. State is saved in checkpoints.

    Raises:
        ValueError: If a setting is out of range, or two of ``more`` are the same.
    """

    def __init__(
        self,
        ema_decay: float = 0.99,
        swa_share: float = 0.25,
        two_point_share: float = 0.1,
        best_by: tuple[str, Literal["min", "max"]] | None = None,
        more: Sequence[str] = (),
    ) -> None:
        for name, value in (("ema_decay", ema_decay), ("swa_share", swa_share), ("two_point_share", two_point_share)):
            if not 0 < value < 1:
                raise ValueError(f"expected {name} between 0 and 1, got {value}")
        self.ema_decay, self.swa_share, self.two_point_share = ema_decay, swa_share, two_point_share
        self.best_by, self.start = best_by, list[Tensor]()
        self.more = averages(more)
        self._best = math.inf  # so far, turned round where more is better
        self.apart: Callable[[], AbstractContextManager[None]] = nullcontext  # around what gathering takes
        self._averages: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._seen = 0  # steps of all optimizers
        self._batches = 0  # after which there were new ones
        self._training: list[bool] | None = None  # modes of all modules in the last of them

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the weights in after every batch in which an optimizer has stepped."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self._batches += 1
        self._training = [m.training for m in pl_module.modules()]
        with self.apart(), evaluation_weights(trainer.optimizers):
            self._gather(trainer, pl_module, self._batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights, where they are the best so far, as the optimizer is judged by them."""
        if self.best_by is None or trainer.sanity_checking or self.best_by[0] not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.best_by[0]])
        value = -value if self.best_by[1] == "max" else value
        if value < self._best:
            with self.apart():
                self._best = value
                self._averages["best"] = [_wide(p).clone() for p in pl_module.parameters()]

    def _gather(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        for name, decay in self._settings("ema", self.ema_decay):
            warm = _warm_decay(decay, step)
            self._update(name, pl_module, get_ema_multi_avg_fn(warm))  # type: ignore[no-untyped-call]
        total = trainer.estimated_stepping_batches
        if trainer.max_steps > 0:  # which counts the steps of each optimizer, of several in a batch
            total = min(total, trainer.max_steps * step / self._seen)
        if not 0 < total < math.inf:  # a run of unknown length has no last share
            return
        mean = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        for name, share in self._settings("swa", self.swa_share):
            if _in_share(step, share, total):
                self._update(name, pl_module, mean)
        first = max(1, round(total * (1 - self.two_point_share)))
        for name, spacing in self._settings("two-point", round(total) - first):
            if step == round(total) - spacing:
                self._update(name, pl_module, mean)

    def _settings(self, kind: Kind, default: float) -> list[tuple[str, float]]:
        """Names of the averages of a kind with their settings, that under its plain name first."""
        return [(kind, default), *((a.name, a.value) for a in self.more if a.kind == kind)]

    @torch.no_grad()
    def _update(self, name: str, module: pl.LightningModule, average: Any) -> None:
        current = [_wide(p) for p in module.parameters()]
        if name not in self._averages:
            self._averages[name] = [p.clone() for p in current]
        else:
            average(self._averages[name], current, self._counts[name])
        self._counts[name] = self._counts.get(name, 0) + 1

    @property
    def available(self) -> list[str]:
        """The read-outs that have been gathered; an average that never began is not among them."""
        every = [*READ_OUTS, *(one.name for one in self.more)]
        return [name for name in every if name == "last" or name in self._averages]

    @contextmanager
    def applied(
        self, name: str, module: pl.LightningModule, calibration: Iterable[Any] | None = None
    ) -> Iterator[pl.LightningModule]:
        """Hold the module at a read-out, in eval mode; its weights, buffers and modes are put back on leaving.

        Args:
            name: One of :attr:`available`.
            module: The module that was trained.
            calibration: Training batches, on the module's device, that BatchNorm statistics are taken from, by the
                module's own training loss; without them those of the run are kept, which belong to its last weights.

        Raises:
            ValueError: If this read-out was not gathered.
        """
        if name not in self.available:
            raise ValueError(f"expected a read-out among {', '.join(self.available)}, got {name!r}")
        params = list(module.parameters())
        with untouched(module, device=module.device):
            if name != "last":
                values = self._averages[name]
                if kind_of(name) == "two-point":
                    values = [(a + p.detach().to(a)) / 2 for a, p in zip(values, params, strict=True)]
                _assign(params, values)
            module.eval()
            if calibration is not None:
                _recalibrate(module, calibration, self._training)
            yield module

    def state_dict(self) -> dict[str, Any]:
        """The averages so far."""
        so_far = {"averages": self._averages, "counts": self._counts, "seen": self._seen, "batches": self._batches}
        return {**so_far, "best": self._best, "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved averages."""
        self._averages, self._counts = state_dict["averages"], state_dict["counts"]
        self._seen = state_dict["seen"]
        self._batches = state_dict.get("batches", self._seen)
        self._best, self.start = state_dict.get("best", math.inf), state_dict.get("start", [])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move loaded averages to the module's device, and to the type that they are kept in; keep the start."""
        self._averages = {
            name: [a.to(_wide(p)) for a, p in zip(values, pl_module.parameters(), strict=True)]
            for name, values in self._averages.items()
        }
        if self.best_by is not None and not self.start:
            self.start = [p.detach().clone() for p in pl_module.parameters()]


def average_weights(average: Average, steps: int) -> Tensor:
    """What each of a run's weights counts in an average that is gathered along it, (steps + 1,), those before it first.

    Args:
        average: One of a run of so many steps.
        steps: Of the run, 1 or more.

    Raises:
        ValueError: If such a run has no such average.
    """
    average.check(steps)
    if average.kind == "two-point":
        return two_point_weights(steps, spacing=round(average.value))
    if average.kind == "swa":
        return swa_weights(steps, window=sum(_in_share(t, average.value, steps) for t in range(1, steps + 1)))
    # The first that is taken in is the average then: in it nothing is left of those before.
    decays = [1.0, 0.0, *(_warm_decay(average.value, step) for step in range(2, steps + 1))]
    kept = torch.tensor([*decays[1:], 1.0], dtype=torch.float64, device="cpu").flip(0).cumprod(0).flip(0)
    return (1 - torch.tensor(decays, dtype=torch.float64, device="cpu")) * kept


def _warm_decay(decay: float, step: int) -> float:
    """Of a step of the exponential average: without a warm-up a short run would read out its initial weights."""
    return min(decay, (1 + step) / (10 + step))


def _in_share(step: int, share: float, total: float) -> bool:
    """Whether a step, from 1 on, is among the last share of all."""
    return step > total * (1 - share)


def _wide(p: Tensor) -> Tensor:
    """A parameter's values in float32 at least: in bfloat16 most of an average's small increments round away."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32))


@torch.no_grad()
def _assign(params: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def calibration_batches(trainer: pl.Trainer, module: pl.LightningModule, count: int, *, otherwise: str) -> Any:
    """Training batches for BatchNorm statistics, the same for each read-out; None without BatchNorm.

    Args and errors: as :func:`lightning_modules.data.training_samples.training_samples`; batches have at most 128
    samples.
    """
    if not _norms(module):
        return None
    parts = in_batches(128)
    return [batch for batch, _ in training_samples(trainer, module, count, seed=0, parts=parts, otherwise=otherwise)]


def _norms(module: torch.nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def _recalibrate(module: pl.LightningModule, batches: Iterable[Any], training: Sequence[bool] | None) -> None:
    """Take BatchNorm statistics anew, as the mean over batches, like ``torch.optim.swa_utils.update_bn``.

    By the training loss, which any module has, and not by ``forward``, which need not be what it trains with. Layers
    that training leaves alone, frozen in eval mode or in another network, keep theirs.
    """
    norms = [m for m in _norms(module) if m.track_running_stats]
    with batch_losses(module) as loss, torch.no_grad():  # puts buffers, modes and momenta back
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # the mean over all batches
        module.train()
        if training is not None:
            for m, mode in zip(module.modules(), training, strict=True):
                m.training = mode
        for i, batch in enumerate(batches):
            loss(batch, i)
        statistics_of_norms = [dict(m.named_buffers(recurse=False)) for m in norms]
    for m, statistics in zip(norms, statistics_of_norms, strict=True):
        if statistics["num_batches_tracked"] > 0:
            for name, value in statistics.items():
                getattr(m, name).copy_(value)
