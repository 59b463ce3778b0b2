"""What a refresh does: directions from a second look at the loss, averaged with the last ones."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nsgd.curvature.checks import above_zero, shown
from nsgd.curvature.hessian import Closure, Losses
from nsgd.curvature.vectors import is_finite, split
from nsgd.directions.directions import NOT_FINITE, Directions, clamped
from nsgd.directions.on_host import OnHost
from nsgd.directions.processes import alike, gathered, inner_modules_only, mean, of_the_first, together
from nsgd.directions.products import Spent, eigenpairs_of
from nsgd.directions.random_basis import random_basis
from nsgd.directions.running_average import Average, follow
from nsgd.directions.sample_average import Past, centred, cleaned, fold
from nsgd.directions.samples import SampleLosses, checked_groups, say_smaller, write_gradients
from nsgd.directions.shards import is_sharded
from nsgd.directions.work import ForwardFlops, averaging_share, sample_flops
from nsgd.options import Estimator

# Of the last directions in their running average with gradients of 32 samples, which alone are mostly noise
# (benchmarks/results/tracking.csv). Products on a sample stand for themselves.
_DECAY = 0.95

# Eigenvalues below this share of the largest, or below their residual, may be rounding, or a flat direction.
_CERTAIN = 1e-3


def refresh(
    directions: Directions,
    loss: Tensor | Closure | Losses,
    scale: float,
    batch_fraction: float,
    batch_loss: Tensor | None,
    *,
    maximize: bool,
) -> bool:
    """Estimate the directions anew, and average them with the last ones; see the optimizer's ``refresh``."""
    options, counts = directions.options, directions.counts
    directions.learn_outcome()
    if options.solver == "differences":
        raise ValueError(
            "expected no curvature with solver='differences', which takes directions from training gradients "
            "alone, got some; leave it out, or take solver='auto', which goes by the curvature once it is given any"
        )
    params = [p for block in directions.blocks for p in block.params]
    if not any(p.requires_grad for p in params):
        raise ValueError("expected a parameter that requires a gradient in a group with curvature=True, got none")
    if any(map(is_sharded, params)):
        raise ValueError(
            "expected parameters that are whole in each process for directions from curvature, got sharded ones; "
            "leave curvature out: differences of training gradients need no more than shards"
        )
    device = directions.blocks[0].device
    with together(device):
        scale, batch_fraction = above_zero("scale", scale), above_zero("batch_fraction", batch_fraction)
        if batch_loss is not None and not (isinstance(batch_loss, Tensor) and batch_loss.numel() == 1):
            raise ValueError(
                f"expected batch_loss to be a tensor of one number, the mean loss of the batch, got {shown(batch_loss)}"
            )
        if isinstance(loss, Iterable) and not isinstance(loss, Tensor | list):
            loss = list(loss)
        groups = None if options.solver == "random" else _groups(options.solver, loss)
    # What a refresh costs is counted alike, so that the next one is due at the same step everywhere.
    batch_fraction = mean(batch_fraction, device)
    if not alike(groups is not None, device):
        raise ValueError(
            "expected curvature of one kind in all processes, got groups of samples in some and a loss in others; "
            "pass groups of samples in each of them"
        )
    options = directions.options = clamped(options, params, depth=4)  # some may have frozen since
    if options.solver == "random":
        _draw(directions, params, batch_fraction)
        return True
    if groups is not None:
        return _follow_samples(directions, groups, params, scale, batch_fraction, batch_loss)
    spent = Spent()
    signed = -scale if maximize else scale  # ascent on f is descent on -f
    try:
        values, vectors, residuals = eigenpairs_of(loss, params, options, spent, scale=signed, seed=counts.steps)
    except FloatingPointError as error:
        spent.count(counts, batch_fraction)
        directions.skip(counts.steps, str(error), depth=5)
        return False
    spent.count(counts, batch_fraction)
    directions.leave_differences()
    if directions.counts.steps:
        found = torch.ones((), dtype=torch.bool, device=values.device)
        directions.doubts.note_shares(split(vectors, params), params, _names([], params), found)
        directions.doubts.say(directions.warn_once)
    weights, averaged = _averaged(directions, (values, vectors), params)
    damped = values > torch.maximum(residuals, _CERTAIN * values.abs().max())
    if averaged is not vectors:
        averaged, weights = of_the_first(device, averaged, weights)
        damped = weights > 0
    directions.take(weights, averaged, params, values.tolist(), damped)
    return True


@torch.inference_mode(False)
@torch.no_grad()
def _follow_samples(
    directions: Directions,
    groups: Losses,
    params: list[Tensor],
    scale: float,
    batch_fraction: float,
    batch_loss: Tensor | None,
) -> bool:
    """Average the gradients of groups of samples with the last directions, without waiting for the device.

    Memory: a row of gradients for each group, of all processes. Where they are not finite the last directions stay.
    On the CPU that is known at once; elsewhere on the device alone, and to the host when somebody asks, or at the
    next refresh.
    """
    home = directions.blocks[0].device
    counter = None if directions.counts.sample_flops else ForwardFlops()
    with together(home), inner_modules_only():
        groups = checked_groups(groups)
        local_rows = [torch.empty(len(groups), b.size, dtype=b.dtype, device=b.device) for b in directions.blocks]
        views = [
            b.view(row, i) for b, row in zip(directions.blocks, local_rows, strict=True) for i in range(len(b.params))
        ]
        at_once = getattr(groups, "chunk_size", None)
        losses, counted = write_gradients(groups, params, views, scale=scale, forward=counter)
        say_smaller(groups, at_once, lambda sentence: directions.warn_once("memory", sentence, depth=9))
    size, samples = sum(block.size for block in directions.blocks), int(counted.sum())
    if counter is not None:
        directions.counts.sample_flops = mean(sample_flops(counter, samples, size), home)
    shares = (counted / samples).to(directions.weights, non_blocking=True)  # every process counts alike
    # A group without a label is left out, but a process without any has met a NaN: then all of them skip.
    losses = torch.where(losses.isnan().all(), math.inf, losses)
    losses, shares, *rows = gathered(losses, shares, *local_rows)
    spent = Spent()
    share = averaging_share(
        groups=len(shares), samples=samples, k=directions.options.k, size=size, flops=directions.counts.sample_flops
    )
    spent.gradients += mean(share, home)
    spent.count(directions.counts, batch_fraction)
    new = cleaned(rows, losses, shares)
    doubts = directions.doubts
    expected = None if batch_loss is None else batch_loss.detach() * scale  # as theirs are
    doubts.note_losses(losses.to(new.shares), new.good, expected)
    if directions.counts.steps:  # before the first, what is initialised with zero keeps others' gradients zero
        doubts.note_shares(views, params, _names(groups, params), new.good)
    if _is_known_at_once(home) and not new.good:
        directions.skip(directions.counts.steps, NOT_FINITE, depth=8)
        return False
    new = centred(rows, new)
    directions.leave_differences()
    if directions.rank > directions.options.k:  # more than the parameters have entries, since some froze
        directions.forget()
    # Moments and eigenvalues do not add up.
    follows = directions.rank > 0 and not directions.eigenvalues and directions.complete
    past = directions.past if follows else Past(*map(torch.zeros_like, (directions.past.count, directions.past.usual)))
    last, damped = directions.weights, directions.weights > 0 if directions.damped is None else directions.damped
    decay = _DECAY if directions.options.decay is None else directions.options.decay
    folded = fold(directions.blocks, rows, new, last, past, decay=decay, k=directions.options.k)
    directions.past = folded.past
    directions.weights = folded.weights
    damped = torch.cat([damped, damped.new_zeros(len(directions.weights) - len(damped))])
    directions.damped = torch.where(new.good, directions.weights > 0, damped)
    overlap = folded.overlap if len(last) else torch.full_like(folded.overlap, math.nan)
    before = directions.last_overlap.to(overlap, non_blocking=True)
    directions.last_overlap = torch.where(new.good, overlap, before)
    directions.note_change([])
    doubts.note_weights(directions.weights, new.good)
    if _is_known_at_once(home):
        doubts.say(directions.warn_once)
    if not _is_known_at_once(home):
        directions.outcome = OnHost(new.good)
    return True


def _names(groups: Losses, params: list[Tensor]) -> list[str]:
    """What parameters are called in the module of the samples; their shapes where that is not known."""
    module = groups.module if isinstance(groups, SampleLosses) else None
    known: dict[Tensor, str] = {} if module is None else {p: repr(name) for name, p in module.named_parameters()}
    return [known.get(p, f"number {i}, of shape {tuple(p.shape)}") for i, p in enumerate(params)]


def _draw(directions: Directions, params: list[Tensor], batch_fraction: float) -> None:
    """Follow directions that are drawn at random."""
    counts = directions.counts
    counts.attempted_at = counts.steps
    counts.spared_gradients += batch_fraction
    # A function of the count, so that a resumed run draws what an uninterrupted one does.
    seed = (directions.options.seed * 1_000_003 + counts.refreshes) % 2**63
    basis = random_basis(params, k=directions.options.k, seed=seed)
    (basis,) = of_the_first(directions.blocks[0].device, basis)
    ones = torch.ones(len(basis), device="cpu")  # weights that have them damped, and say no more
    directions.take(ones, basis, params, [], ones > 0)


def _averaged(directions: Directions, estimate: tuple[Tensor, Tensor], params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenpairs averaged with the last ones: weights (r,), orthonormal rows (r, P)."""
    decay = directions.options.decay or 0.0
    if decay == 0:  # they stand for themselves, also the zeros among them
        return estimate
    last = None
    if directions.rank and directions.eigenvalues and directions.complete:  # moments do not add up with them
        vectors = directions.along(params).to(estimate[1])
        if is_finite(vectors):
            past = int(directions.past.count), float(directions.past.usual)
            last = Average(directions.weights.cpu().double(), vectors, *past)
    now = follow(last, estimate, decay=decay, k=directions.options.k, which=directions.options.which)
    directions.past = Past(
        torch.tensor(float(now.count), device="cpu"), torch.tensor(now.usual, dtype=torch.float64, device="cpu")
    )
    return now.weights, now.vectors


def _groups(solver: Estimator, loss: Tensor | Closure | Losses) -> Losses | None:
    """The losses of groups of samples, where the directions come from their gradients; None where from products."""
    if not isinstance(loss, list):
        if solver == "gradients":
            raise ValueError(
                f"solver='gradients' expected a list of losses of groups of samples, got a {type(loss).__name__}; "
                "pass curvature=nsgd.sample_losses(lambda x, y: loss_fn(model(x), y), x, y), or take solver='lanczos'"
            )
        return None
    return loss if solver == "gradients" or (solver == "auto" and len(loss) > 1) else None


def _is_known_at_once(device: torch.device) -> bool:
    """Whether the host may read what lies there without a wait."""
    return device.type == "cpu"
