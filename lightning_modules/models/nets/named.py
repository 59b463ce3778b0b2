"""Networks by name, or by the import path of a function that makes one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_modules.models.nets.cnn import simple_cnn, vgg
from lightning_modules.models.nets.mlp import mlp
from lightning_modules.models.nets.resnet import resnet
from lightning_modules.models.nets.transformers import vision_transformer
from lightning_modules.support.imported import imported

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
