"""A small network, and some steps of an optimizer on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 10))


def trained(net: nn.Module, optimizer: Any, steps: int, *, start: int = 0) -> list[torch.Tensor]:
    x, y = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 10
    for step in range(start, start + steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x + 0.01 * step), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]
