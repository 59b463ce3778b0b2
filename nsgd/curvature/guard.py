"""Evaluate a loss and leave no trace: buffers, modes and random state are as found; compute outside autocast."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def untouched(*modules: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Leave buffers, train/eval modes and random state (torch, Python, NumPy) as found, also after an exception.

    Inside, modules work on copies of their buffers: the originals are never written, so a graph that was recorded
    earlier still finds them unchanged. Covers the modules given, and any other from its first forward pass on.

    Args:
        modules: Modules to guard from the start, with their children.
        device: An accelerator whose random state is kept as well as the CPU's.
    """
    seen: dict[nn.Module, tuple[bool, set[str]]] = {}  # mode and names of the buffers
    originals: list[tuple[nn.Module, str, Tensor]] = []
    copies: dict[int, Tensor] = {}  # a buffer shared by two modules stays shared

    def guard(module: nn.Module) -> None:
        for m in module.modules():
            if m in seen:
                continue
            buffers = list(m.named_buffers(recurse=False, remove_duplicate=False))
            seen[m] = m.training, {name for name, _ in buffers}
            for name, buffer in buffers:
                originals.append((m, name, buffer))
                setattr(m, name, copies.setdefault(id(buffer), buffer.detach().clone()))

    def on_forward(module: nn.Module, _: Any) -> None:
        if module not in seen:
            guard(module)

    random_state = RandomState(device)
    hook = nn.modules.module.register_module_forward_pre_hook(on_forward)
    try:
        for module in modules:
            guard(module)
        yield
    finally:
        hook.remove()
        for m, name, buffer in originals:
            setattr(m, name, buffer)
        for m, (mode, names) in seen.items():
            m.training = mode
            for name in [name for name, _ in m.named_buffers(recurse=False) if name not in names]:
                delattr(m, name)  # registered by the forward pass
        random_state.restore()


def full_precision(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run a function outside autocast and TF32, which would round the factors of its float32 matrix products."""

    @wraps(function)
    def outside(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        kinds = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(kind)]
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_without_tf32())
            return function(*args, **kwargs)

    return outside


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever ``torch.set_float32_matmul_precision`` says."""
    settings_of = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    known: list[tuple[Any, str]] = [(s, getattr(s, "fp32_precision", "none")) for s in settings_of]  # torch >= 2.9
    kept = [(settings, precision) for settings, precision in known if precision not in ("ieee", "none")]
    for settings, _ in kept:
        settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        for settings, precision in kept:
            settings.fp32_precision = "none"  # which is what a setting for all backends leaves here
            if settings.fp32_precision != precision:
                settings.fp32_precision = precision


class RandomState:
    """The random state of torch, of one accelerator, of Python and of NumPy, as it was when this was made."""

    def __init__(self, device: torch.device | None) -> None:
        self.accelerator = None if device is None or device.type == "cpu" else torch.get_device_module(device)
        self.device = device
        self.states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self.accelerator_state = self.accelerator.get_rng_state(device) if self.accelerator else None

    def restore(self) -> None:
        """Go back to it."""
        random.setstate(self.states[0])
        np.random.set_state(self.states[1])
        torch.set_rng_state(self.states[2])
        if self.accelerator:
            self.accelerator.set_rng_state(self.accelerator_state, self.device)
