"""A multilayer perceptron, with its sizes as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from lightning_modules.models.nets.initialisation import glorot


def mlp(input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (64, 64)) -> nn.Sequential:
    """A ReLU multilayer perceptron on flattened images (C, H, W)."""
    channels, height, width = input_shape
    sizes = [channels * height * width, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return glorot(nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes)))
