"""The gradients of single backward passes, where a step is made of several: the micro-batches of accumulation.

Their deviations from the mean are the noise of the gradient itself, without the drift that a difference of two steps
holds, and many in each step: they overlap the Hessian's outlying eigenvectors better (benchmarks/results/tracking.csv).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as _C
from torch.utils.hooks import RemovableHandle

from nsgd.directions.flat import Block

MOST = 8  # sums of passes that are told apart in a step; where there are more passes, each sum holds several

_WATCHED = 8  # parameters that tell, while no passes are kept, whether a step has several

_PATIENCE = 10  # steps of one pass after which accumulation is taken to be over

# What the passes' sum may deviate from the gradient of the step, as a share of its squared length: rounding in bfloat16
# does, clipping by value a little; a pass that was thrown away, or a gradient that was left over, by far more.
_DEVIATION = 0.01

# Passes that differ always in the same way are no samples of one gradient: losses of several tasks, real and fake
# images. So a cosine between the first pass's deviations of two steps is 0 on average, or else near 1.
_UNLIKE = 0.3
_MEMORY = 0.9  # of the mean of these cosines, a step


class PassHook:
    """The function that a parameter calls with its gradient of a pass; no hook of a user's."""

    __torch_unserializable__ = True  # torch would warn that a pickle lacks it; it is set again where it is loaded

    def __init__(self, passes: Passes, index: int) -> None:
        self.passes, self.index = weakref.ref(passes), index

    def __call__(self, gradient: Tensor) -> None:
        """Note the gradient, if the optimizer is still there."""
        passes = self.passes()
        if passes is not None:
            passes.note(self.index, gradient)


class Passes:
    """Counts the backward passes since the last step, and keeps their gradients once a step has had several.

    Memory: none of its own, but one vector as long as the parameters once passes are kept, to compare steps by.
    """

    def __init__(self) -> None:
        self.patience = 0  # steps for which passes are still kept
        self.first: list[Tensor] = []  # the first pass's deviation in the last step, (P,) for each block
        self.likeness = torch.zeros(2, device="cpu")  # decayed sums of cosines between steps, and of their weights
        self._fired: list[int] = []  # passes, by parameter; of the watched ones alone while none are kept
        self._odd = False  # whether one had a gradient that cannot be kept
        self._params: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._all = False  # whether all parameters call
        self._finalizer: weakref.finalize[Any, Any] | None = None  # takes the hooks away with this object
        self._rows: list[Tensor] = []  # where gradients are kept
        self._views: list[list[Tensor]] = []  # of these, by row and parameter; empty where none are kept
        self._before: Callable[[], None] | None = None  # what has to come before the first of them

    def __getstate__(self) -> dict[str, Any]:
        cleared: dict[str, Any] = {
            "_fired": [],
            "_params": [],
            "_handles": [],
            "_finalizer": None,
            "_rows": [],
            "_views": [],
            "_before": None,
        }
        return {**self.__dict__, **cleared}

    def watch(self, blocks: Sequence[Block]) -> None:
        """Count the passes of these parameters from now on; gradients are kept after the next :meth:`begin`."""
        self.leave()
        self._params = [p for block in blocks for p in block.params]
        self._fired = [0] * len(self._params)
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._finalizer.atexit = False
        self._hook()

    def _hook(self) -> None:
        """Have all parameters call while passes are kept, and a few otherwise: each call costs the host."""
        self._all = self.patience > 0
        _remove(self._handles)
        step = 1 if self._all else max(1, math.ceil(len(self._params) / _WATCHED))
        self._handles += [
            p.register_hook(PassHook(self, i))  # type: ignore[no-untyped-call]
            for i, p in list(enumerate(self._params))[::step]
            if p.requires_grad
        ]

    def leave(self) -> None:
        """Count none any more."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = None
        self._handles, self._params, self._fired, self._rows, self._views = [], [], [], [], []
        self._before = None

    def begin(
        self, blocks: Sequence[Block], rows: Sequence[Tensor], *, before: Callable[[], None] | None = None
    ) -> None:
        """Wait for the passes of the step that comes.

        Args:
            blocks: The parameters.
            rows: Where their gradients may be kept, (MOST, P) or more for each block; none where they must not be.
            before: Called once before the first is kept, as the rows may still be needed until then.
        """
        self._fired, self._odd = [0] * len(self._params), False
        self._before = before
        if self._all != (self.patience > 0):
            self._hook()
        if not rows or not self.patience:
            self._rows, self._views = [], []
        elif not self._rows or any(a is not b for a, b in zip(self._rows, rows, strict=True)):
            self._rows = list(rows)
            self._views = [
                [view for block, kept in zip(blocks, rows, strict=True) for view in block.views(kept[j])]
                for j in range(MOST)
            ]

    @property
    def keeping(self) -> bool:
        """Whether gradients are kept in the step that is under way."""
        return bool(self._views)

    def load(
        self, blocks: Sequence[Block], patience: int, likeness: Sequence[float], tensors: dict[int, dict[str, Tensor]]
    ) -> None:
        """Take over what a checkpoint holds."""
        self.patience = patience
        if not any("nsgd_first_pass" in entry for entry in tensors.values()):
            return
        self.first = [block.vector() for block in blocks]
        self.likeness = torch.tensor(likeness, dtype=torch.float32, device=blocks[0].device)
        for block, first in zip(blocks, self.first, strict=True):
            for i, p in enumerate(block.params):
                if "nsgd_first_pass" in tensors.get(id(p), {}):
                    block.view(first, i).copy_(tensors[id(p)]["nsgd_first_pass"])

    @torch.no_grad()
    def note(self, index: int, gradient: Tensor) -> None:
        """Called in a backward pass with a parameter's gradient."""
        if self._params[index].grad is None:  # what came before was thrown away by zero_grad, or was never kept
            self._fired[index] = 0
        count = self._fired[index]
        self._fired[index] += 1
        if not self.keeping:
            return
        if self._before is not None:
            before, self._before = self._before, None
            before()
        place = self._views[count % MOST][index]
        # Batched ones, many gradients at once, show the shape of one; torch has no public way to tell.
        batched = _C.is_batchedtensor(gradient) or _C.is_legacy_batchedtensor(gradient)
        if batched or gradient.layout != torch.strided or gradient.shape != place.shape:
            self._odd = True
            return
        if count < MOST:
            place.copy_(gradient)
        else:
            place.add_(gradient)

    def end(self) -> int:
        """Number of passes in the step; 0 where their gradients were not kept, or not one for each parameter."""
        passes = [0 if p.grad is None else n for p, n in zip(self._params, self._fired, strict=True)]
        count = max(passes, default=0)
        several = count > 1 and not self._odd and all(n in (0, count) for n in passes)
        self.patience = _PATIENCE if several else max(0, self.patience - 1)
        if not several or not self.keeping:
            return 0
        for i, n in enumerate(passes):
            if n == 0:  # unused: no part of any pass
                for views in self._views[:count]:
                    views[i].zero_()
        return count

    def centred(self, count: int, gradients: Sequence[Tensor]) -> tuple[Tensor, float]:
        """Turn what was kept into the passes' deviations from their mean, in place, on the scale of the gradient.

        With G_i the sum of s_i of the n passes, and g the gradient of the step, c times the sum S of all: the rows are
        c (G_i - (s_i / n) S). Their outer products, n / (n - sum s_i^2 / n) times, estimate the covariance of g.

        Args:
            count: Passes of the step, n.
            gradients: Of the step, (P,) for each block.

        Returns:
            Whether the passes make up the gradient, and are samples of one thing; and that factor.
        """
        used = min(count, MOST)
        sizes = [count // used + (i < count % used) for i in range(used)]
        rows = [kept[:used] for kept in self._rows]
        sums = [kept.sum(0, dtype=g.dtype) for kept, g in zip(rows, gradients, strict=True)]
        both, size, whole = (
            _inner(one, other) for one, other in ((sums, gradients), (sums, sums), (gradients, gradients))
        )
        scale = both / size  # of clipping, and of a loss that is scaled
        deviation = whole - both * scale
        good = (scale > 0) & (deviation <= _DEVIATION * whole)  # neither where one is NaN
        for kept, total in zip(rows, sums, strict=True):
            for row, n in zip(kept, sizes, strict=True):
                row.sub_(total, alpha=n / count)
            kept.mul_(scale.to(kept))
        good = good & self._alike([kept[0].to(g.dtype) for kept, g in zip(rows, gradients, strict=True)], good)
        return good, count / (count - sum(n * n for n in sizes) / count)

    def _alike(self, now: Sequence[Tensor], good: Tensor) -> Tensor:
        """Whether passes differ at random from step to step, by the first one's deviation; on the device."""
        if not self.first:
            self.first = [torch.zeros_like(vector) for vector in now]
            self.likeness = torch.zeros(2, dtype=torch.float32, device=good.device)
        # Roots before the product, which float32 might not hold.
        cosine = _inner(now, self.first) / (_inner(now, now).sqrt() * _inner(self.first, self.first).sqrt())
        known = good & cosine.isfinite()
        new = torch.stack([torch.where(known, cosine, 0), known]).to(self.likeness)
        self.likeness = self.likeness * torch.where(known, _MEMORY, 1.0) + new * (1 - _MEMORY)
        for vector, before in zip(now, self.first, strict=True):
            torch.where(good.to(vector.device), vector, before, out=before)
        return (self.likeness[1] > 0) & (self.likeness[0] < _UNLIKE * self.likeness[1])


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Inner product of vectors in blocks, where the first block is."""
    total = torch.dot(one[0], other[0])
    for a, b in zip(one[1:], other[1:], strict=True):
        total = total + torch.dot(a, b).to(total)
    return total
