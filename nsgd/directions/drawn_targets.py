"""Squared error to targets that the model itself draws: samples that show its curvature, however well it fits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import mse_loss


def drawn_mse_loss(prediction: Tensor) -> Tensor:
    """Mean squared error to targets drawn around the predictions, for directions from samples of a regression.

    ``nsgd.sample_losses(lambda x: nsgd.drawn_mse_loss(model(x)), x[:32], module=model)`` as ``curvature``; the loss
    that is trained stays as it is. The gradient of a sample's squared error is its residual times that of the
    prediction, so where residuals are small, alike or of one sign, the gradients' second moment is not the curvature.
    With targets N(f, d / 2), d entries a sample, its mean over draws is exactly the Gauss-Newton matrix 2 J^T J / d of
    the mean squared error (Martens 2020: the Fisher matrix, with targets from the model's own distribution).

    Costs a forward pass as the loss itself; draws from the global generator, whose state a refresh leaves as found.

    Args:
        prediction: Of one or more samples, (n, ...) with d entries each, or (n,).

    Raises:
        ValueError: If the prediction is no tensor of real numbers with a dimension of samples.
    """
    is_dense = isinstance(prediction, Tensor) and prediction.layout == torch.strided
    if not is_dense or not prediction.is_floating_point() or not prediction.ndim:
        got = type(prediction).__name__
        if isinstance(prediction, Tensor):
            got = f"{prediction.dtype}, {prediction.layout}, {prediction.ndim} dimensions"
        raise ValueError(f"expected predictions of real numbers, one row a sample, got {got}; pass model(x)")
    size = max(1, math.prod(prediction.shape[1:]))
    noise = torch.randn_like(prediction.detach()) * (size / 2) ** 0.5
    return mse_loss(prediction, prediction.detach() + noise)
