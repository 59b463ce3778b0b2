"""SharpnessMonitor: the sharpest directions of the loss along training, and what steps along them do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.callbacks.measurement import LossOf, Measurement, Parts
from nsgd.damping import Damped
from nsgd.eigen import top_eigenpairs
from nsgd.hessian import LossHessian, loss_hessian
from nsgd.trajectory.line import losses_along
from nsgd.trajectory.quadratic import OwnBatch
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
_DAMPED_PRODUCTS = 20


class SharpnessMonitor(Measurement):
    """Measure the sharpest directions of the loss and SGD's steps along them (Jastrzębski et al. 2019, 1807.05031).

    On the evaluation samples: the top ``k`` eigenvalues, the root-sum-square of the top 50 (as far as ``products``
    reach; a lower bound while they are fewer than some hundred), and cross-sections along e_1, e_3 and e_5. Of fresh
    training batches: the cosines of their gradients with each e_i, and with the gradient on the evaluation samples;
    batch sharpness; and the loss on the evaluation samples after a times their step along each e_i, along a random
    direction and as a whole, a from 1/4 to 4, beside the a that is predicted to be best. The limits of stable steps
    from the learning rate of SGD, its momentum and, where it is damped, gamma; then also the sharpness that its steps
    feel. Memory: ``products`` + 50 times the parameters while it runs.

    Args:
        samples: Evaluation samples; None for as many as the overhead pays, from 16 up to the running batch or 512.
        every: Optimizer steps from one measurement to the next, also where they cost more than the overhead; None to
            spread them over the run.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        k: Eigenvectors that steps are measured along, 1 or more.
        products: Hessian-vector products for the eigenpairs, more than k.
        batches: Training batches whose gradients are taken, each at three gradients.
        path: The CSV file; None for sharpness.csv in the folder of the logger, or in ``default_root_dir``.
        seed: Draws the samples.
    """

    name = "sharpness"
    times = 8

    def __init__(
        self,
        samples: int | None = None,
        every: int | None = None,
        overhead: float = 0.15,
        k: int = 5,
        products: int = 40,
        batches: int = 2,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(samples, every, overhead, path, seed)
        for name, count, least in (("k", k, 1), ("products", products, k + 1), ("batches", batches, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"expected {name} of at least {least}, got {count!r}")
        self.k, self.products, self.batches = k, products, batches
        self.fresh = batches

    def price(self, product: int) -> float:
        """Gradients of a measurement on as many evaluation samples as a training batch has."""
        sections = sum(i <= self.k for i in _SECTIONS) * len(OFFSETS)
        steps = self.batches * (self.k + 2) * len(MULTIPLES)
        return 1 + product * (self.products + _DAMPED_PRODUCTS) + (1 + sections + steps) / 3

    def fixed_price(self) -> float:
        """A gradient and a product of each batch."""
        return 3.0 * self.batches

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """Measure at the current parameters."""
        step, optimizer = trainer.global_step, trainer.optimizers[0]
        group = optimizer.param_groups[0]
        lr, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
        params = self.params(module)
        size = sum(p.numel() for p in params)
        count = min(_LARGEST, self.products, size)
        with loss_hessian(self.curvature_loss(loss_of), params) as hessian:
            full = hessian.gradient
            options: dict[str, Any] = {"max_hvps": self.products, "seed": self.seed, "repeated": False}
            pairs = top_eigenpairs(hessian.hvp, params, k=count, start=full, **options)
            self.spend(hessian.cost(pairs.hvps))
            if isinstance(optimizer, Damped) and optimizer.weights:
                self._felt(step, optimizer, hessian, params)
        values, vectors = pairs.eigenvalues[: self.k], pairs.eigenvectors[: self.k]
        self.note(step, "lr", lr)
        if isinstance(optimizer, torch.optim.SGD) and not group["nesterov"]:  # others have limits of their own
            self.note(step, "stability limit", stability_limit(lr=lr, momentum=momentum))
        self.note(step, "root-sum-square", root_sum_square(pairs.eigenvalues))
        for i, (value, residual) in enumerate(zip(values.tolist(), pairs.residuals.tolist(), strict=False), start=1):
            self.note(step, "eigenvalue", value, of=f"e{i}")
            self.note(step, "residual", residual, of=f"e{i}")
        batches = self.draw_batches(trainer, module, self.batches)
        gradients = [self._own(step, loss_of, [batch], params) for batch in batches]
        slopes = torch.stack([vectors @ g for g in gradients]).double().cpu()  # (batches, k)
        self._alignments(step, gradients, full, vectors)
        loss = self.loss(loss_of)
        self._steps(step, loss, params, gradients, vectors, lr)
        full_slopes = (vectors @ full).double().cpu()
        for i, value in enumerate(values.tolist()):
            predicted = best_multiple(
                lr=lr,
                eigenvalue=value,
                slope=float(full_slopes[i]),
                second_moment=float(slopes[:, i].square().mean()),
            )
            self.note(step, "predicted best multiple", predicted, of=f"e{i + 1}")
            if i + 1 in _SECTIONS:
                scale = lr * float(slopes[:, i].abs().mean())
                found = cross_section(loss, params, vectors[i], scale=scale)
                for offset, value_there in zip(OFFSETS, found.tolist(), strict=True):
                    self.note(step, "cross-section", value_there, of=f"e{i + 1}", at=offset)

    def _felt(self, step: int, optimizer: Damped, hessian: LossHessian, params: list[torch.nn.Parameter]) -> None:
        """The sharpness that a damped step feels, and the limits that damping moves."""
        group = optimizer.param_groups[0]
        lr, momentum, gamma = float(group["lr"]), float(group.get("momentum", 0.0)), float(group["gamma"])
        if gamma < 0 or group["bulk_scale"] != 1:
            return  # M^(1/2) is that of damping alone
        damped = torch.tensor(optimizer.weights) > 0
        directions = optimizer.directions(params)[damped.to(params[0].device)]
        found = damped_sharpness(
            hessian.hvp, params, directions, gamma=gamma, max_hvps=_DAMPED_PRODUCTS, seed=self.seed
        )
        self.spend(hessian.product_cost * found.hvps)
        self.note(step, "felt sharpness", found.eigenvalues[0])
        if isinstance(optimizer, torch.optim.SGD) and not group["nesterov"]:
            self.note(step, "damped stability limit", stability_limit(lr=lr, momentum=momentum, gamma=gamma))

    def _own(self, step: int, loss_of: LossOf, batch: Parts, params: list[torch.nn.Parameter]) -> Tensor:
        gradient, squared, curvature = self.along_gradient(loss_of, batch, params)
        self.note(step, "batch sharpness", OwnBatch(0.0, squared, curvature).sharpness)
        return gradient

    def _alignments(self, step: int, gradients: list[Tensor], full: Tensor, vectors: Tensor) -> None:
        for quantity, gradient in (("alignment of the full gradient", full), *(("alignment", g) for g in gradients)):
            cosines = alignment(gradient, vectors)
            for i, value in enumerate(cosines.tolist(), start=1):
                self.note(step, quantity, value, of=f"e{i}")
            self.note(step, quantity, torch.linalg.vector_norm(cosines), of="basis")
        unit = full / torch.linalg.vector_norm(full)
        for gradient in gradients:
            self.note(step, "alignment", alignment(gradient, unit[None])[0], of="full gradient")

    def _steps(
        self,
        step: int,
        loss: Any,
        params: list[torch.nn.Parameter],
        gradients: list[Tensor],
        vectors: Tensor,
        lr: float,
    ) -> None:
        """Mean losses over batches after multiples of their steps."""
        start = float(losses_along(loss, params, vectors[0], [0.0]))
        self.note(step, "loss", start)
        random = random_direction(params, seed=self.seed).to(vectors)
        directions = [(f"e{i}", vector) for i, vector in enumerate(vectors, start=1)]
        for name, direction in [*directions, ("random", random), ("whole step", None)]:
            found = [step_losses(loss, params, g, lr=lr, direction=direction) for g in gradients]
            for multiple, value in zip(MULTIPLES, torch.stack(found).mean(0).tolist(), strict=True):
                self.note(step, "change after a step", value - start, of=name, at=multiple)
