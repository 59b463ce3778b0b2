"""Small tensors on their way between the host and a device, in the stream and without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


class OnHost:
    """A small tensor on its way from the device; itself, where it is on the CPU."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._copied = None
        if value.device.type != "cpu":
            # Into pinned memory: a copy to any other waits.
            pinned = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            self._value = pinned.copy_(value, non_blocking=True)
            module = torch.get_device_module(value.device)
            self._copied = module.Event()
            self._copied.record(module.current_stream(value.device))

    def get(self) -> Tensor:
        """The tensor; waits for the copy where that is still under way, and not for what was queued behind it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value

    def is_true(self) -> bool:
        """A truth value; waits as :meth:`get` does."""
        return bool(self.get())


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device, in the order of its stream; itself, where that is the CPU."""
    if device.type == "cpu":
        return value
    pinned = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(value).to(device, non_blocking=True)
