"""ResNets for small images, with their sizes as arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


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
