"""Normalisation under autocast, for vmap: the layers whose input is in half precision and whose weights are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_NORMS = {
    *(F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm),
    *(torch.batch_norm, torch.instance_norm, torch.layer_norm, torch.group_norm),
}


class OneDtype(TorchFunctionMode):
    """Inside, normalisation computes in the dtype of its weights and statistics, and returns that of its input.

    Under autocast the input is in half precision and the rest in float32. Outside of vmap torch's kernels take both,
    and sum in float32 as well; the rules of vmap pass both on to kernels that refuse them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, its input cast where that is needed."""
        kwargs = kwargs or {}
        if func not in _NORMS or not args:
            return func(*args, **kwargs)
        x, *rest = args
        others = [t for t in (*rest, *kwargs.values()) if isinstance(t, Tensor) and t.dtype != x.dtype]
        if not others:
            return func(*args, **kwargs)
        return func(x.to(others[0].dtype), *rest, **kwargs).to(x.dtype)
