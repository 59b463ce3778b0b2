"""Parameters as one vector of P entries, in the order in which they are given: dtype, blocks, checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from nsgd.curvature.guard import full_precision


def listed(params: Iterable[Tensor]) -> list[Tensor]:
    """Parameters as a list; a ValueError unless they are dense tensors of real numbers with a shape, one at least."""
    if not isinstance(params, Iterable) or isinstance(params, Tensor | str | bytes):
        raise ValueError(f"expected parameters, got a {type(params).__name__}; pass model.parameters()")
    found = list(params)
    if not all(isinstance(p, Tensor) for p in found):
        raise ValueError("expected parameters, got something else among them; pass model.parameters()")
    if not found:
        raise ValueError("got no parameters; pass those of the model, for example model.parameters()")
    if any(is_lazy(p) for p in found):
        raise ValueError("got parameters of a lazy module, without a shape yet; run the model once before")
    if any(p.is_complex() for p in found):
        raise ValueError("got complex parameters; hold their real and imaginary parts as two real parameters")
    if any(p.layout != torch.strided for p in found):
        raise ValueError("got sparse parameters; hold them as dense ones, to_dense()")
    return found


def refuse_meta(params: Sequence[Tensor]) -> None:
    """Raise a ValueError where some parameters hold no values, and others do."""
    if any(p.is_meta for p in params) and not all(p.is_meta for p in params):
        raise ValueError("got some parameters on the meta device, which hold no values; give them some, by to_empty()")


def checked_params(params: Iterable[Tensor]) -> list[Tensor]:
    """Parameters as a list, each once, however often it is given.

    Raises:
        ValueError: Unless they are real parameters with a shape, of which at least one requires a gradient; or if
            some of them hold no values.
    """
    found = listed(params)
    refuse_meta(found)
    if not any(p.requires_grad for p in found):
        raise ValueError(f"none of the {len(found)} parameters requires a gradient; unfreeze some: requires_grad_()")
    return list({id(p): p for p in found}.values())


def vector_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """The dtype of flat vectors: float64 if any parameter is, else float32, also for half precision."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


def flatten(blocks: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Lay blocks shaped like the parameters end to end, (P,); a missing block is zero."""
    dtype, device = vector_dtype(params), params[0].device
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=dtype, device=device)
            if block is None
            else block.detach().reshape(-1).to(device=device, dtype=dtype)
            for block, p in zip(blocks, params, strict=True)
        ]
    )


def split(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Cut (..., P) into blocks (..., *shape), one for each parameter: views, not copies."""
    lead = vector.shape[:-1]
    return [
        part.view((*lead, *p.shape))
        for part, p in zip(torch.split(vector, [p.numel() for p in params], dim=-1), params, strict=True)
    ]


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; waits for the device."""
    # The sum takes a fraction of the time and no memory; it may overflow where the entries do not.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


# Between these, float32 holds the squares of the entries of a vector of this length, to the last digit.
IN_RANGE = (1e-12, 1e12)


def length(vector: Tensor) -> float:
    """Length of a vector (P,), also where float32 would not hold the squares of its entries; waits for the device."""
    norm = float(torch.linalg.vector_norm(vector))
    if IN_RANGE[0] < norm < IN_RANGE[1]:
        return norm
    largest = float(vector.abs().max()) if len(vector) else 0.0
    return largest * float(torch.linalg.vector_norm(vector / largest)) if 0 < largest < math.inf else largest


def random_unit(like: Tensor, generator: torch.Generator) -> Tensor:
    """A vector of length 1 in a random direction, (P,) as ``like``; the same one whatever the device."""
    # So it is drawn on the CPU.
    vector = torch.randn(like.numel(), generator=generator, dtype=torch.float64, device="cpu").to(like)
    norm: Tensor = torch.linalg.vector_norm(vector)
    return vector / norm


@full_precision
def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product outside autocast and TF32."""
    return left @ right
