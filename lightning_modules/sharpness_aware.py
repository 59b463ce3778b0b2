"""Sharpness-aware minimisation (SAM), the baseline that goes by sharpness in another way, with our classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_modules.classifier import Batch, Classifier
from nsgd.guard import untouched


class SharpnessAware(Classifier):
    """The classifier trained by SAM (Foret et al., ICLR 2021) over ``torch.optim.SGD``, by manual optimization.

    A step takes two gradients of the batch: one at the weights, and one ``rho`` along it, which is the one that SGD
    steps with from the weights. What is logged, and BatchNorm's running statistics, are of the first pass alone.
    ``rho=0`` is SGD, bit for bit. Learning-rate schedulers are stepped as under automatic optimization.

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

    gradients_per_step: ClassVar[int] = 2

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
        for name, value in (("lr", lr), ("rho", rho), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"expected {name} to be a finite number >= 0, got {value}")
        super().__init__(net, input_shape, num_classes, lr, sizes=sizes)
        self.automatic_optimization = False
        self.rho, self.momentum, self.weight_decay = rho, momentum, weight_decay

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SAM over SGD."""
        from pytorch_optimizer import SAM  # here, since it brings a hundred optimizers and takes 0.4 s to import

        return SAM(
            self.parameters(),
            torch.optim.SGD,
            rho=self.rho,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def on_fit_start(self) -> None:
        """Refuse what would train otherwise than it says."""
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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Take a step; the mean loss of the batch before it."""
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)

        def gradient_at_perturbed_weights() -> None:
            with untouched(self.net, device=self.device):
                self.manual_backward(self.curvature_loss(batch))

        optimizer.step(gradient_at_perturbed_weights)  # one for trainer.global_step
        self._step_schedulers(batch_idx)
        return loss

    def curvature_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch and nothing else; callbacks measure with it, as ``training_step`` takes steps."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        return loss

    def _step_schedulers(self, batch_idx: int) -> None:
        for config in self.trainer.lr_scheduler_configs:
            by_step = config.interval == "step"
            count = (batch_idx if by_step else self.current_epoch) + 1
            if (by_step or self.trainer.is_last_batch) and count % config.frequency == 0:
                self.lr_scheduler_step(config.scheduler, None)
