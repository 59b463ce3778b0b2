"""Networks of the papers, as plain module factories with their sizes as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import nn

NetName = Literal["mlp", "simple-cnn", "simple-cnn-root"]


def mlp(input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (64, 64)) -> nn.Sequential:
    """A ReLU multilayer perceptron on flattened images (C, H, W)."""
    channels, height, width = input_shape
    sizes = [channels * height * width, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return _glorot(nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes)))


def simple_cnn(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    widths: Sequence[int] = (100, 200),
    kernel_size: int = 5,
    dense: int = 128,
) -> nn.Sequential:
    """SimpleCNN of Jastrzębski et al. (2019): two convolutions and a pooling for each width, one dense layer.

    The defaults are the paper's "medium" network; ``widths=(32, 64), kernel_size=3`` its "root" network, whose
    dense layer is not stated and taken as the same 128. ReLU, Glorot initialisation, no BatchNorm.
    """
    channels, height, width = input_shape
    if min(height, width) < 2 ** len(widths):
        raise ValueError(
            f"SimpleCNN halves the image {len(widths)} times; expected sides of at least {2 ** len(widths)} pixels, "
            f"got {height} x {width}; use --net mlp"
        )
    layers: list[nn.Module] = []
    for out in widths:
        for fan_in in (channels, out):
            layers += [nn.Conv2d(fan_in, out, kernel_size, padding=kernel_size // 2), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels, height, width = out, height // 2, width // 2
    head = [nn.Flatten(), nn.Linear(channels * height * width, dense), nn.ReLU(), nn.Linear(dense, num_classes)]
    return _glorot(nn.Sequential(*layers, *head))


def make_net(name: NetName, input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    """Build a network by name.

    Raises:
        ValueError: If the name is unknown, or the images are too small for the network.
    """
    sizes: dict[str, dict[str, Any]] = {"simple-cnn-root": {"widths": (32, 64), "kernel_size": 3}}
    if name not in get_args(NetName):
        raise ValueError(f"expected net to be one of {', '.join(get_args(NetName))}, got {name!r}")
    factory = mlp if name == "mlp" else simple_cnn
    return factory(input_shape, num_classes, **sizes.get(name, {}))


def _glorot(net: nn.Sequential) -> nn.Sequential:
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
