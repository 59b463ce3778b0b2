"""What averaging counts beside the gradients of samples: flops by hand, of networks small enough to count."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsgd import NSGD, sample_losses
from nsgd.directions.samples import write_gradients
from nsgd.directions.work import ForwardFlops, averaging_share, sample_flops


class Attention(nn.Module):
    """Seven tokens of 8 numbers, each of which looks at all."""

    def __init__(self):
        super().__init__()
        self.queries, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        q = self.queries(x)
        return self.head((q @ x.mT @ x).mean(1))


NETS = {  # a network, a sample, and the products of a forward pass on one
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3)), (6,), 6 * 50 + 50 * 3),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        (2, 6, 6),
        16 * 4 * 2 * 9 + 64 * 3,
    ),
    "attention": (Attention, (7, 8), 7 * 8 * 8 + 2 * 7 * 7 * 8 + 8 * 3),
}


def losses_of(net, at_once, group_size=1, chunk_size=None):
    make, shape, products = NETS[net]
    model = make()
    options = {"module": model, "chunk_size": chunk_size} if at_once else {}
    x, y = torch.randn(10, *shape), torch.randint(3, (10,))
    loss = sample_losses(lambda x, y: F.cross_entropy(model(x), y), x, y, group_size=group_size, **options)
    return model, loss, 2 * products


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("at_once", "group_size", "chunk_size"),
    [(False, 1, None), (False, 4, None), (True, 1, None), (True, 4, 1), (True, 1, 3)],
)
def test_a_forward_pass_is_counted_by_hand(net, at_once, group_size, chunk_size):
    model, losses, expected = losses_of(net, at_once, group_size, chunk_size)
    params = list(model.parameters())
    counter = ForwardFlops()
    write_gradients(losses, params, [torch.empty(len(losses), *p.shape) for p in params], forward=counter)
    assert counter.total == 10 * expected


def test_what_has_no_product_counts_two_a_parameter():
    assert sample_flops(ForwardFlops(), 5, 30) == 60


def test_the_share_of_averaging_is_that_of_its_products():
    """The mean, Gram matrices of k and m vectors and of k, products with k and m of them and with k: one by one."""
    k, m, size, flops = 5, 8, 1000, 7000.0
    gram = k * k + m * k + m * m
    products = 2 * m + gram + k * (k + m) + k * k + k * k
    expected = 2 * size * products / (3 * flops * 16)
    assert averaging_share(groups=m, samples=16, k=k, size=size, flops=flops) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("at_once", [False, True])
def test_cost_gradients_holds_both(net, at_once):
    model, losses, flops = losses_of(net, at_once, group_size=2)
    optimizer = NSGD(model.parameters(), lr=0.1, k=4, solver="gradients")
    size = sum(p.numel() for p in model.parameters())
    share = averaging_share(groups=5, samples=10, k=4, size=size, flops=max(flops, 2 * size))
    for refresh in (1, 2, 3):
        optimizer.refresh(losses, batch_fraction=0.5)
        assert optimizer.cost_gradients == pytest.approx(refresh * 0.5 * (1 + share), rel=1e-12)
    counts = json.loads(optimizer.state_dict()["param_groups"][0]["nsgd_counts"])
    assert counts["sample_flops"] == max(flops, 2 * size)


def test_flops_are_counted_once_and_kept(monkeypatch):
    model, losses, _ = losses_of("cnn", at_once=True)
    optimizer, resumed = (NSGD(model.parameters(), lr=0.1, k=4, solver="gradients") for _ in range(2))
    optimizer.refresh(losses)
    monkeypatch.setattr("nsgd.directions.refresh.ForwardFlops", None)  # would raise
    optimizer.refresh(losses)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.refresh(losses)
    assert resumed.cost_gradients == pytest.approx(1.5 * optimizer.cost_gradients)
