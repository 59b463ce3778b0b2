"""GradientNoise: white noise on every gradient, which tells the noise of a batch by its shape from noise as such."""

from __future__ import annotations

import pytorch_lightning as pl
import torch


class GradientNoise(pl.Callback):
    """Add independent normal noise to each entry of the gradient that a step goes by, before any clipping.

    With all the training data in a batch it is gradient descent with isotropic noise, the control of Xing et al. 2018
    (arXiv 1802.08770). The noise of a step is a function of the seed and of the number of the step, so a run that goes
    on from a checkpoint has the same. Torch's own random state is left alone. Costs one draw for each parameter.

    Args:
        std: Standard deviation, above 0.
        seed: Of the noise, at least 0.
    """

    def __init__(self, std: float, seed: int = 0) -> None:
        if not 0 < std < float("inf"):
            raise ValueError(f"expected std to be a standard deviation above 0, got {std!r}")
        if seed < 0:
            raise ValueError(f"expected seed of at least 0, got {seed!r}")
        self.std, self.seed = std, seed

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the noise of this step."""
        generator = torch.Generator(device=pl_module.device)
        generator.manual_seed((self.seed * 1_000_003 + trainer.global_step) % 2**32)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    noise = torch.randn(p.grad.shape, generator=generator, dtype=p.grad.dtype, device=p.grad.device)
                    p.grad.add_(noise, alpha=self.std)
