"""A plain loop of torch, and gradients that a test makes up, for directions from training gradients."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD, AdamW

from nsgd import NSGD, damp

MAKERS = {
    "nsgd": lambda params, **options: NSGD(params, lr=0.1, momentum=0.9, **options),
    "nesterov": lambda params, **options: NSGD(params, lr=0.1, momentum=0.9, nesterov=True, **options),
    "sgd": lambda params, **options: damp(SGD(params, lr=0.1), **options),
    "adamw": lambda params, **options: damp(AdamW(params, lr=0.01), **options),
}


def plain_loop(run, optimizer, first, last, *, before_step=None, set_to_none=True):
    """What a user of torch writes."""
    for i in range(first, last):
        optimizer.zero_grad(set_to_none=set_to_none)
        run.loss(i).backward()
        if before_step is not None:
            before_step(i)
        optimizer.step()


class Given:
    """Parameters whose gradients are what the test says."""

    def __init__(self, sizes=(12, 20), dtype=torch.float64, **options):
        self.params = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
        options = {"lr": 1e-3, "k": 5, **options}
        self.optimizer = NSGD(self.params, **options)

    def step(self, *gradients):
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        self.optimizer.step()

    def moment(self):
        """What the directions and their weights stand for, (P, P)."""
        vectors = self.optimizer.directions(self.params)
        weights = torch.tensor(self.optimizer.weights, dtype=vectors.dtype)
        vectors = vectors[: len(weights)]
        return vectors.T @ (weights[:, None] * vectors)


def draws(count, sizes=(12, 20), rank=3, seed=0):
    """Gradients in a space of few dimensions, and of one length, so that none is clipped."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, sum(sizes), generator=generator, dtype=torch.float64)
    rows = torch.randn(count, rank, generator=generator, dtype=torch.float64) @ basis
    return [row.split(sizes) for row in rows / rows.norm(dim=1, keepdim=True)]


def averaged(rows, decay):
    """The mean of half the outer products of rows, older ones decayed."""
    shares = [decay ** (len(rows) - 1 - i) for i in range(len(rows))]
    return sum(0.5 * share * torch.outer(row, row) for share, row in zip(shares, rows, strict=True)) / sum(shares)
