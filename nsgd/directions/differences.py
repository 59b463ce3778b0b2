"""Directions from the gradients that training computes anyway: no second look at the loss.

The difference of two successive gradients is H times the last step, plus noise whose covariance has nearly the
outlying eigenvectors of the Hessian H (for a log-likelihood it is the Fisher matrix; Papyan 2020, Martens 2020). Rows
of such differences are collected, and every few steps folded into a running average of rank k: one Gram matrix, one
small eigenproblem, one product. Where a step accumulates several backward passes, the deviations of their gradients
from the mean are rows as well, and folded at once.

The eigenproblem is the host's. Off the CPU it is solved when the next step comes, so that the device has a forward and
a backward pass to do while the host waits for the numbers of the last step; the directions are then one step late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.guard import full_precision
from nsgd.curvature.low_rank import NEGLIGIBLE, top_of_sum
from nsgd.directions.flat import Block, like
from nsgd.directions.mixing import inner_products, mix
from nsgd.directions.on_host import OnHost, on_device
from nsgd.directions.passes import MOST, Passes
from nsgd.directions.processes import settled
from nsgd.directions.shards import everywhere, parts_of

ROWS = 10  # that are collected between two folds, once there are many: a fold costs two passes over all of them

# Until then a fold comes whenever a quarter as many rows are new: in short runs the undamped beginning decides which
# learning rate is borne.
_SHARE = 4

_MOST = 1.5  # times the usual squared length that one row may count for: a spike of the loss must not own the average

_WHOLE = 16  # folds from one that orthonormalises its vectors anew to the next


@dataclass(frozen=True)
class _Begun:
    """A fold between its two halves."""

    gram: Tensor  # (k + n, k + n), inner products of the vectors and the rows
    numbers: OnHost  # those, with the shares, the weights, the mass and the usual size that they belong to


class Differences:
    """Rows of differences of successive gradients, and their running average over steps.

    Memory, beside the basis: (ROWS + 2) P, the rows and the last gradient, twice; P more where passes are accumulated.
    """

    def __init__(self) -> None:
        self.passes = Passes()
        self.recorded = 0  # steps that gave rows so far
        self.pending = 0  # of them those that are not in the average
        self.folds = 0  # since the vectors were last known to be orthonormal
        self.rows: list[Tensor] = []  # (ROWS, P) for each block
        self.together = False  # whether those are all of one step
        # What the outer product of a row counts for: 1/2 of a difference, which holds the noise of two gradients, or 0
        # where one was not finite.
        self.shares = torch.zeros(ROWS, device="cpu")
        self.mass = torch.zeros((), device="cpu")  # of the rows in the average, decayed: 1 where it is full
        self.usual = torch.zeros((), device="cpu")  # squared length of a step's rows, times their shares, of late
        self._now: list[Tensor] = []  # gradients (P,) for each block: of the step that comes, and of the last
        self._last: list[Tensor] = []
        self._views: dict[int, list[Tensor]] = {}  # of both, like the parameters; made when they are needed
        self._present: list[list[bool]] = []  # whether a parameter had a gradient in the last step
        self._known = torch.zeros(
            (), dtype=torch.bool, device="cpu"
        )  # whether there is a last gradient that was finite
        self._begun: _Begun | None = None

    def arrange(self, blocks: Sequence[Block]) -> None:
        """Make room for rows of these blocks, and begin the average anew."""
        home = blocks[0]
        self.pending, self.together, self._begun = 0, False, None
        self.rows = [block.rows(ROWS) for block in blocks]
        self._now, self._last = ([block.vector() for block in blocks] for _ in range(2))
        self._views = {}
        self._present = [[False] * len(block.params) for block in blocks]
        self._known = torch.zeros((), dtype=torch.bool, device=home.device)
        self.shares = torch.zeros(ROWS, dtype=home.dtype, device=home.device)
        self.mass, self.usual = (torch.zeros((), dtype=home.dtype, device=home.device) for _ in range(2))
        self.passes.first = []

    @torch.no_grad()
    def record(self, blocks: Sequence[Block], scale: Tensor | None = None, skipped: Tensor | None = None) -> None:
        """Take in the gradients of the step that comes.

        A row is the difference from the last gradient. Several backward passes give a row each beside it, their
        deviations from the mean, where their gradients were kept, make up the gradient of the step, and differ at
        random. A difference has entries along parameters that have a gradient now and had one in the last step. Where
        a gradient is not finite, the last one stays, and the row is zero and does not count.

        Args:
            blocks: The parameters.
            scale: What the gradients are still multiplied by, of shape (1,) or ().
            skipped: 1 where the base step will leave the parameters as they are, of shape (1,) or ().
        """
        finite: Tensor | None = None
        present = [[p.grad is not None and p.grad.layout == torch.strided for p in b.params] for b in blocks]
        for block, there, flat in zip(blocks, present, self._now, strict=True):
            if id(flat) not in self._views:
                self._views[id(flat)] = block.views(flat)
            if not all(there):
                flat.zero_()
            if any(there):
                targets = chosen(self._views[id(flat)], there)
                torch._foreach_copy_(targets, parts_of(chosen([p.grad for p in block.params], there)))
            if scale is not None:
                flat.div_(scale.to(flat))
            whole = like(flat.sum().isfinite(), self._known)
            finite = whole if finite is None else finite & whole
        assert finite is not None
        finite = everywhere(finite, [block.params[0] for block in blocks])
        if skipped is not None:
            finite = finite & like(skipped.reshape(()) == 0, finite)
        begun = any(any(had) for had in self._present)
        count = self.passes.end()
        for i, (there, had) in enumerate(zip(present, self._present, strict=True)):
            now, last = self._now[i], self._last[i]
            torch.where(finite if finite.device == now.device else finite.to(now.device), now, last, out=now)
            if begun:
                row = self.rows[i][min(count, MOST) if count else self.pending]
                torch.sub(now, last, out=row) if row.dtype == now.dtype else row.copy_(now - last)
                for j, both in enumerate(a and b for a, b in zip(there, had, strict=True)):
                    if not both:
                        blocks[i].view(row, j).zero_()
        if begun:
            share = 0.5 * torch.logical_and(finite, self._known).to(self.shares)
            if count:
                self._take_passes(count, finite, share)
            else:
                self.shares[self.pending] = share
                self.pending += 1
            self.recorded += 1
        self._known.logical_or_(finite)
        self._now, self._last, self._present = self._last, self._now, present

    def _take_passes(self, count: int, finite: Tensor, share: Tensor) -> None:
        """Count the rows of the passes, with the difference behind them; it alone where they are no good."""
        good, factor = self.passes.centred(count, self._now)
        used = min(count, MOST)
        self.pending, self.together = used + 1, True
        # A difference alone is worth as much as two passes, which show one direction; of more it is worth little.
        passes = (good & finite).to(share) * (1 - 4 * share / count**2)
        self.shares[:used] = factor * passes
        self.shares[used] = share * (1 - passes)
        for rows in self.rows:
            here = good if good.device == rows.device else good.to(rows.device)
            rows[:used].masked_fill_(~here, 0.0)

    def begin_step(self, blocks: Sequence[Block], *, several_processes: bool, finish: Callable[[], None]) -> None:
        """Wait for the backward passes of the step that comes.

        Of several processes each would have rows of its own: there the differences of the reduced gradients are taken.

        Args:
            blocks: The parameters.
            several_processes: Whether there are others.
            finish: Ends the fold that is due, if one is.
        """
        due = self.fold_due
        free = due or not self.pending
        rows = self.rows if free and not several_processes else []
        self.passes.begin(blocks, rows, before=finish if due else None)

    @property
    def begun(self) -> bool:
        """Whether there are buffers for rows."""
        return bool(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}, "_begun": None}  # a fold that waits for its end begins anew

    def saved(self, blocks: Sequence[Block]) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
        """Contents of a checkpoint: plain values, and tensors for each parameter by its identity."""
        values = {
            "recorded": self.recorded,
            "pending": self.pending,
            "together": self.together,
            "folds": self.folds,
            "shares": self.shares[: self.pending].tolist(),
            "mass": float(self.mass),
            "usual": float(self.usual),
            "known": bool(self._known),
            "patience": self.passes.patience,
            "likeness": self.passes.likeness.tolist(),
            "first_pass": bool(self.passes.first),
            # Parameters without a gradient in the last step, by their identities.
            "absent": [
                id(p)
                for block, there in zip(blocks, self._present, strict=True)
                for p, is_there in zip(block.params, there, strict=True)
                if not is_there
            ],
        }
        tensors: dict[int, dict[str, Tensor]] = {}
        for b, (block, rows, last) in enumerate(zip(blocks, self.rows, self._last, strict=True)):
            for i, p in enumerate(block.params):
                entry = tensors[id(p)] = {"nsgd_last_gradient": block.view(last, i).clone()}
                if self.passes.first:
                    entry["nsgd_first_pass"] = block.view(self.passes.first[b], i).clone()
                if self.pending:
                    entry["nsgd_rows"] = block.view(rows, i).clone()
                    entry["nsgd_rows"][self.pending :] = 0
        return values, tensors

    def load(self, blocks: Sequence[Block], values: dict[str, Any], tensors: dict[int, dict[str, Tensor]]) -> None:
        """Take over what :meth:`saved` gave."""
        self.arrange(blocks)
        self.recorded, self.pending, self.folds = values["recorded"], values["pending"], values["folds"]
        self.together = values.get("together", False)
        self.shares[: self.pending] = torch.tensor(values["shares"], device="cpu")
        self.mass.fill_(values["mass"])
        self.usual.fill_(values["usual"])
        self._known.fill_(values["known"])
        held = tensors if values.get("first_pass", True) else {}
        self.passes.load(blocks, values["patience"], values["likeness"], held)
        absent = values.get("absent", [])
        for block, rows, last, present in zip(blocks, self.rows, self._last, self._present, strict=True):
            for i, p in enumerate(block.params):
                entry = tensors.get(id(p), {})
                if "nsgd_last_gradient" in entry:
                    block.view(last, i).copy_(entry["nsgd_last_gradient"])
                    present[i] = id(p) not in absent
                if "nsgd_rows" in entry:
                    block.view(rows[: self.pending], i).copy_(entry["nsgd_rows"][: self.pending])

    @property
    def fold_due(self) -> bool:
        """Whether the rows that wait are to be folded into the average now."""
        if self.passes.keeping or self.together:  # their rows are many, and there must be room for the next
            return self.pending > 0
        return self.pending > 0 and self.pending >= min(ROWS, self.recorded // _SHARE)

    @property
    def folding(self) -> bool:
        """Whether a fold has begun, and waits for its end."""
        return self._begun is not None

    @torch.no_grad()
    @full_precision
    def begin_fold(self, blocks: Sequence[Block], weights: Tensor) -> None:
        """Send the inner products of the vectors and the rows that wait to the host; no host sync.

        Costs one Gram matrix of k + n vectors, n of them rows. Rows and vectors must stay as they are until the end.

        Args:
            blocks: The parameters, with k vectors each.
            weights: Of the vectors, (k,).
        """
        n = self.pending
        whole = self.folds % _WHOLE == 0  # rounding adds up from fold to fold, though slowly
        gram = inner_products(blocks, [rows[:n] for rows in self.rows], weights, whole=whole)  # (k + n, k + n)
        parts = (gram.reshape(-1), self.shares[:n], weights, self.mass[None], self.usual[None])
        self._begun = _Begun(gram, OnHost(torch.cat([like(part, gram) for part in parts])))

    @torch.no_grad()
    @full_precision
    def end_fold(self, blocks: Sequence[Block], weights: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        """Fold the rows that wait into the average, whose vectors are the blocks' bases.

        The host waits for what was queued before the fold began, and solves the eigenproblem. Costs one product of k
        with k + n vectors, and little memory.

        Args:
            blocks: The parameters, with k vectors each; they are replaced.
            weights: Of the vectors so far, (k,).
            decay: What an older row weighs, a step.

        Returns:
            The new weights (k,), and the overlap of the new vectors with the old ones, a mean squared cosine.
        """
        begun, self._begun = self._begun, None
        assert begun is not None
        n, k, together = self.pending, len(weights), self.together
        steps = 1 if together else n
        self.pending, self.together = 0, False
        self.folds += 1
        numbers = begun.numbers.get()
        entries, shares, old, mass, usual = torch.split(numbers, [(k + n) ** 2, n, k, 1, 1])
        gram, mass, usual = entries.view(k + n, k + n), mass.squeeze(), usual.squeeze()
        sizes = shares * gram.diagonal()[k:]  # by step
        ages = torch.zeros(n, dtype=gram.dtype, device="cpu")
        if together:
            sizes = sizes.sum().expand(n)
        else:
            ages = torch.arange(n - 1, -1, -1, dtype=gram.dtype, device="cpu")
        clip = torch.where((usual > 0) & (sizes > 0), _MOST * usual / sizes, math.inf).clamp(max=1)
        counted = (shares > 0).to(gram)
        mean = (counted * clip * sizes).sum() / counted.sum()  # NaN where none counts
        recent = (1 - decay) * decay**ages
        mass = mass * decay**steps
        new = counted.amax() * (1 - decay) if together else (counted * recent).sum()
        total = (mass + new).clamp(min=torch.finfo(gram.dtype).tiny)
        inputs = torch.cat([old * (mass / total), shares * recent * clip / total])
        values, mixing = top_of_sum(gram, inputs, k, negligible=NEGLIGIBLE[blocks[0].dtype])
        good = gram.isfinite().all() & mixing.isfinite().all()
        values = torch.where(good, values, old)
        mixing = torch.where(good, mixing, torch.eye(k, k + n, dtype=gram.dtype, device="cpu"))
        overlap = (mixing @ gram[:, :k]).square().sum() / (old > 0).sum().clamp(min=1)
        mass = torch.where(good, total, numbers[-2])
        mean = torch.where(usual > 0, (usual + mean) / 2, mean)
        usual = torch.where(good & mean.isfinite(), mean, usual)
        found = torch.cat([values, mixing.reshape(-1), torch.stack([mass, usual, overlap])])
        (found,) = settled(begun.gram, [block.params[0] for block in blocks], on_device(found, begun.gram.device))
        values, mixing, numbers = torch.split(found, [k, k * (k + n), 3])
        mass, usual, overlap = numbers.unbind()
        for block, rows in zip(blocks, self.rows, strict=True) if good else ():  # which the host knows
            mix(block, rows[:n], mixing.view(k, k + n))
        self.mass, self.usual = mass.to(self.mass), usual.to(self.usual)
        return values.to(weights), overlap


def chosen(items: Sequence[Any], there: Sequence[bool]) -> list[Any]:
    """Those items that are there."""
    return list(items) if all(there) else [item for item, is_there in zip(items, there, strict=True) if is_there]
