"""Two small transformers, of images and of characters, with their sizes as arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.models.nets.initialisation import glorot


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

    Initialisation of the paper's code: Glorot for attention and feed-forward layers, LeCun for the patches, positions
    of standard deviation 0.02, and a last layer of zeros, so that the first step moves the last layer alone.

    Curvature of it needs attention with a double backward: run it under
    ``torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)``. Gradients of single samples need nothing.
    """
    _, height, width = input_shape
    if height % patch or width % patch:
        raise ValueError(f"expected images whose sides are multiples of patch = {patch}, got {height} x {width}")
    patches, head = _Patches(input_shape, patch, dim), nn.Linear(dim, num_classes)
    net = glorot(nn.Sequential(patches, _encoder(dim, depth, heads), nn.LayerNorm(dim), _Mean(), head))
    nn.init.kaiming_normal_(patches.embed.weight, nonlinearity="linear")  # LeCun: variance 1 / fan-in
    nn.init.zeros_(head.weight)
    return net


class _Tokens(nn.Module):
    """Tokens (B, T) as a sequence of embeddings (B, T, dim), with learned positions."""

    def __init__(self, vocabulary: int, context: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.01 * torch.randn(context, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        length, context = tokens.shape[1], len(self.positions)
        if length > context:
            raise ValueError(f"expected at most context = {context} tokens in a row, got {length}; raise context")
        embedded: Tensor = self.embed(tokens)
        return embedded + self.positions[:length]


class _Causal(nn.Module):
    """Encoder blocks in which a position sees itself and those before it."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        seen: Tensor = self.encoder(x, mask, is_causal=True)
        return seen


def causal_transformer(
    vocabulary: int, *, context: int = 64, dim: int = 64, depth: int = 2, heads: int = 4
) -> nn.Sequential:
    """A small decoder-only transformer (Radford et al. 2019, GPT-2): tokens (B, T) int64 to logits (B, T, vocabulary).

    Pre-norm blocks, GELU, learned positions, no dropout, and an output layer of its own, without bias. Initialisation
    of GPT-2: weights of standard deviation 0.02, positions of 0.01, biases zero, and the layers that add to the
    residual stream, 2 a block, divided by the root of their number.

    For its curvature the same holds as for :func:`vision_transformer`.

    Args:
        vocabulary: Number of different tokens.
        context: The most tokens in a row, T at most.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads of a block; they divide ``dim``.

    Raises:
        ValueError: If a size is below 1, or ``dim`` no multiple of ``heads``; on a forward pass, if T exceeds
            ``context``.
    """
    sizes = {"vocabulary": vocabulary, "context": context, "dim": dim, "depth": depth, "heads": heads}
    for size, value in sizes.items():
        if value < 1:
            raise ValueError(f"expected {size} of at least 1, got {value}")
    encoder = _encoder(dim, depth, heads)
    tokens, head = _Tokens(vocabulary, context, dim), nn.Linear(dim, vocabulary, bias=False)
    net = nn.Sequential(tokens, _Causal(encoder), nn.LayerNorm(dim), head)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 2 and not name.endswith("positions"):
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()
        for name, parameter in encoder.named_parameters():
            if name.endswith(("out_proj.weight", "linear2.weight")):
                parameter.div_((2 * depth) ** 0.5)
    return net


def _encoder(dim: int, depth: int, heads: int) -> nn.TransformerEncoder:
    """Pre-norm blocks whose weights are equal as yet: torch copies the first block, so each has to be initialised."""
    if dim % heads:
        raise ValueError(f"expected dim to be a multiple of heads, got dim = {dim} and heads = {heads}")
    block = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
