"""Random directions: the control that the curvature has no part in (Jastrzębski et al. 2019, their released code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsgd.curvature.low_rank import low_rank


def random_basis(params: Sequence[Tensor], *, k: int, seed: int) -> Tensor:
    """Orthonormal directions (k, P) over all parameters jointly, uniform among all bases; float64 on the CPU.

    The principal axes of k normal vectors. Costs two passes over them and 2k P numbers for a moment; the global random
    state is not used.

    Args:
        params: The parameters, P entries together.
        k: Number of directions, at most P.
        seed: Draws them, the same whatever the device and the precision of the parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    # In float32 the last of P directions would be lost to rounding.
    normal = torch.randn(k, sum(p.numel() for p in params), generator=generator, dtype=torch.float64, device="cpu")
    _, directions = low_rank(torch.ones(k, device="cpu"), normal, k=k)
    return directions
