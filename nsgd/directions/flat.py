"""Parameters laid end to end, so that what is done along all of them takes a few launches, however many there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsgd.directions.shards import is_sharded, parts_of


class Span(NamedTuple):
    """The parameters of one group in a block."""

    group: int  # which of the optimizer's
    entries: slice  # of the block's P
    params: slice  # of its list


class Block:
    """Parameters of one device and precision, end to end, with their part of the basis.

    Of sharded parameters P counts what this process holds. Memory: (r + 1) P, the basis and one vector for the step.
    """

    def __init__(self, params: Sequence[tuple[int, Tensor]], basis_dtype: torch.dtype | None) -> None:
        self.params = [p for _, p in params]
        self.sharded = is_sharded(self.params[0])
        self.device, self.dtype = self.params[0].device, flat_dtype(self.params[0])
        self.basis_dtype = basis_dtype or self.dtype
        ends, self.spans = 0, list[Span]()
        self.starts: list[int] = []
        # How parts of a vector are laid out, which stays as it is here when a parameter's own layout changes: as the
        # parameter, where that is stored densely, so that copies run over memory in order.
        self.shapes = [p.shape for p in self.parts]
        self.strides = [_dense_stride(p) for p in self.parts]
        for i, (group, _) in enumerate(params):
            self.starts.append(ends)
            first = self.spans.pop() if self.spans and self.spans[-1].group == group else None
            start, place = (first.entries.start, first.params.start) if first else (ends, i)
            ends += self.shapes[i].numel()
            self.spans.append(Span(group, slice(start, ends), slice(place, i + 1)))
        self.size = ends
        self.basis = self.rows(0)  # (r, P)
        self._step: tuple[Tensor, list[Tensor]] | None = None

    @property
    def parts(self) -> list[Tensor]:
        """Parts of the parameters that this process holds: themselves, or their shards."""
        return parts_of(self.params)

    def rows(self, count: int) -> Tensor:
        """Zero vectors, ``count`` of them, in the precision of the basis, (count, P)."""
        return torch.zeros(count, self.size, dtype=self.basis_dtype, device=self.device)

    def vector(self) -> Tensor:
        """A zero vector (P,) in the precision of the parameters, float32 at least."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def views(self, vector: Tensor) -> list[Tensor]:
        """A vector (P,) cut into views shaped and laid out like the parameters."""
        return [self.view(vector, i) for i in range(len(self.params))]

    def view(self, vectors: Tensor, i: int) -> Tensor:
        """The part of vectors (..., P) along parameter i, (..., *shape)."""
        shape, start = self.shapes[i], self.starts[i]
        part = vectors[..., start : start + shape.numel()]
        lead = vectors.shape[:-1]
        return part.as_strided((*lead, *shape), (*vectors.stride()[:-1], *self.strides[i]))

    @property
    def step(self) -> tuple[Tensor, list[Tensor]]:
        """The vector for the step, with its views; kept, since making hundreds of views takes longer than the step."""
        if self._step is None:
            vector = self.vector()
            self._step = vector, self.views(vector)
        return self._step

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": None}


def _dense_stride(param: Tensor) -> tuple[int, ...]:
    return torch.empty_like(param, device="meta").stride()


def flat_dtype(param: Tensor) -> torch.dtype:
    """The precision of vectors along a parameter: its own, but float32 at least."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def blocks_of(params: Iterable[tuple[int, Tensor]], basis_dtype: torch.dtype | None) -> list[Block]:
    """Blocks of parameters, given with the numbers of their groups, in order of first appearance."""
    by_kind: dict[Any, list[tuple[int, Tensor]]] = {}
    for group, p in params:
        by_kind.setdefault((p.device, flat_dtype(p), is_sharded(p)), []).append((group, p))
    return [Block(members, basis_dtype) for members in by_kind.values()]


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor in the precision and on the device of another; itself, without a launch, where it is so."""
    return tensor if tensor.dtype == other.dtype and tensor.device == other.device else tensor.to(other)


def as_rows(block: Tensor) -> Tensor:
    """Vectors along one parameter (k, *shape) as (k, entries), also where it is a scalar or empty."""
    return block.reshape(len(block), math.prod(block.shape[1:]))
