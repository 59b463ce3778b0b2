"""Initialisation that several networks share."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def glorot(net: nn.Sequential) -> nn.Sequential:
    """Give a network's layers, in place, uniform weights of variance 2 / (fan-in + fan-out), and biases zero."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):  # its biases are zero already
            for matrix in module.in_proj_weight.chunk(3):  # of queries, keys and values
                nn.init.xavier_uniform_(matrix)
    return net
