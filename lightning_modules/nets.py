"""Networks of the papers, as plain module factories with their sizes as arguments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.imported import imported
from lightning_modules.initialisation import glorot
from lightning_modules.transformers import vision_transformer


def mlp(input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (64, 64)) -> nn.Sequential:
    """A ReLU multilayer perceptron on flattened images (C, H, W)."""
    channels, height, width = input_shape
    sizes = [channels * height * width, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return glorot(nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes)))


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


class _Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut that subsamples and pads with zeros (He et al. 2016, option A)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=not batch_norm)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=not batch_norm)
        self.norms = nn.ModuleList(nn.BatchNorm2d(fan_out) for _ in range(2)) if batch_norm else None
        self.stride, self.padding = stride, fan_out - fan_in

    def forward(self, x: Tensor) -> Tensor:
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        if self.norms is None:  # activation first: without BatchNorm the shortcut has to stay linear
            inner: Tensor = self.second(functional.relu(self.first(functional.relu(x))))
            return shortcut + inner
        inner = self.norms[1](self.second(functional.relu(self.norms[0](self.first(x)))))
        return functional.relu(shortcut + inner)


def resnet(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    depth: int = 20,
    widths: Sequence[int] = (16, 32, 64),
    batch_norm: bool = True,
) -> nn.Sequential:
    """ResNet for CIFAR (He et al. 2016, section 4.2): depth 6n + 2, three stages of n blocks, He initialisation.

    Without BatchNorm it is the pre-activation ResNet-32 of Jastrzębski et al. (2019) at ``depth=32``: the variance of
    the initial convolutions is a fifteenth of He's, so that activations do not grow through the blocks.
    """
    if not widths:
        raise ValueError("expected widths of at least one stage, got none")
    blocks, rest = divmod(depth - 2, 2 * len(widths))
    if rest or blocks < 1:
        raise ValueError(
            f"expected depth to be 2 more than a multiple of {2 * len(widths)}, got {depth}; take 20 or 32"
        )
    channels = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=not batch_norm)]
    if batch_norm:
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    for width in widths:
        for _ in range(blocks):
            layers.append(_Residual(channels, width, 1 if width == channels else 2, batch_norm=batch_norm))
            channels = width
    if not batch_norm:
        layers.append(nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
                with torch.no_grad():
                    module.weight.mul_(15**-0.5)
    return net


NETS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {  # factory, and the sizes that it gets
    "mlp": (mlp, {}),
    "simple-cnn": (simple_cnn, {}),
    "simple-cnn-root": (simple_cnn, {"widths": (32, 64), "kernel_size": 3}),
    "resnet-20": (resnet, {}),
    "resnet-32": (resnet, {"depth": 32}),
    "resnet-56": (resnet, {"depth": 56}),
    "resnet-32-plain": (resnet, {"depth": 32, "batch_norm": False}),
    "vgg-11": (vgg, {}),
    "vit": (vision_transformer, {}),
}


def make_net(
    name: str, input_shape: Sequence[int], num_classes: int, sizes: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a network by name.

    Args:
        name: Name of the network, or module:name of a function of your own that takes ``input_shape``, ``num_classes``
            and sizes.
        input_shape: Channels, height and width of an image.
        num_classes: Number of classes.
        sizes: Keyword arguments of the network's factory, in place of those that the name stands for.

    Raises:
        ValueError: If the name or a size is unknown, a size is of another kind than its default, or the images are too
            small for the network.
    """
    factory, named = NETS[name] if name in NETS else (imported(name, option="net", known=", ".join(NETS)), {})
    known = {size: p.default for size, p in list(inspect.signature(factory).parameters.items())[2:]}
    for size, value in (sizes or {}).items():
        if size not in known:
            raise ValueError(f"expected sizes of {name} among {', '.join(known)}, got {size!r}")
        if name in NETS and not _is_like(value, known[size]):
            raise ValueError(f"expected {size} of {name} to be {_kind(known[size])}, got {value!r}")
    net = factory(input_shape, num_classes, **{**named, **(sizes or {})})
    if not isinstance(net, nn.Module):
        raise ValueError(f"expected {name} to return a torch.nn.Module, got a {type(net).__name__}")
    return net


def _is_like(value: Any, default: Any) -> bool:
    """Whether a size is of the kind of its default: true or false, a positive count, or a list of such."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    return isinstance(value, list | tuple) and all(_is_like(entry, default[0]) for entry in value)


def _kind(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int):
        return "a whole number of at least 1"
    return f"a list like {json.dumps(default)}"


def _check_sides(net: str, input_shape: Sequence[int], halvings: int) -> None:
    _, height, width = input_shape
    if min(height, width) < 2**halvings:
        raise ValueError(
            f"{net} halves the image {halvings} times; expected sides of at least {2**halvings} pixels, "
            f"got {height} x {width}; use --net mlp"
        )
