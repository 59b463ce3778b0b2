"""A default device that is not the parameters' changes nothing: by every source, and in the functions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsgd import NSGD, backward_in_chunks, sample_losses, top_eigenpairs
from nsgd.directions.samples import gradient_moment
from nsgd.trajectory.averaging import (
    ema_weights,
    equivalent_schedule,
    squared_distance,
    stationary_variance,
    swa_weights,
    two_point_loss,
    two_point_weights,
    variance_ratio,
)
from nsgd.trajectory.sharpness import batch_sharpness, damped_sharpness, random_direction, step_losses
from nsgd.trajectory.valley import floor_barriers

with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    P = sum(p.numel() for p in NET.parameters())
    X, Y, RANDOM = torch.randn(16, 6), torch.arange(16) % 3, torch.randn(P, P)
BASIS, H = torch.linalg.qr(RANDOM[:, :3]).Q.T.contiguous(), torch.tensor([0.5, 2.0])


@contextmanager
def elsewhere() -> Iterator[None]:
    """On the device meta whatever is made without one has no values, so that to use it fails."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def trained(source: str) -> tuple[dict[str, Tensor], list[float]]:
    """A network after some steps, through a checkpoint, and what the optimizer says of them."""
    net = copy.deepcopy(NET)
    solver = {"samples": "gradients", "samples at once": "gradients", "chunks": "differences"}.get(source, source)
    optimizers = [NSGD(net.parameters(), lr=0.05, momentum=0.9, k=3, solver=solver, refresh_every=2) for _ in range(2)]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    for step in range(10):
        optimizer = optimizers[step // 5]
        if step == 5:
            optimizer.load_state_dict(optimizers[0].state_dict())
        optimizer.zero_grad()
        if source == "chunks":
            backward_in_chunks(loss, X, Y, chunks=4)
        elif source == "differences":
            loss(X, Y).backward()
        elif solver == "gradients":
            module = net if source == "samples at once" else None
            optimizer.backward(loss(X, Y), curvature=sample_losses(loss, X, Y, module=module))
        else:
            optimizer.backward(value := loss(X, Y), curvature=value)
        optimizer.step()
    assert optimizer.refreshes > 2
    return net.state_dict(), [*optimizer.weights, optimizer.overlap, optimizer.alignment]


@pytest.mark.parametrize(
    "source", ["differences", "chunks", "samples", "samples at once", "lanczos", "arpack", "random"]
)
def test_training_is_that_without_a_default_device(source):
    net, said = trained(source)
    with elsewhere():
        net_elsewhere, said_elsewhere = trained(source)
    assert all(torch.equal(value, net_elsewhere[name]) for name, value in net.items())
    assert said == said_elsewhere


def loss() -> Tensor:
    return F.cross_entropy(NET(X), Y)


def eigenpairs(**options) -> list[Tensor]:
    pairs = top_eigenpairs(loss(), NET.parameters(), k=3, **options)
    return [pairs.eigenvalues, pairs.eigenvectors, pairs.residuals.nan_to_num()]


def sharpness() -> list[Tensor]:
    matrix = RANDOM @ RANDOM.T
    pairs = damped_sharpness(lambda v: matrix @ v, NET.parameters(), BASIS, gamma=0.1)
    return [pairs.eigenvalues, pairs.eigenvectors]


def averaging() -> list[Tensor]:
    weights = ema_weights(5, decay=0.5)
    return [
        *(of(weights, lr=0.1, curvature=h) for of in (equivalent_schedule, variance_ratio) for h in (0.5, H)),
        *(stationary_variance(lr=0.1, curvature=h) for h in (0.5, H)),
        squared_distance(3, lr=0.1, curvatures=H),
        two_point_loss([1.0, 2.0], curvature=0.5),
        two_point_loss(H, curvature=H[0]),
    ]


FUNCTIONS = {
    "eigenpairs": eigenpairs,
    "eigenpairs, the smallest": lambda: eigenpairs(which="SA"),
    "eigenpairs, arpack": lambda: eigenpairs(solver="arpack", seed=3),
    "eigenpairs, nystrom": lambda: eigenpairs(solver="nystrom", start=BASIS),
    "eigenpairs of products": lambda: [top_eigenpairs(lambda v: RANDOM @ (RANDOM.T @ v), NET.parameters()).eigenvalues],
    "gradient_moment": lambda: gradient_moment(
        sample_losses(lambda x, y: F.cross_entropy(NET(x), y), X, Y), [*NET.parameters()]
    ),
    "damped_sharpness": sharpness,
    "batch_sharpness": lambda: [torch.tensor(batch_sharpness([loss()], NET.parameters()), device="cpu")],
    "random_direction": lambda: [random_direction(NET.parameters(), seed=1)],
    "step_losses": lambda: [step_losses(loss, NET.parameters(), RANDOM[0], lr=0.1)],
    "floor_barriers": lambda: [floor_barriers(RANDOM[0])],
    "averages": lambda: [ema_weights(9, decay=0.5), swa_weights(9, window=2), two_point_weights(9, spacing=3)],
    "averaging": averaging,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_give_what_they_give_without_a_default_device(function):
    expected = FUNCTIONS[function]()
    with elsewhere():
        found = FUNCTIONS[function]()
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))
