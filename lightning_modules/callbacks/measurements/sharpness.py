"""SharpnessMonitor: the sharpest directions of the loss along training, and what steps along them do."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_modules.callbacks.measurements.evaluation import FORWARD, LossOf, Parts
from lightning_modules.callbacks.measurements.measurement import Measurement, trainable
from lightning_modules.callbacks.measurements.steps import Groups, damping_of, groups_of, momentum_of
from lightning_modules.support import quantities
from lightning_modules.support.quantities import eigenvector
from nsgd.curvature.checks import whole_number
from nsgd.curvature.eigen import top_eigenpairs
from nsgd.curvature.hessian import Closure, LossHessian, loss_hessian
from nsgd.damping.step import Damped
from nsgd.trajectory.line import losses_along
from nsgd.trajectory.sharpness import (
    MULTIPLES,
    OFFSETS,
    alignment,
    best_multiple,
    cross_section,
    damped_sharpness,
    random_direction,
    root_sum_square,
    stability_limit,
    step_losses,
)

_LARGEST = 50  # eigenvalues in the root-sum-square, the paper's number
_SECTIONS = (1, 3, 5)  # eigenvectors that cross-sections are taken along, the paper's
_DAMPED_PRODUCTS = 10  # for one eigenvalue; on digits its residual is a thousandth of it after 7 to 11


class SharpnessMonitor(Measurement):
    """Measure the sharpest directions of the loss and SGD's steps along them (Jastrzębski et al. 2019, 1807.05031).

    On the evaluation samples: the top ``k`` eigenvalues, the cosines of the gradient with each e_i, the root-sum-square
    of the largest Ritz values (50 or ``products`` of them; a lower bound of the paper's), and cross-sections along e_1,
    e_3 and e_5. Of fresh training batches: the cosines of their gradients with each e_i, and with the gradient on the
    evaluation samples; batch sharpness; and the loss on the evaluation samples after a times their step along each e_i,
    along a random direction and as a whole, a from 1/4 to 4, beside the a that is predicted to be best. The limits of
    stable steps from the learning rate of SGD, its momentum and, where it is damped, gamma; then also the sharpness
    that its steps feel. Memory: up to ``products`` + 50 times the parameters while it runs.

    To the loggers and the progress bar, at each measurement, go the top eigenvalue (``sharpness/top``), what damped
    steps feel (``sharpness/felt``) and which multiple of the limit (2 + 2 momentum) / lr the one that counts is
    (``sharpness/of_limit``): above 1 there is a warning, and no other before it has fallen below. Few evaluation
    samples make eigenvalues larger on average, so that on 16 of them a little above 1 says little. Adam, Nesterov's
    momentum and groups at different rates have limits of their own: there is no ratio and no warning then.

    Args:
        samples: Evaluation samples; None for as many as the overhead pays, from 16 up to the running batch or 512.
        every: Optimizer steps from one measurement to the next, also where they cost more than the overhead; None to
            spread them over the run.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        k: Eigenvectors that steps are measured along, 1 or more.
        products: Hessian-vector products for the eigenpairs, more than k.
        batches: Training batches whose gradients are taken, each at three gradients.
        params: Patterns (as of files, such as ``net.0.*``) of names of the module's parameters; None for all that
            train. Everything is then of this block of the Hessian, a step that of these parameters alone, names are
            ``sharpness/net.0.*/top`` and so on. A block's eigenvalues are bounded by the whole Hessian's, so one
            above the limit is as telling, one below is not. Its sharpness under damping, whose directions span all
            parameters, and what hangs on it are left out.
        brief: True for the eigenvalues, the gradient's cosines with them and the limits alone, for long runs and
            short intervals: no fresh batches, root-sum-square, steps or cross-sections, and no more products than
            the top k take to converge.
        path: The CSV file; None for sharpness.csv in the folder of the logger, or in ``default_root_dir``.
        seed: Draws the samples.

    Raises:
        ValueError: If an option is out of range; when training starts, if a pattern matches no parameter.
    """

    name = quantities.SHARPNESS
    times = 8

    def __init__(
        self,
        samples: int | None = None,
        every: int | None = None,
        overhead: float = 0.15,
        k: int = 5,
        products: int = 20,
        batches: int = 1,
        params: list[str] | None = None,
        brief: bool = False,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(samples, every, overhead, path, seed)
        k = whole_number("k", k, least=1)
        products, batches = whole_number("products", products, least=k + 1), whole_number("batches", batches, least=1)
        if params is not None and (
            isinstance(params, str) or not params or not all(isinstance(pattern, str) for pattern in params)
        ):
            raise ValueError(
                f"expected params to be a list of patterns of parameters' names, or None for all, got {params!r}; "
                "write for example params=['net.0.*']"
            )
        self.k, self.products, self.batches, self.brief = k, products, batches, brief
        self.patterns = None if params is None else list(params)
        self.fresh = 0 if brief else batches
        self._damped = False
        self._logged: dict[str, float] = {}  # of the last measurement, for loggers and progress bar
        self._limit = math.inf
        self._above = False  # the limit, when it was last measured

    @property
    def key_options(self) -> dict[str, Any]:
        """Monitors of different layers may stand beside each other."""
        return {**super().key_options, "k": self.k, "params": self.patterns, "brief": self.brief}

    def price(self, product: int) -> float:
        """Gradients of a measurement on as many evaluation samples as a training batch has."""
        top = 1 + product * (self.products + (_DAMPED_PRODUCTS if self._damped else 0))
        sections = sum(i <= self.k for i in _SECTIONS) * len(OFFSETS)
        steps = self.batches * (self.k + 2) * len(MULTIPLES)
        return top if self.brief else top + (1 + sections + steps) * FORWARD

    def fixed_price(self) -> float:
        """A gradient and a product of each batch."""
        return 3.0 * self.fresh

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the patterns match, and forget an earlier run."""
        names = [name for name, _ in pl_module.named_parameters(remove_duplicate=False)]
        for pattern in self.patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise ValueError(
                    f"expected params to match names of the module's parameters ({shown}), got {pattern!r}, which "
                    "matches none; see module.named_parameters()"
                )
        super().on_train_start(trainer, pl_module)
        self._damped = self.patterns is None and any(isinstance(o, Damped) for o in trainer.optimizers)
        self._above = False

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure, log it, and warn where steps are not stable."""
        self._logged = {}
        super().measure(trainer, module)
        prefix = "/".join(["sharpness", *([",".join(self.patterns)] if self.patterns else [])])
        metrics = {f"{prefix}/{name}": value for name, value in self._logged.items()}
        for logger in trainer.loggers if metrics else []:
            logger.log_metrics(metrics, step=trainer.global_step)
        # Not by module.log, whose results are the module's own: in callback_metrics, and reset with them.
        trainer.progress_bar_metrics.update(metrics)
        self._warn(trainer.global_step)

    def _warn(self, step: int) -> None:
        if "of_limit" not in self._logged:
            return
        above, self._above = self._above, self._logged["of_limit"] > 1
        if above or not self._above:
            return
        if "felt" in self._logged:
            what, advice = "the sharpness that damped steps feel", "raise k or overhead of the damped optimizer"
        else:
            what, advice = "the top eigenvalue of the Hessian", "damp its sharpest directions with nsgd.NSGD"
        block = "" if self.patterns is None else f" of {', '.join(self.patterns)}"
        rank_zero_warn(
            f"SharpnessMonitor at step {step}: {what}{block}, "
            f"{self._logged.get('felt', self._logged['top']):.3g}, is above the limit of stable steps, "
            f"{self._limit:.3g} = (2 + 2 momentum) / lr: steps along that direction grow until the curvature falls. "
            f"Measured on {self.evaluation.size} samples, of which few give larger values on average: "
            f"raise samples to be sure. Where the training loss rises, lower lr, or {advice}"
        )

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """Measure at the current parameters."""
        step, params = trainer.global_step, self._block(module)
        groups = groups_of(trainer.optimizers, params)
        if not groups:  # they may be unfrozen later
            rank_zero_info(f"SharpnessMonitor measures nothing at step {step}: no optimizer trains these parameters")
            return
        lr, damping = float(groups[0][1]["lr"]), damping_of(groups) if self.patterns is None else None
        size = sum(p.numel() for p in params)
        count = min(self.k if self.brief else _LARGEST, self.products, size)
        with loss_hessian(self.evaluation.curvature_loss(loss_of), params) as hessian:
            full = hessian.gradient
            options: dict[str, Any] = {"max_hvps": self.products, "seed": self.seed, "repeated": False}
            pairs = top_eigenpairs(hessian.hvp, params, k=count, start=full, **options)
            self.evaluation.spend(hessian.cost(pairs.hvps))
            self._logged["top"] = float(pairs.eigenvalues[0])
            if damping is not None:
                self._felt(step, *damping, hessian, params)
        note = partial(self.table.note, step)
        note(quantities.PARAMETERS, size, of=", ".join(self.patterns or ()))
        note(quantities.EVALUATION_SAMPLES, self.evaluation.size)
        note(quantities.LR, lr)
        self._limits(step, groups, lr, None if damping is None else damping[1])
        values, vectors = pairs.eigenvalues[: self.k], pairs.eigenvectors[: self.k]
        for i, (value, residual) in enumerate(zip(values.tolist(), pairs.residuals.tolist(), strict=False), start=1):
            note(quantities.EIGENVALUE, value, of=eigenvector(i))
            note(quantities.RESIDUAL, residual, of=eigenvector(i))
        self._cosines(step, quantities.FULL_ALIGNMENT, full, vectors)
        if not self.brief:
            note(quantities.ROOT_SUM_SQUARE, root_sum_square(pairs.eigenvalues))
            batches = self.evaluation.draw_batches(trainer, module, self.batches)
            gradients = [self._batch_gradient(step, loss_of, [batch], params) for batch in batches]
            self._decomposition(step, loss_of, params, lr, gradients, full, values, vectors)

    def _limits(self, step: int, groups: Groups, lr: float, gamma: float | None) -> None:
        """The limits of stable steps, where the optimizer is one whose limits are known."""
        momentum = momentum_of(groups)
        if momentum is None:
            return
        self._limit = stability_limit(lr=lr, momentum=momentum)
        self.table.note(step, quantities.STABILITY_LIMIT, self._limit)
        if gamma is not None:
            damped_limit = stability_limit(lr=lr, momentum=momentum, gamma=gamma)
            self.table.note(step, quantities.DAMPED_STABILITY_LIMIT, damped_limit)
        if gamma is not None or not any(isinstance(o, Damped) for o, _ in groups):
            self._logged["of_limit"] = self._logged.get("felt", self._logged["top"]) / self._limit

    def _block(self, module: pl.LightningModule) -> list[nn.Parameter]:
        """The parameters that are measured; those that are tied have a name each."""
        if self.patterns is None:
            return trainable(module)
        named = module.named_parameters(remove_duplicate=False)
        matched = (p for name, p in named if any(fnmatchcase(name, pattern) for pattern in self.patterns))
        return [p for p in dict.fromkeys(matched) if p.requires_grad]

    def _felt(
        self, step: int, optimizer: Damped, gamma: float, hessian: LossHessian, params: list[nn.Parameter]
    ) -> None:
        """The sharpness that a damped step feels."""
        damped = torch.tensor(optimizer.weights, device="cpu") > 0
        directions = optimizer.directions(params)[damped.to(params[0].device)]
        felt = damped_sharpness(hessian.hvp, params, directions, gamma=gamma, max_hvps=_DAMPED_PRODUCTS, seed=self.seed)
        self.evaluation.spend(hessian.product_cost * felt.hvps)
        self._logged["felt"] = float(felt.eigenvalues[0])
        self.table.note(step, quantities.FELT_SHARPNESS, felt.eigenvalues[0])
        self.table.note(step, quantities.RESIDUAL, felt.residuals[0], of=quantities.FELT_SHARPNESS)

    def _decomposition(
        self,
        step: int,
        loss_of: LossOf,
        params: list[nn.Parameter],
        lr: float,
        gradients: list[Tensor],
        full: Tensor,
        values: Tensor,
        vectors: Tensor,
    ) -> None:
        """Batches' gradients and steps in the directions, and cross-sections along these."""
        unit = full / torch.linalg.vector_norm(full)
        for gradient in gradients:
            self._cosines(step, quantities.ALIGNMENT, gradient, vectors)
            self.table.note(step, quantities.ALIGNMENT, alignment(gradient, unit[None])[0], of=quantities.FULL_GRADIENT)
        slopes = torch.stack([vectors @ g for g in gradients]).double().cpu()  # (batches, k)
        loss = self.evaluation.loss(loss_of)
        self._steps(step, loss, params, gradients, vectors, lr)
        full_slopes = (vectors @ full).double().cpu()
        for i, value in enumerate(values.tolist()):
            name = eigenvector(i + 1)
            predicted = best_multiple(
                lr=lr,
                eigenvalue=value,
                slope=float(full_slopes[i]),
                second_moment=float(slopes[:, i].square().mean()),
            )
            self.table.note(step, quantities.BEST_MULTIPLE, predicted, of=name)
            if i + 1 in _SECTIONS:
                scale = lr * float(slopes[:, i].abs().mean())
                losses = cross_section(loss, params, vectors[i], scale=scale)
                for offset, loss_there in zip(OFFSETS, losses.tolist(), strict=True):
                    self.table.note(step, quantities.CROSS_SECTION, loss_there, of=name, at=offset)

    def _batch_gradient(self, step: int, loss_of: LossOf, batch: Parts, params: list[nn.Parameter]) -> Tensor:
        gradient, quadratic = self.evaluation.along_gradient(loss_of, batch, params)
        self.table.note(step, quantities.BATCH_SHARPNESS, quadratic.sharpness)
        return gradient

    def _cosines(self, step: int, quantity: str, gradient: Tensor, vectors: Tensor) -> None:
        cosines = alignment(gradient, vectors)
        for i, value in enumerate(cosines.tolist(), start=1):
            self.table.note(step, quantity, value, of=eigenvector(i))
        self.table.note(step, quantity, torch.linalg.vector_norm(cosines), of=quantities.BASIS)

    def _steps(
        self,
        step: int,
        loss: Closure,
        params: list[nn.Parameter],
        gradients: list[Tensor],
        vectors: Tensor,
        lr: float,
    ) -> None:
        """Mean losses over batches after multiples of their steps."""
        start = float(losses_along(loss, params, vectors[0], [0.0]))
        self.table.note(step, quantities.LOSS, start)
        directions: list[tuple[str, Tensor | None]] = [(eigenvector(i), v) for i, v in enumerate(vectors, start=1)]
        directions.append((quantities.RANDOM, random_direction(params, seed=self.seed).to(vectors)))
        directions.append((quantities.WHOLE_STEP, None))
        for name, direction in directions:
            losses = torch.stack([step_losses(loss, params, g, lr=lr, direction=direction) for g in gradients])
            for multiple, value in zip(MULTIPLES, losses.mean(0).tolist(), strict=True):
                self.table.note(step, quantities.CHANGE, value - start, of=name, at=multiple)
