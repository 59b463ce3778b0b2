"""Sharpness-aware minimisation (SAM), the baseline that goes by sharpness in another way, for any LightningModule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_modules.models.batch_loss import loss_in, run_step, unnoticed
from lightning_modules.models.classifier import Classifier
from nsgd.curvature.copies import fresh_batch
from nsgd.curvature.guard import RandomState, untouched


class _Steps(pl.LightningModule):
    """The part that SAM adds to a LightningModule whose ``training_step`` gives a loss; mixed in before its class."""

    gradients_per_step: ClassVar[int] = 2

    _sam: dict[str, float]  # lr, rho, momentum and weight_decay, apart from attributes that the module may have

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SAM over SGD."""
        from pytorch_optimizer import SAM  # here, since it brings a hundred optimizers and takes 0.4 s to import

        options: dict[str, Any] = dict(self._sam)
        return SAM(self.parameters(), torch.optim.SGD, **options)

    def on_fit_start(self) -> None:
        """Refuse what would train otherwise than it says."""
        super().on_fit_start()
        if self.trainer.world_size > 1:
            raise ValueError(
                f"expected one process for SAM, got {self.trainer.world_size}: the second gradient would not be "
                "averaged over them; train on one device"
            )
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "expected float32 or bfloat16 for SAM, got float16 with a gradient scaler, which takes one gradient a "
                "step; train with precision='bf16-mixed'"
            )
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in self.trainer.lr_scheduler_configs):
            raise ValueError(
                "expected a scheduler that goes by steps or epochs, got ReduceLROnPlateau, whose metric Lightning "
                "drops under manual optimization; take another one"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Take a step; what the module's own ``training_step`` gives back before it."""
        drawn, again = RandomState(self.device), fresh_batch(batch)  # the first pass may consume its batch
        output = run_step(super().training_step, batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_in(output, self))

        has_own = hasattr(super(), "curvature_loss")  # which leaves metrics and logs alone by itself

        def gradient_at_perturbed_weights() -> None:
            with untouched(self, device=self.device) if has_own else unnoticed(self):
                drawn.restore()  # the same dropout
                self.manual_backward(self.curvature_loss(again, batch_idx))

        optimizer.step(gradient_at_perturbed_weights)  # one for trainer.global_step
        self._step_schedulers(batch_idx)
        return output

    def curvature_loss(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The loss of a batch and nothing else; callbacks measure with it, as ``training_step`` takes steps."""
        of_base = getattr(super(), "curvature_loss", None)
        return loss_in(run_step(super().training_step, batch, batch_idx) if of_base is None else of_base(batch), self)

    def _step_schedulers(self, batch_idx: int) -> None:
        for config in self.trainer.lr_scheduler_configs:
            by_step = config.interval == "step"
            count = (batch_idx if by_step else self.current_epoch) + 1
            if (by_step or self.trainer.is_last_batch) and count % config.frequency == 0:
                self.lr_scheduler_step(config.scheduler, None)


class SharpnessAware(_Steps, Classifier):
    """The classifier trained by SAM (Foret et al., ICLR 2021) over ``torch.optim.SGD``, by manual optimization.

    A step takes two gradients of the batch: one at the weights, and one ``rho`` along it, which is the one that SGD
    steps with from the weights, both with the same dropout, and the second on a copy of the batch, which a loss may
    consume. What is logged, and BatchNorm's running statistics, are of the first pass alone. ``rho=0`` is SGD, bit for
    bit. Learning-rate schedulers are stepped as under automatic optimization.

    Args:
        net: As in :class:`Classifier`, with the next three and ``sizes``.
        input_shape: Channels, height and width of an image.
        num_classes: Number of classes.
        lr: Learning rate of SGD.
        sizes: Sizes in place of the network's own, by name.
        rho: Distance from the weights to those of the second gradient.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, taken at the weights.

    Raises:
        ValueError: If an option is out of range; when training starts, with several processes, mixed precision in
            float16, or ``ReduceLROnPlateau``.
    """

    def __init__(
        self,
        net: str = "mlp",
        input_shape: Sequence[int] = (1, 8, 8),
        num_classes: int = 10,
        lr: float = 0.1,
        *,
        sizes: dict[str, Any] | None = None,
        rho: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(net, input_shape, num_classes, lr, sizes=sizes)
        self.rho, self.momentum, self.weight_decay = rho, momentum, weight_decay
        _begin(self, lr=lr, rho=rho, momentum=momentum, weight_decay=weight_decay)


def sharpness_aware(
    module: pl.LightningModule, *, lr: float, rho: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0
) -> pl.LightningModule:
    """Have SAM train any LightningModule with automatic optimization, in place, as in :class:`SharpnessAware`.

    Args:
        module: Its class becomes a subclass of the one it had, and its own optimizers and schedules are not used.
        lr: Learning rate of SGD.
        rho: Distance from the weights to those of the second gradient.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, taken at the weights.

    Returns:
        The same object.

    Raises:
        ValueError: As in :class:`SharpnessAware`, or if the module optimizes manually.
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"expected a module with automatic optimization for SAM, got {type(module).__name__}, which takes its own "
            "optimizer steps"
        )
    kind = type(module)
    module.__class__ = type(f"SharpnessAware{kind.__name__}", (_Steps, kind), {"__module__": __name__})
    _begin(cast(_Steps, module), lr=lr, rho=rho, momentum=momentum, weight_decay=weight_decay)
    return module


def _begin(module: _Steps, **options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"expected {name} to be a finite number >= 0, got {value}")
    module.automatic_optimization = False
    module._sam = options
