"""Networks of the papers, as plain module factories with their sizes as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

NetName = Literal["mlp", "simple-cnn", "simple-cnn-root", "resnet-20"]


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


class _Patches(nn.Module):
    """Non-overlapping patches as a sequence of embeddings, with learned positions."""

    def __init__(self, input_shape: Sequence[int], patch: int, dim: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (height // patch) * (width // patch), dim))

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.embed(x)
        return patches.flatten(2).transpose(1, 2) + self.positions


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def vision_transformer(
    input_shape: Sequence[int], num_classes: int, *, patch: int = 4, dim: int = 64, depth: int = 4, heads: int = 4
) -> nn.Sequential:
    """A small vision transformer (Dosovitskiy et al. 2021): pre-norm encoder blocks, GELU, mean over patches.

    Curvature of it needs attention with a double backward: run it under
    ``torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)``.
    """
    _, height, width = input_shape
    if height % patch or width % patch:
        raise ValueError(f"expected images whose sides are multiples of patch = {patch}, got {height} x {width}")
    block = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
    return nn.Sequential(
        _Patches(input_shape, patch, dim), encoder, nn.LayerNorm(dim), _Mean(), nn.Linear(dim, num_classes)
    )


def make_net(name: NetName, input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    """Build a network by name.

    Raises:
        ValueError: If the name is unknown, or the images are too small for the network.
    """
    if name not in get_args(NetName):
        raise ValueError(f"expected net to be one of {', '.join(get_args(NetName))}, got {name!r}")
    if name == "mlp":
        return mlp(input_shape, num_classes)
    if name == "resnet-20":
        return resnet(input_shape, num_classes)
    sizes: dict[str, Any] = {"widths": (32, 64), "kernel_size": 3} if name == "simple-cnn-root" else {}
    return simple_cnn(input_shape, num_classes, **sizes)


def _glorot(net: nn.Sequential) -> nn.Sequential:
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
