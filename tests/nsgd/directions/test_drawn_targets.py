"""Samples of a regression with targets drawn from the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import mse_loss

from nsgd import NSGD, drawn_mse_loss, sample_losses
from nsgd.directions.samples import gradient_moment


def regression():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(200, 4, dtype=torch.float64)


def gauss_newton(model, x):
    params = dict(model.named_parameters())
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    rows = torch.cat([block.reshape(x.shape[0] * 3, -1) for block in jacobian.values()], dim=1).detach()
    return 2 * rows.T @ rows / rows.shape[0]


@pytest.mark.parametrize("at_once", [True, False])
def test_the_mean_over_draws_is_the_gauss_newton_matrix(at_once):
    model, x = regression()
    params = list(model.parameters())
    expected, total = gauss_newton(model, x), 0.0
    draws = 60 if at_once else 4
    for _ in range(draws):
        losses = sample_losses(lambda x: drawn_mse_loss(model(x)), x, module=model if at_once else None)
        torch.rand(1)  # a refresh leaves the random state as found: draws would be the same
        weights, vectors = gradient_moment(losses, params)
        total = total + (vectors.T * weights) @ vectors / draws
    bound = 0.1 if at_once else 0.35
    assert torch.linalg.matrix_norm(total - expected) < bound * torch.linalg.matrix_norm(expected)


def test_directions_are_the_curvatures_where_residuals_hide_it():
    """All but the flattest output fit: residuals show that one alone, draws the sharp ones."""
    model, x = regression()
    with torch.no_grad():
        model[2].weight.mul_(torch.tensor([[3.0], [1.0], [0.1]]))
        y = model(x)
        y[:, 2] += torch.randn(200, dtype=torch.float64)
    params = list(model.parameters())
    top = torch.linalg.eigh(gauss_newton(model, x)).eigenvectors[:, -3:]

    def caught(losses):
        optimizer = NSGD(params, lr=0.1, k=3)
        optimizer.refresh(losses)
        return float((optimizer.directions(params) @ top).square().sum() / 3)

    drawn = caught(sample_losses(lambda x: drawn_mse_loss(model(x)), x, module=model))
    own = caught(sample_losses(lambda x, y: mse_loss(model(x), y), x, y, module=model))
    assert drawn > 0.8 > 0.4 > own


@pytest.mark.parametrize("prediction", [3.0, torch.tensor(1.0), torch.tensor([1, 2])])
def test_bad_predictions_get_a_sentence(prediction):
    with pytest.raises(ValueError, match="expected predictions of real numbers, one row a sample, got"):
        drawn_mse_loss(prediction)
