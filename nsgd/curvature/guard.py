"""Evaluate a loss and leave no trace: modules and random state are as found; compute outside autocast."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nsgd.curvature.copies import copied_attributes

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def untouched(*modules: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Leave modules and random state (torch, Python, NumPy) as found, also after an exception; compile nothing inside.

    Of modules that is: values of parameters, buffers, train/eval modes, and attributes, such as a hidden state, a
    counter, or a weight that pruning computes. Inside, modules work on copies of their buffers and attributes: the
    originals are never written, so a graph that was recorded earlier still finds them unchanged. Covers the modules
    given, and any other from its first forward pass, or ``train`` or ``eval``, on. Costs a copy of their parameters and
    buffers. Compiled modules run as if they were not: the compiler would trace the guard as well, anew each time, and
    what it makes has no double backward.

    Args:
        modules: Modules to guard from the start, with their children.
        device: An accelerator whose random state is kept as well as the CPU's.
    """
    found = _Found()

    def on_forward(module: nn.Module, _: Any) -> None:
        found.note(module)

    random_state = RandomState(device)
    hook = nn.modules.module.register_module_forward_pre_hook(on_forward)
    _watch(found)
    try:
        for module in modules:
            found.note(module)
        with _uncompiled():
            yield
    finally:
        hook.remove()
        _leave(found)
        found.restore()
        random_state.restore()


def _uncompiled() -> AbstractContextManager[None]:
    # To import the compiler takes a second, and where nobody has, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


_active: list[_Found] = []  # of the guards that are open, the innermost last
_trains: list[Any] = []  # torch's own ``nn.Module.train``, or what has taken its place, and ours while a guard is open


def _watch(found: _Found) -> None:
    """Open a guard. Torch has no hook for ``train`` and ``eval``, so that while one is open they note their module."""
    if not _active:
        as_found = nn.Module.train

        def noted(module: nn.Module, mode: bool = True) -> nn.Module:
            for guard in list(_active):
                guard.note(module)
            return as_found(module, mode)

        _trains[:] = as_found, noted
        nn.Module.train = noted  # type: ignore[method-assign, assignment]
    _active.append(found)


def _leave(found: _Found) -> None:
    _active.remove(found)
    if not _active and nn.Module.train is _trains[1]:
        nn.Module.train = _trains[0]  # type: ignore[method-assign]


class _Found:
    """Modules as they were when they were noted."""

    def __init__(self) -> None:
        # By identity: a metric's hash changes with its states.
        self._modes: dict[int, tuple[nn.Module, bool]] = {}
        self._attributes: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []  # original and copy
        self._parameters: dict[Tensor, tuple[Tensor, Tensor]] = {}  # its data, and a copy of that
        self._versions = ExitStack()
        self._copies: dict[int, Any] = {}  # a buffer shared by two modules stays shared

    def note(self, root: nn.Module) -> None:
        """Note a module and its children, if they have not been yet, here or by a guard inside this one."""
        # A guard inside has changed what it noted, and puts it back: to note that would bring the change back.
        known = [self, *_active[_active.index(self) + 1 :]]
        if any(id(root) in found._modes for found in known):
            return
        whole = []
        for m in root.modules():
            if any(id(m) in found._modes for found in known):
                continue
            self._modes[id(m)] = m, m.training
            buffers = list(m.named_buffers(recurse=False, remove_duplicate=False))
            for _, buffer in buffers:
                self._copies.setdefault(id(buffer), buffer.detach().clone())
            if _is_whole(m):
                whole.append(m)
                self._attributes[id(m)] = m, dict(vars(m))
                vars(m).update(copied_attributes(m, self._copies))
            for name, buffer in buffers:
                own = self._copies[id(buffer)]
                self._buffers.append((m, name, buffer, own))
                setattr(m, name, own)
        self._note_parameters([p for m in whole for p in m._parameters.values()])

    def _note_parameters(self, params: Iterable[Tensor | None]) -> None:
        # Those that other libraries hold shards of change their data in a forward pass, and know why.
        known = (p for p in params if p is not None and p not in self._parameters)
        ordered = list(dict.fromkeys(p for p in known if _is_plain(p)))
        if not ordered:
            return
        # In a vectorised pass the parameters themselves are not part of it.
        with torch.no_grad(), torch._C._DisableFuncTorch():
            data = [p.data for p in ordered]
            copies = [torch.empty_like(values) for values in data]
            torch._foreach_copy_(copies, data)
        self._parameters.update(zip(ordered, zip(data, copies, strict=True), strict=True))
        # A graph that was recorded earlier asks by its version whether a parameter is what it was: it will be.
        self._versions.enter_context(torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(ordered)))

    def restore(self) -> None:
        """Put everything back."""
        for m, attributes in self._attributes.values():
            vars(m).clear()
            vars(m).update(attributes)
        for m, name, buffer, own in self._buffers:
            # Elsewhere whoever has replaced the tensors of a module for a while puts them back.
            if id(m) in self._attributes or getattr(m, name, None) is own:
                setattr(m, name, buffer)
        for m, mode in self._modes.values():
            m.training = mode
        if self._parameters:
            with torch.no_grad():
                for p, (data, _) in self._parameters.items():
                    p.data = data  # in case it was given another
                kept, copies = zip(*self._parameters.values(), strict=True)
                torch._foreach_copy_(list(kept), list(copies))
        self._versions.close()


def _is_whole(module: nn.Module) -> bool:
    """Whether all that a module holds is its own: nothing sharded, not made yet, or lent for a functional call."""
    if type(module).__module__.startswith("torch.distributed") or isinstance(module, torch.jit.ScriptModule):
        return False
    return all(p is None or (isinstance(p, nn.Parameter) and not is_lazy(p)) for p in module._parameters.values())


def _is_plain(p: Tensor) -> bool:
    return p.layout == torch.strided and not type(p).__module__.startswith("torch.distributed") and not p.is_meta


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
