"""What averaging costs beside the gradients that it averages, counted in floating point operations (flops).

On a small dense network it is most of a refresh; on a convolutional one, whose weights are used many times a sample,
next to nothing. So it is set against the network's own work, which is counted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_GRADIENT = 3  # forward passes in a gradient
_LEAST = 2  # flops of a parameter in a forward pass on a sample: a product and a sum


class ForwardFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Counts the flops of matrix products, convolutions and attention inside, by the formulas of torch's counter.

    Also inside ``torch.func.vmap``, where torch's own counter would take the gradients' grouped convolutions for
    several times what they are; those are left outside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operation, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def sample_flops(forward: ForwardFlops, samples: int, size: int) -> float:
    """Flops of a forward pass on one of the samples that were counted; two a parameter, of ``size``, at least."""
    return max(forward.total / samples, float(_LEAST * size))


def averaging_share(*, groups: int, samples: int, k: int, size: int, flops: float) -> float:
    """Work of averaging gradients of groups into k directions, over the work of the gradients themselves.

    Two Gram matrices, two mixtures, and a mean that is taken out: 4k^2 + 2k m + m^2 + 2m products and sums a parameter,
    with m groups.

    Args:
        groups: Gradients that are averaged, m.
        samples: In all groups.
        k: Directions.
        size: Number of parameters.
        flops: Of a forward pass on one sample.
    """
    return 2 * size * (4 * k**2 + 2 * k * groups + groups**2 + 2 * groups) / (_GRADIENT * flops * samples)
