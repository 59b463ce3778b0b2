"""The arithmetic of benchmarks/where_not.py: against a dense Hessian, noise of a known share, and rows made by hand."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def where_not(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("where_not")


def dense(net, x, y):
    """The Hessian (P, P) of the mean loss, by torch.autograd.functional, which nothing of ours takes part in."""
    names = list(dict(net.named_parameters()))
    shapes = [p.shape for p in net.parameters()]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(functional_call(net, values, (x,)), y)

    return hessian(loss, torch.cat([p.detach().flatten() for p in net.parameters()]))


@pytest.mark.parametrize("axis", ["top", "random"])
def test_edge_felt_and_caught_are_those_of_the_dense_hessian(where_not, axis):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = 2 * torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    matrix = dense(net, x, y)
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1).T
    drawn = torch.randn(len(matrix), 3, dtype=torch.float64)
    directions = vectors[:3] if axis == "top" else torch.linalg.qr(drawn).Q.T
    found = where_not.curvature(
        nn.functional.cross_entropy(net(x), y), list(net.parameters()), directions, lr=0.3, k=6, momentum=0.5
    )
    # The root of M by its own definition, M = I - (1 - gamma) V^T V, not by our closed form.
    scale = torch.eye(len(matrix), dtype=torch.float64) - 0.9 * directions.T @ directions
    m, axes = torch.linalg.eigh(scale)
    root = axes @ torch.diag(m.sqrt()) @ axes.T
    tolerance = {"rel": 1e-2}  # an eigenvalue is no further off than its residual, a hundredth
    assert found["edge"] == pytest.approx(float(values[0]) * 0.3 / (2 * 1.5), **tolerance)
    assert found["felt"] == pytest.approx(
        float(torch.linalg.eigvalsh(root @ matrix @ root)[-1]) * 0.3 / (2 * 1.5), **tolerance
    )
    share = float((directions @ matrix @ directions.T).trace() / values[:3].sum())
    assert found["caught"] == pytest.approx(share, **tolerance)
    assert (axis == "top") == (abs(share - 1) < 1e-9)
    assert [found[f"lambda_{i}"] for i in range(1, 7)] == pytest.approx(values[:6].tolist(), rel=2e-2)


def test_without_directions_nothing_is_caught_and_all_is_felt(where_not):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    loss = nn.functional.cross_entropy(net(torch.randn(30, 4)), torch.randint(3, (30,)))
    params = list(net.parameters())
    found = where_not.curvature(loss, params, torch.empty(0, 43), lr=0.3, k=3)
    assert found["caught"] == 0
    assert found["felt"] == pytest.approx(found["edge"], rel=1e-2)


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.2])
def test_the_share_of_noise_is_the_one_that_gradients_were_drawn_with(where_not, scale):
    size = 400
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(size, generator=generator) / math.sqrt(size)
    gradients = mean + scale * torch.randn(500, size, generator=generator)
    squared = float(mean.square().sum())
    expected = scale**2 * size / (scale**2 * size + squared)
    # The mean's square is estimated to about noise / batches / sqrt(P).
    assert where_not.noise(gradients) == pytest.approx(expected, abs=0.02)


def test_a_run_that_is_measured_is_the_run_that_is_not(where_not):
    torch.manual_seed(1)
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    data = where_not.Data(images, labels, images, labels)
    sizes = {"depth": 8, "widths": [4, 4, 4]}
    case = where_not.Case("tiny", "resnet-20", 16, 5, {}, sizes)
    plain, measured = (where_not.Run(data, case, where_not.DROP_IN, 0.1, 0) for _ in range(2))
    assert list(plain.train()) == [1, 2, 3, 4, 5]
    points = list(measured.points())
    assert [point["step"] for point in points] == [2, 5]  # early and halfway are one here
    ours, theirs = plain.model.state_dict(), measured.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sgd_of_the_script_is_torchs(where_not):
    torch.manual_seed(1)
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    data = where_not.Data(images, labels, images, labels)
    case = where_not.Case("tiny", "mlp", 16, 6, {}, {"hidden": [8, 8]})
    run = where_not.Run(data, case, where_not.SGD, 0.1, 0)
    list(run.train())
    torch.manual_seed(0)
    net = where_not.make_net("mlp", (3, 8, 8), 10, {"hidden": [8, 8]})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for _ in range(6):
        chosen = torch.randperm(64, generator=order)[:16]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(run.params, net.parameters(), strict=True))


def test_the_table_takes_the_best_rate_by_mean_loss(where_not):
    key = {"case": "A", "method": "SGD", "step": 8}
    rows = [
        {**key, "lr": 0.1, "seed": 0, "train_loss": 1.0, "test_accuracy": 0.5},
        {**key, "lr": 0.1, "seed": 1, "train_loss": 1.2, "test_accuracy": 0.4},
        {**key, "lr": 0.2, "seed": 0, "train_loss": 0.9, "test_accuracy": 0.6},
        {**key, "lr": 0.2, "seed": 1, "train_loss": math.inf, "test_accuracy": 0.1},
        {**key, "lr": 0.1, "seed": 0, "edge": 0.5, "felt": 0.25, "caught": 0.6, "alignment": 0.3, "noise": 0.7},
    ]
    rows[-1] |= {"lambda_1": 8.0, "lambda_10": 2.0}
    header, body = where_not.table(rows)
    assert body == [["A: SGD", "0.1", "0.1 to 0.2", "1.100", "45.0", "0.50", "0.25", "0.60", "0.30", "0.70", "4.0"]]
    assert len(header) == len(body[0])
