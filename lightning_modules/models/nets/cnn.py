"""Plain convolutional networks, SimpleCNN and VGG, with their sizes as arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_modules.models.nets.initialisation import glorot


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
    _check_sides("SimpleCNN", input_shape, len(widths))
    if kernel_size % 2 == 0:
        raise ValueError(f"expected kernel_size to be odd, so that a convolution keeps the sides, got {kernel_size}")
    layers: list[nn.Module] = []
    for out in widths:
        for fan_in in (channels, out):
            layers += [nn.Conv2d(fan_in, out, kernel_size, padding=kernel_size // 2), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels, height, width = out, height // 2, width // 2
    head = [nn.Flatten(), nn.Linear(channels * height * width, dense), nn.ReLU(), nn.Linear(dense, num_classes)]
    return glorot(nn.Sequential(*layers, *head))


def vgg(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    stages: Sequence[Sequence[int]] = ((64,), (128,), (256, 256), (512, 512), (512, 512)),
) -> nn.Sequential:
    """VGG-11 (Simonyan & Zisserman 2015, configuration A) as adapted to CIFAR, with BatchNorm and one linear layer.

    A stage is a list of 3 x 3 convolutions, by their filters, and a pooling. Glorot initialisation, with which the
    paper needs no pre-training (section 3.1).
    """
    channels, height, width = input_shape
    _check_sides("VGG", input_shape, len(stages))
    layers: list[nn.Module] = []
    for stage in stages:
        for out in stage:
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    sides = (height // 2 ** len(stages)) * (width // 2 ** len(stages))
    return glorot(nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * sides, num_classes)))


def _check_sides(net: str, input_shape: Sequence[int], halvings: int) -> None:
    _, height, width = input_shape
    if min(height, width) < 2**halvings:
        raise ValueError(
            f"{net} halves the image {halvings} times; expected sides of at least {2**halvings} pixels, "
            f"got {height} x {width}; use --net mlp"
        )
