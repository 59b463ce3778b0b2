"""The directions of a damped optimizer: when they are due, how they are estimated and averaged, what they cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from nsgd.curvature.eigen import Eigenpairs, Solver, top_eigenpairs
from nsgd.curvature.hessian import Closure, Losses, is_finite, loss_hessian, split, vector_dtype
from nsgd.curvature.low_rank import Which
from nsgd.damping.rule import cosines, rows
from nsgd.directions.alarm import Alarm
from nsgd.directions.random_basis import random_basis
from nsgd.directions.running_average import Average, follow
from nsgd.directions.samples import gradient_moment
from nsgd.options import Estimator

# Products beyond 2k: at 2k + 2, k = 10, the directions of a small CNN in training overlap the exact ones by 0.77 to
# 0.94 (benchmarks/results/eigen.csv), and what a stale basis loses until the next refresh is more than is missing.
_EXTRA_PRODUCTS = 2

# Of the last directions in their running average with gradients of 32 samples, which alone are mostly noise
# (benchmarks/results/tracking.csv). Products on a sample stand for themselves.
_DECAY = 0.95


class Refreshing(Optimizer):
    """The part of a damped optimizer that follows the sharpest directions; :class:`nsgd.damping.step.Damped` uses them.

    The basis costs k P floats between refreshes; a refresh of m products needs (m + 2k + 3) P and the graph it takes
    them from, one from m gradients up to (3m + 5k) P, a random one 5k P.
    """

    # Parameter -> (k, *shape), float32 or float64, on the parameter's device; fewer than k rows where fewer are known.
    _directions: dict[Tensor, Tensor]
    _last_step: dict[str, Tensor]  # of the last damped step: coefficients (k,), squared norm, mean square outside
    _positive: Tensor  # which weights of the directions are positive, (k,), on the device of the first
    _alarm: Alarm
    _warned: set[str]

    # -- refreshing ------------------------------------------------------------------------------------------

    def backward(
        self,
        loss: Tensor,
        curvature: Tensor | Closure | Losses | None = None,
        scale: float = 1.0,
        *,
        batch_fraction: float = 1.0,
    ) -> None:
        """``loss.backward()``, after a refresh of the directions where one is due.

        Args:
            loss: The training loss.
            curvature: Where the directions come from instead: a loss, a closure that computes one (called only
                when a refresh is due), or pairs of closure and sample count. A closure's buffers, modes and random
                state are restored.
            scale: What the loss that the curvature comes from was multiplied by.
            batch_fraction: Samples in ``curvature`` over samples in a training batch, for ``cost_gradients``.
        """
        if not isinstance(loss, Tensor):
            raise ValueError(f"expected the loss tensor, got a {type(loss).__name__}; a closure goes to curvature=")
        self.refresh_if_due(loss if curvature is None else curvature, scale, batch_fraction=batch_fraction)
        torch.autograd.backward(loss)

    @property
    def refresh_due(self) -> bool:
        """Whether the next call of :meth:`refresh_if_due` refreshes; at most once between two steps."""
        counters = self.param_groups[0]
        steps = counters["steps"]
        if steps < counters["warmup_steps"] or counters["attempted_at"] == steps:
            return False
        if not self._directions:
            return True
        if counters["refresh_every"] != "auto":
            return bool(steps - counters["refreshed_at"] >= counters["refresh_every"])
        budget = counters["overhead"] * (steps - counters["warmup_steps"])
        if self._alarm.is_on():
            budget *= 2
        return bool(counters["cost_gradients"] + counters["spared_gradients"] <= budget)

    def refresh_if_due(
        self, loss: Tensor | Closure | Losses, scale: float = 1.0, *, batch_fraction: float = 1.0
    ) -> bool:
        """Refresh if it is due, or if there are no directions yet; call it before ``backward``.

        With ``refresh_every="auto"`` a refresh is due as soon as all refreshes together cost no more than ``overhead``
        gradients a step. Where a step left the basis with twice its usual length or more, a sharp direction may have
        escaped: then they may cost twice as much, so that the next one comes at once.

        Takes and returns what :meth:`refresh` does.
        """
        return self.refresh_due and self.refresh(loss, scale, batch_fraction=batch_fraction)

    def refresh(self, loss: Tensor | Closure | Losses, scale: float = 1.0, *, batch_fraction: float = 1.0) -> bool:
        """Estimate the sharpest directions at the current parameters, and average them with the last ones.

        ``.grad``, buffers, modes and random state stay as found, and ``loss.backward()`` still works afterwards.
        Cost on the samples in the loss: one gradient from groups of them (solver "gradients"); with Lanczos
        2k + 2 products or fewer beside it, at two gradients each (three over several batches). With solver "random"
        the directions are drawn, nothing is averaged, and the loss is not looked at.

        Args:
            loss: A loss with its graph, a closure that computes one, or pairs of closure and sample count
                (see :func:`nsgd.curvature.hessian.loss_hessian`); for gradients, one pair for each of two groups or
                more.
            scale: What the loss was multiplied by (loss scale, 1 / accumulation); taken out of the eigenvalues.
            batch_fraction: Samples in the loss over samples in a training batch, for ``cost_gradients``.

        Returns:
            True if there are new directions; False if the loss, a gradient or a product was NaN or infinite: the
            last directions are kept, and the refresh counts as skipped.

        Raises:
            ValueError: If the loss is no scalar, has no graph or reaches none of the parameters, if fewer than
                k parameters can train, or if gradients are wanted and there are no groups.
        """
        if (processes := _processes()) > 1:
            raise ValueError(
                f"expected one process, got {processes}: each would take directions of its own, and the replicas "
                "would drift apart; train on one device"
            )
        for name, value in (("scale", scale), ("batch_fraction", batch_fraction)):
            if not 0 < value < math.inf:
                raise ValueError(f"expected {name} to be a finite number above 0, got {value}")
        first = self.param_groups[0]
        params = self._curvature_params()
        if not params:
            raise ValueError("expected a parameter that requires a gradient in a group with curvature=True, got none")
        check_size(first["k"], params)
        if first["solver"] == "random":
            self._draw(params, batch_fraction)
            return True
        spent = _Spent()
        if isinstance(loss, Iterable) and not isinstance(loss, Tensor | list):
            loss = list(loss)
        try:
            groups = _groups(first["solver"], loss)
            eigenvalues: list[float] = []
            if groups is not None:
                estimate = gradient_moment(groups, params, scale=scale)
            else:
                pairs = self._products(loss, params, scale, spent)
                estimate, eigenvalues = (pairs.eigenvalues, pairs.eigenvectors), pairs.eigenvalues.tolist()
        except FloatingPointError as error:
            self._count_refresh(spent, batch_fraction)
            first["skipped_refreshes"] += 1
            self._warn_once(
                "nan",
                f"refresh skipped at step {first['steps']}, the last directions are kept: {error}. Further "
                "skips are counted in skipped_refreshes without a warning",
            )
            return False
        self._count_refresh(spent, batch_fraction)
        self._take(*self._averaged(estimate, params, products=bool(eigenvalues)), params, eigenvalues)
        return True

    def _draw(self, params: list[Tensor], batch_fraction: float) -> None:
        first = self.param_groups[0]
        first["attempted_at"] = first["steps"]
        first["spared_gradients"] += batch_fraction
        # A function of the count, so that a resumed run draws what an uninterrupted one does.
        seed = (first["seed"] * 1_000_003 + first["refreshes"]) % 2**63
        basis = random_basis(params, k=first["k"], seed=seed)
        self._take(torch.ones(len(basis)), basis, params, [])  # weights that have them damped, and say no more

    def _products(
        self, loss: Tensor | Closure | Losses, params: list[Tensor], scale: float, spent: _Spent
    ) -> Eigenpairs:
        first = self.param_groups[0]
        solver: Solver = "arpack" if first["solver"] == "arpack" else "lanczos"
        sign = -1.0 if first.get("maximize", False) else 1.0  # ascent on f is descent on -f

        def hvp(vector: Tensor) -> Tensor:
            spent.hvps += 1
            spent.gradients = hessian.cost(spent.hvps)
            return hessian.hvp(vector)

        with loss_hessian(loss, params, scale=sign * scale) as hessian:
            return top_eigenpairs(
                hvp,
                params,
                k=first["k"],
                which=first["which"],
                solver=solver,
                start=hessian.gradient,
                max_hvps=2 * first["k"] + _EXTRA_PRODUCTS if solver == "lanczos" else None,
                seed=first["steps"],
                repeated=False,
            )

    def _averaged(
        self, estimate: tuple[Tensor, Tensor], params: list[Tensor], *, products: bool
    ) -> tuple[Tensor, Tensor]:
        """An estimate averaged with the last ones: weights (r,), orthonormal rows (r, P)."""
        first = self.param_groups[0]
        decay = (0.0 if products else _DECAY) if first["decay"] is None else first["decay"]
        which: Which = first["which"] if products else "LA"
        alike = bool(first["eigenvalues"]) == products  # moments of gradients and eigenvalues do not add up
        if products and decay == 0:  # eigenpairs stand for themselves, also the zeros among them
            return estimate
        last = None
        if first["weights"] and alike and all(p in self._directions for p in params):
            vectors = self.directions(params).to(estimate[1])
            if is_finite(vectors):
                weights = torch.tensor(first["weights"], dtype=torch.float64)
                last = Average(weights, vectors, first["averaged"], first["trace"])
        now = follow(last, estimate, decay=decay, k=first["k"], which=which)
        first["averaged"], first["trace"] = now.count, now.usual
        return now.weights, now.vectors

    def _count_refresh(self, spent: _Spent, batch_fraction: float) -> None:
        first = self.param_groups[0]
        first["attempted_at"] = first["steps"]
        first["hvps"] += spent.hvps
        first["cost_gradients"] += spent.gradients * batch_fraction

    def _take(self, weights: Tensor, vectors: Tensor, params: list[Tensor], eigenvalues: list[float]) -> None:
        blocks = [
            block.to(device=p.device, dtype=basis_dtype(p), copy=True)
            for block, p in zip(split(vectors, params), params, strict=True)
        ]
        overlap = math.nan
        if self._directions:
            known = [(self._directions[p], b) for p, b in zip(params, blocks, strict=True) if p in self._directions]
            cos = cosines(known)  # (old, new)
            overlap = float(cos.square().sum() / max(1, min(cos.shape)))
        self._directions.clear()
        self._directions.update(zip(params, blocks, strict=True))
        self._alarm = Alarm()
        for name in ("coefficients", "squared_norm"):
            self._last_step.pop(name, None)
        first = self.param_groups[0]
        first["overlap"], first["weights"], first["eigenvalues"] = overlap, weights.tolist(), eigenvalues
        first["refreshed_at"] = first["steps"]
        first["refreshes"] += 1
        self._note_positive()

    def _note_positive(self) -> None:
        device = next((p.device for p in self._directions), None)  # where the first coefficients are
        self._positive = (torch.tensor(self.param_groups[0]["weights"], dtype=torch.float64) > 0).to(device)

    def _curvature_params(self) -> list[Tensor]:
        return [p for g in self.param_groups if g["curvature"] for p in g["params"] if p.requires_grad]

    # -- diagnostics -----------------------------------------------------------------------------------------

    @property
    def eigenvalues(self) -> tuple[float, ...]:
        """Top eigenvalues that the last refresh found by products, descending; empty where there were none."""
        return tuple(self.param_groups[0]["eigenvalues"])

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the directions in the running average, descending: estimates of curvature, not eigenvalues.

        Of random directions 1 each, which says that they are damped and nothing of the loss.
        """
        return tuple(self.param_groups[0]["weights"])

    def directions(self, params: Iterable[Tensor]) -> Tensor:
        """The directions along these parameters, (r, P), in the order of the weights; zero along parameters without.

        Orthonormal where the parameters are all those that have directions; r is 0 before the first refresh. Costs a
        copy of the basis.
        """
        params = list(params)
        count = len(next(iter(self._directions.values()), ()))
        blocks = [self._directions[p] if p in self._directions else p.new_zeros(count, p.numel()) for p in params]
        dtype, device = vector_dtype(params), params[0].device
        return torch.cat([rows(block).to(device=device, dtype=dtype) for block in blocks], dim=1)

    @property
    def overlap(self) -> float:
        """Mean squared cosine between the last two bases, in [0, 1]; NaN before the second refresh."""
        return float(self.param_groups[0]["overlap"])

    @property
    def alignment(self) -> float:
        """Share of the base optimizer's last step, in norm, inside the basis; NaN before the first; one sync."""
        if "coefficients" not in self._last_step:
            return math.nan
        inside = torch.linalg.vector_norm(self._last_step["coefficients"])
        return float(inside / self._last_step["squared_norm"].sqrt())

    @property
    def refreshes(self) -> int:
        """Refreshes so far."""
        return int(self.param_groups[0]["refreshes"])

    @property
    def skipped_refreshes(self) -> int:
        """Refreshes that met a NaN or an infinity, and kept the last directions."""
        return int(self.param_groups[0]["skipped_refreshes"])

    @property
    def hvps(self) -> int:
        """Hessian-vector products so far."""
        return int(self.param_groups[0]["hvps"])

    @property
    def cost_gradients(self) -> float:
        """What the refreshes cost so far, in gradients of a training batch (forward and backward passes)."""
        return float(self.param_groups[0]["cost_gradients"])

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=3)


@dataclass
class _Spent:
    """What a refresh has cost so far, also one that fails: its gradient, and the products."""

    hvps: int = 0
    gradients: float = 1.0


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


def check_size(k: int, params: list[Tensor]) -> None:
    """Raise a ValueError if there are fewer parameters than directions."""
    size = sum(p.numel() for p in params)
    if k > size:
        raise ValueError(f"expected k of at most {size}, the number of trainable parameters, got {k}")


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def basis_dtype(param: Tensor) -> torch.dtype:
    """In what a parameter's block of the basis is kept."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32
