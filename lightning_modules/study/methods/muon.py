"""Muon for a whole network, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.hessian import Closure


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` on matrices and on kernels flattened to matrices, ``torch.optim.AdamW`` on all the rest.

    One learning rate serves both: Muon's steps are scaled to the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``,
    Liu et al. 2025, arXiv 2502.16982). A kernel (O, I, H, W) counts as a matrix (O, I H W). State: one momentum buffer
    for matrices, AdamW's two moments for the rest.

    Args:
        params: Parameters of the network.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, of both.
        momentum: Momentum of Muon.

    Raises:
        ValueError: If this torch has no Muon, which 2.9 was the first to have, or an option is out of range.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.005, *, weight_decay: float = 0.01, momentum: float = 0.95
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"expected torch 2.9 or later for Muon, got {torch.__version__}; upgrade torch")
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum)):
            if not value >= 0:
                raise ValueError(f"expected {name} >= 0, got {value}")
        every = list(params)
        parts = [([p for p in every if (p.dim() > 1) == is_matrix], is_matrix) for is_matrix in (True, False)]
        groups = [{"params": part, "is_matrix": is_matrix} for part, is_matrix in parts if part]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]  # as torch's own, with a closure
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                self._step(group, params)
        return loss

    def _step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """By torch's optimizer, on views of the parameters, with the state that is kept here."""
        options = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        if group["is_matrix"]:
            views = [p.detach().flatten(1) for p in params]
            muon = {"momentum": group["momentum"], "adjust_lr_fn": "match_rms_adamw"}
            # Made for the step alone, so that nothing but groups and state has to be saved, copied or pickled.
            optimizer: torch.optim.Optimizer = torch.optim.Muon(views, **options, **muon)
        else:
            views = [p.detach() for p in params]
            optimizer = torch.optim.AdamW(views, **options)
        for p, view in zip(params, views, strict=True):
            assert p.grad is not None
            view.grad = p.grad.reshape(view.shape)
            optimizer.state[view] = self.state[p]
        optimizer.step()
        for p, view in zip(params, views, strict=True):
            if view.data_ptr() != p.data_ptr():  # flattening a kernel that is channels last makes a copy
                p.copy_(view.view(p.shape))
