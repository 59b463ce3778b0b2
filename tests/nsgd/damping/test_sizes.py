"""Models with fewer entries than directions, and those whose parameters have no shape yet."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from nsgd import NSGD, damp

WAYS = {
    "nsgd": lambda params, **options: NSGD(params, lr=0.1, **options),
    "damp": lambda params, **options: damp(SGD(params, lr=0.1), **options),
}


def train(model, optimizer, steps, curvature=False):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 1, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - 2 * x - 1).square().mean()
        if curvature:
            optimizer.backward(loss)
        else:
            loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("way", WAYS)
def test_k_above_the_size_of_the_model_is_cut_down_with_one_warning(way):
    model = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match="k=20 is more than the 2 entries of the parameters that train") as said:
        optimizer = WAYS[way](model.parameters())
    assert len(said) == 1
    assert said[0].filename == __file__  # the line that made the optimizer
    assert optimizer.options.k == 2
    assert optimizer.state_dict()["param_groups"][0]["nsgd_options"]["k"] == 2
    assert train(model, optimizer, 300) < 0.01  # 4.6 at the start
    assert len(optimizer.weights) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_basis_scales_the_whole_step(way):
    """Every direction there is: the step is gamma times that of SGD, whatever the basis."""
    model, twin = nn.Linear(1, 1), nn.Linear(1, 1)
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="k=7 is more than the 2"):
        optimizer = WAYS[way](model.parameters(), k=7, gamma=0.5, solver="random")
    train(model, optimizer, 5, curvature=True)
    train(twin, SGD(twin.parameters(), lr=0.05), 5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # float32


def test_only_parameters_that_train_and_have_directions_are_counted():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="k=20 is more than the 10 entries"):
        NSGD(
            [
                {"params": model[0].parameters()},
                {"params": [model[1].weight]},
                {"params": [model[1].bias], "curvature": False},
            ]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NSGD(model.parameters(), k=12)  # as many as there are


def lazy():
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1))


@pytest.mark.parametrize("way", [*WAYS, "adam"])
def test_lazy_modules_wait_for_their_shapes_as_under_sgd(way):
    make = {**WAYS, "adam": lambda params, **options: damp(Adam(params, lr=0.01), **options)}[way]
    model, twin = lazy(), lazy()
    optimizer = make(model.parameters(), k=5)
    assert optimizer.options.k == 5
    assert optimizer.state_dict()["state"] == {}
    for built in (model, twin):
        torch.manual_seed(1)
        built(torch.ones(2, 1))
    other = make(twin.parameters(), k=5)  # of the shapes that are known by now
    train(model, optimizer, 30)
    train(twin, other, 30)
    assert len(optimizer.weights) == 5
    assert optimizer.weights == other.weights
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_k_is_cut_down_when_the_shapes_of_lazy_modules_are_known():
    model = lazy()
    optimizer = NSGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="k=20 is more than the 13 entries"):
        train(model, optimizer, 1)
    assert optimizer.options.k == 13
    train(model, optimizer, 30)
    assert len(optimizer.directions(model.parameters())) == len(optimizer.weights) > 0


def test_a_group_beside_lazy_modules_waits_with_them():
    model, more = lazy(), nn.Parameter(torch.zeros(2))
    optimizer = NSGD(model.parameters(), lr=0.1, k=5)
    optimizer.add_param_group({"params": [more]})
    train(model, optimizer, 10)
    assert optimizer.options.k == 5
    assert len(optimizer.weights) > 0
