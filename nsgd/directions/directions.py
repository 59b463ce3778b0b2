"""The directions that an optimizer follows: their basis, where they come from, and what they cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.guard import full_precision
from nsgd.curvature.small import inverse_root
from nsgd.curvature.vectors import split, vector_dtype
from nsgd.directions.alarm import Alarm
from nsgd.directions.differences import Differences
from nsgd.directions.doubts import Doubts
from nsgd.directions.flat import Block, as_rows, blocks_of
from nsgd.directions.kept import DIRECTIONS, blank, filled
from nsgd.directions.mixing import inner_products, mix
from nsgd.directions.on_host import OnHost
from nsgd.directions.pace import Pace, settled_interval
from nsgd.directions.processes import (
    world,
)
from nsgd.directions.sample_average import Past
from nsgd.directions.schedule import Counts, refresh_due
from nsgd.directions.shards import check_shards, parts_of
from nsgd.options import FROM_TRAINING, DampingOptions

_SILENCE = 10  # steps without a refresh, where directions come from nothing else, before that is said

NOT_FINITE = (
    "the loss is NaN or infinite, or its gradient is; no curvature can be taken there. Where a single sample has no "
    "loss, as with a variance over samples (VICReg), pass larger groups (group_size), or take products "
    "(solver='lanczos')"
)


class Directions:
    """The basis of an optimizer, in blocks of one device and precision each, with its weights and counts.

    One object, so that whatever copies an optimizer's attributes shares it. Memory between steps: (k + 1) P for the
    basis and one vector, P the trainable parameters; (ROWS + 2) P more where directions come from differences of
    gradients (:class:`nsgd.directions.differences.Differences`).
    """

    def __init__(self, options: DampingOptions) -> None:
        self.options = options
        self.blocks: list[Block] = []
        self.weights = torch.empty(0, dtype=torch.float64, device="cpu")  # (r,), where the first block is
        self.damped: Tensor | None = None  # (r,), which of the directions are damped, where it is not all
        self.eigenvalues: list[float] = []
        self.counts = Counts()
        self.alarm = Alarm()
        self.pace = Pace()
        self.differences: Differences | None = None  # until the first refresh from a second look at the loss
        if options.solver in FROM_TRAINING:
            self.differences = Differences()
        self.past = Past(
            torch.zeros((), dtype=torch.float64, device="cpu"), torch.zeros((), dtype=torch.float64, device="cpu")
        )
        self.last_step: dict[str, Tensor] = {}  # coefficients (k,), squared norm, mean square outside the basis
        self.last_overlap = torch.tensor(math.nan, device="cpu")
        self.outcome: OnHost | None = None  # whether the last refresh was any good, while the host has not asked
        self.doubts = Doubts()
        self.complete = True  # whether every parameter has had a refresh
        self._key: tuple[Any, ...] = ()
        self._warned: set[str] = set()

    # -- parameters ------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Number of directions, 0 before the first."""
        return len(self.weights)

    def arrange(self, params: Sequence[tuple[int, Tensor]]) -> list[Block]:
        """The blocks of these parameters, given with the numbers of their groups; what is known of them is kept.

        Directions are zero along parameters that are new. Where the parameters are others than before, the host waits
        for the device once.

        Raises:
            ValueError: If a parameter has changed its shape.
        """
        key = (self.options.basis_dtype, *((i, id(p), p.shape, p.dtype, p.device) for i, p in params))
        if key == self._key:
            return self.blocks
        if not params:  # all are frozen: what is known of them stays
            self._key = ()
            return []
        for block in self.blocks:
            for p, shape in zip(block.parts, block.shapes, strict=True):
                if p.shape != shape:
                    raise ValueError(
                        f"expected a parameter of shape {tuple(shape)}, as it was when the optimizer was made, got "
                        f"{tuple(p.shape)}; make the optimizer anew, with the parameters as they are now"
                    )
        with torch.inference_mode(False), torch.no_grad():  # what is made here is written to in the steps that come
            self._rearrange(params)
        if self.differences is not None:
            self.differences.passes.watch(self.blocks)
        self._key = key
        return self.blocks

    def _rearrange(self, params: Sequence[tuple[int, Tensor]]) -> None:
        check_shards([p for _, p in params])
        if not self.blocks:  # the first time
            self.options = clamped(self.options, [p for _, p in params], depth=6)
        known = self.by_parameter()
        before = [(id(p), block.dtype, block.device) for block in self.blocks for p in block.params]
        rows = None
        if self.differences is not None and self.differences.begun:
            rows = self.differences.saved(self.blocks)
        self.blocks = blocks_of(params, self.options.basis_dtype)
        self._fill(known)
        self._move()
        now = [(id(p), block.dtype, block.device) for block in self.blocks for p in block.params]
        changed = now != before
        # What is left of vectors whose parameters froze is shorter, as the moment's restriction is: that stays.
        if changed and self.rank and {identity for identity, *_ in now} == {identity for identity, *_ in before}:
            self._orthonormalise()
        if self.differences is not None and rows is not None:
            self.differences.load(self.blocks, *rows)
            if changed:
                self.differences.folds = 0  # what is left of the vectors is not orthonormal

    def _fill(self, known: dict[int, Tensor]) -> None:
        """Give the blocks a basis of the directions that are known of parameters, zero along the others."""
        for block in self.blocks:
            block.basis = block.rows(self.rank)
            for i, p in enumerate(block.params):
                if id(p) in known:
                    block.view(block.basis, i).copy_(known[id(p)])
                elif self.rank:
                    self.complete = False

    def _orthonormalise(self) -> None:
        """Take the orthonormal basis that is closest, after a change that left one only nearly so."""
        none = [block.basis[:0] for block in self.blocks]
        gram = inner_products(self.blocks, none, self.weights, whole=True)
        mixing = inverse_root(gram)
        for block, rows in zip(self.blocks, none, strict=True):
            mix(block, rows, mixing, mixing.isfinite().all())

    def by_parameter(self) -> dict[int, Tensor]:
        """The directions along each parameter, (r, *shape), by its identity; empty where there are none."""
        if not self.rank:
            return {}
        return {id(p): b.view(b.basis, i) for b in self.blocks for i, p in enumerate(b.params)}

    def _move(self) -> None:
        """Bring what is small to where the first block is."""
        if self.blocks:
            home = self.blocks[0].device
            self.weights = self.weights.to(home, _small_dtype(home))
            self.damped = None if self.damped is None else self.damped.to(home)
            self.last_step = {name: value.to(home) for name, value in self.last_step.items()}
            self.past = Past(self.past.count.to(self.weights), self.past.usual.to(self.weights))

    def along(self, params: Sequence[Tensor]) -> Tensor:
        """The directions along these parameters, (r, P), in the order of the weights; zero along those without.

        Along sharded parameters P counts what this process holds.
        """
        known = self.by_parameter()
        parts = [parts_of([p])[0] for p in params]
        blocks = [
            known.get(id(p), part.new_zeros(self.rank, *part.shape)) for p, part in zip(params, parts, strict=True)
        ]
        dtype, device = vector_dtype(params), params[0].device
        return torch.cat([as_rows(block).to(device=device, dtype=dtype) for block in blocks], dim=1)

    # -- from training gradients -----------------------------------------------------------------------------

    def note_gradients(self, scale: Tensor | None, skipped: Tensor | None) -> None:
        """Take in the gradients of the step that comes, and fold them into the average where that is due."""
        if self.differences is None or self.counts.steps < self.options.warmup_steps or not self.blocks:
            return
        if not self.differences.begun:
            self.differences.arrange(self.blocks)
            self._say_sparse()
        self._finish_fold()
        self.differences.record(self.blocks, scale, skipped)
        if self.differences.fold_due:
            self._begin_fold(self.differences)
            if not folds_late(self.blocks[0].device):
                self._finish_fold()

    def _begin_fold(self, differences: Differences) -> None:
        if not self.rank:
            home = self.blocks[0].device
            self.weights = torch.zeros(self.options.k, dtype=_small_dtype(home), device=home)
            for block in self.blocks:
                block.basis = block.rows(self.options.k)
        differences.begin_fold(self.blocks, self.weights)

    def _finish_fold(self) -> None:
        """Fold the rows that wait into the average, if that is due."""
        if self.differences is None or not self.differences.fold_due:
            return
        if not self.differences.folding:  # in a checkpoint, or a copy
            self._begin_fold(self.differences)
        self.weights, overlap = self.differences.end_fold(self.blocks, self.weights, self.options.step_decay)
        self.last_overlap = overlap if self.counts.refreshes else torch.tensor(math.nan, device="cpu")
        self.counts.refreshes += 1
        self.counts.refreshed_at = self.counts.steps

    def _say_sparse(self) -> None:
        """Say once which parameters get no directions, since their gradients are sparse."""
        count = sum(p.grad is not None and p.grad.is_sparse for block in self.blocks for p in block.params)
        if count:
            self.warn_once(
                "sparse",
                f"parameters with sparse gradients ({count}) train under the base optimizer alone; build the embedding "
                "with sparse=False, and they have their part of the directions",
                depth=8,
            )

    def end_step(self) -> None:
        """Called when a step has been made, or left out."""
        counts, options = self.counts, self.options
        waited = counts.attempted_at < 0 and counts.steps == options.warmup_steps + _SILENCE
        if waited and options.solver not in FROM_TRAINING:
            self.warn_once(
                "refresh",
                f"{_SILENCE} steps with solver={options.solver!r} and no refresh were those of the base optimizer; "
                "call optimizer.backward(loss) in place of loss.backward(), or optimizer.refresh_if_due before it, or "
                "take solver='auto', which needs neither",
                depth=5,
            )
        if self.differences is not None:
            alone = world() == 1 and not any(block.sharded for block in self.blocks)
            self.differences.begin_step(self.blocks, several_processes=not alone, finish=self._finish_fold)

    # -- from a second look at the loss ----------------------------------------------------------------------

    @property
    def _is_timed(self) -> bool:
        """Whether the price of refreshes in seconds is wanted, and not known yet."""
        by_price = self.options.refresh_every == "auto" and self.options.solver != "random"
        return by_price and self.differences is None and not self.counts.interval and bool(self.blocks)

    def timed_refresh(self) -> AbstractContextManager[None]:
        """Around a refresh, so that its time is noted where that is wanted."""
        return self.pace.refresh(self.blocks[0].device) if self._is_timed else nullcontext()

    def time_step(self) -> None:
        """Called when a step has been made; where the price of refreshes is known, settles their interval: one wait."""
        if not self._is_timed:
            return
        device = self.blocks[0].device
        self.pace.end_step(device)
        if self.pace.is_known:
            self.counts.interval = settled_interval(self.pace, self.options.overhead, device)
            self.pace = Pace()

    @property
    def refresh_due(self) -> bool:
        """Whether a refresh from a second look at the loss is due; at most once between two steps."""
        if self.options.solver == "differences":
            return False
        known = self.rank > 0 and self.differences is None
        return refresh_due(self.counts, self.options, known=known, alarm=self.alarm.is_on())

    def skip(self, step: int, why: str, depth: int) -> None:
        """Count a refresh as skipped, and say so once."""
        self.counts.skipped_refreshes += 1
        self.warn_once(
            "nan",
            f"refresh skipped at step {step}, the last directions are kept: {why}. Further skips are counted in "
            "skipped_refreshes without a warning",
            depth,
        )

    def learn_outcome(self) -> None:
        """Count the last refresh as skipped, if it was; waits for the device where that has not come so far."""
        self.doubts.say(self.warn_once)
        outcome, self.outcome = self.outcome, None
        if outcome is not None and not outcome.is_true():
            self.counts.refreshes -= 1
            self.skip(self.counts.refreshed_at, NOT_FINITE, depth=8)

    def leave_differences(self) -> None:
        """Go by a second look at the loss from now on, and no longer by training gradients."""
        if self.differences is not None and self.rank:
            self.warn_once(
                "source",
                f"from step {self.counts.steps} on the directions come from the curvature that is given; those from "
                "training gradients are dropped. Leave curvature out, or give it from the first step on",
            )
            self.forget()
        if self.differences is not None:
            self.differences.passes.leave()
        self.differences = None

    def forget(self) -> None:
        """Have no directions, as before the first."""
        self.weights, self.damped = self.weights[:0], None
        self.eigenvalues, self.last_overlap = [], torch.tensor(math.nan, device="cpu")
        self.last_step.clear()
        for block in self.blocks:
            block.basis = block.rows(0)

    def take(
        self, weights: Tensor, vectors: Tensor, params: Sequence[Tensor], eigenvalues: list[float], damped: Tensor
    ) -> None:
        """Follow these directions from now on.

        Args:
            weights: (r,), descending.
            vectors: Orthonormal rows (r, P).
            params: The parameters of the blocks, P entries together, in the order of the vectors.
            eigenvalues: (r,) where the weights are eigenvalues, else none.
            damped: Which of the directions are damped, (r,).
        """
        parts = dict(zip(map(id, params), split(vectors, params), strict=True))
        shared: Tensor | None = None
        for block in self.blocks:
            old, block.basis = block.basis, block.rows(len(weights))
            for i, p in enumerate(block.params):
                block.view(block.basis, i).copy_(parts[id(p)])
            cosines = _products(old, block.basis).to(self.weights)
            shared = cosines if shared is None else shared + cosines
        assert shared is not None
        there = (self.weights != 0).sum() if not self.eigenvalues else torch.tensor(self.rank, device="cpu")
        fewer = there.clamp(min=1, max=max(1, len(weights)))
        self.last_overlap = shared.square().sum() / fewer if self.rank else torch.tensor(math.nan, device="cpu")
        self.weights, self.damped = weights.detach().clone(), damped
        self.note_change(eigenvalues)

    def note_change(self, eigenvalues: list[float]) -> None:
        """Called when there are new directions."""
        self.alarm = Alarm()
        for name in ("coefficients", "squared_norm"):
            self.last_step.pop(name, None)
        self.eigenvalues = eigenvalues
        self.complete = True
        self._move()
        self.counts.refreshed_at = self.counts.steps
        self.counts.refreshes += 1

    # -- diagnostics -----------------------------------------------------------------------------------------

    @property
    def known_counts(self) -> Counts:
        """The counts, with what came of the last refresh; waits for the device where that is still under way."""
        self.learn_outcome()
        return self.counts

    @property
    def overlap(self) -> float:
        """Mean squared cosine between the last two bases; NaN before the second; one sync."""
        return float(self.last_overlap)

    @property
    def alignment(self) -> float:
        """Share of the base optimizer's last step, in norm, inside the basis; NaN before the first; one sync."""
        if "coefficients" not in self.last_step:
            return math.nan
        inside = torch.linalg.vector_norm(self.last_step["coefficients"])
        return float(inside / self.last_step["squared_norm"].sqrt())

    def warn_once(self, key: str, message: str, depth: int = 4) -> None:
        """Warn, unless this has been said; so many calls from here lies the line that the warning is of."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=depth)

    # -- copies and checkpoints ------------------------------------------------------------------------------

    @property
    def is_new(self) -> bool:
        """Whether nothing has been done yet that a checkpoint would have to hold."""
        begun = self.differences is not None and self.differences.begun
        return not (self.counts.steps or self.rank or begun)

    def __getstate__(self) -> dict[str, Any]:
        self.learn_outcome()
        return {**self.__dict__, "_key": (), "alarm": Alarm(self.alarm.is_on())}  # identities are of this process

    def saved(self) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
        """Contents of a checkpoint: plain values, and tensors for each parameter by its identity."""
        values: dict[str, Any] = {
            **vars(self.known_counts),
            "averaged": int(self.past.count),
            "trace": float(self.past.usual),
            "differences": self.differences is not None,
            "overlap": self.overlap,
            "eigenvalues": list(self.eigenvalues),
            "weights": self.weights.tolist(),
            "damped": None if self.damped is None else self.damped.tolist(),
            "alarm": self.alarm.is_on(),
            "mean_square": float(self.last_step.get("mean_square", math.nan)),
        }
        if self.is_new or not self.options.save_basis:
            return values, {}
        tensors = blank(self.options, self.blocks, whole=False)
        for identity, rows in self.by_parameter().items():
            tensors[identity][DIRECTIONS] = filled(rows, self.options.k)
        if self.differences is not None and self.differences.begun:
            values["rows"], entries = self.differences.saved(self.blocks)
            for identity, entry in entries.items():
                tensors[identity].update(entry)
        return values, tensors

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, values: dict[str, Any], tensors: dict[int, dict[str, Tensor]]) -> None:
        """Take over what :meth:`saved` gave; the blocks are those of the parameters now."""
        self.counts = Counts(**{name: values[name] for name in vars(self.counts) if name in values})
        self.forget()
        self.outcome = None
        held = (float(values.get(name, 0.0)) for name in ("averaged", "trace"))
        self.past = Past(*(torch.tensor(value, dtype=torch.float64, device="cpu") for value in held))
        self.pace = Pace()
        self.alarm = Alarm(bool(values.get("alarm", False)))
        self.complete = True
        count = len(values.get("weights", []))  # what is saved beyond is zero
        known = {identity: entry[DIRECTIONS][:count] for identity, entry in tensors.items() if DIRECTIONS in entry}
        looks_twice = self.options.solver == "auto" and self.counts.refreshes > 0  # where a checkpoint does not say
        training = values.get("differences", self.options.solver in FROM_TRAINING and not looks_twice)
        if self.differences is not None:
            self.differences.passes.leave()
        self.differences = Differences() if training else None
        if self.differences is not None:
            self.differences.passes.watch(self.blocks)
        mean_square = values.get("mean_square", math.nan)
        if not math.isnan(mean_square):
            self.last_step["mean_square"] = torch.tensor(mean_square, dtype=torch.float64, device="cpu")
        if known and count:
            self.weights = torch.tensor(values["weights"], dtype=torch.float64, device="cpu")
            self.damped = (
                None if values["damped"] is None else torch.tensor(values["damped"], dtype=torch.bool, device="cpu")
            )
            self.eigenvalues = list(values["eigenvalues"])
            self.last_overlap = torch.tensor(values["overlap"], dtype=torch.float64, device="cpu")
            self._fill(known)
            if {rows.dtype for rows in known.values()} != {block.basis_dtype for block in self.blocks}:
                self._move()
                self._orthonormalise()
        elif self.differences is None:
            self.counts.attempted_at = -1  # the next step refreshes
        self._move()
        if self.differences is not None and "rows" in values and tensors and self.blocks:
            self.differences.load(self.blocks, values["rows"], tensors)
        self.end_step()


def folds_late(device: torch.device) -> bool:
    """Whether a fold ends when the next step comes: where the host would wait for its numbers."""
    return device.type != "cpu"


def _small_dtype(device: torch.device) -> torch.dtype:
    """Precision that small tensors are kept in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@full_precision
def _products(one: Tensor, other: Tensor) -> Tensor:
    return one @ other.T


def clamped(options: DampingOptions, params: Sequence[Tensor], depth: int) -> DampingOptions:
    """The options with k at most the number of these parameters' entries; says so where that makes it less."""
    size = max(1, sum(p.numel() for p in params))
    if options.k <= size:
        return options
    warnings.warn(
        f"k={options.k} is more than the {size} entries of the parameters that train, so k={size} is taken; pass that "
        "or less",
        stacklevel=depth,
    )
    return replace(options, k=size)
