"""The rule of Nudged SGD on any torch optimizer: scale its step down along the sharpest directions.

    step <- s * step + V (Gamma - s) V^T step        Gamma_i = gamma where eigenvalue i is positive, else 1

V holds the top k eigenvectors of the loss's Hessian, re-estimated now and then, and s is ``bulk_scale``
(Jastrzębski et al. 2019, section 5, with s = 1; gamma = 0 is Bulk-SGD and gamma = 1, s = 0 Dom-SGD of Song et al.
2025). The optimizer's own step is measured and rescaled, so its momentum, weight decay and schedules stay its own.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from nsgd.alarm import Alarm, jump
from nsgd.eigen import Eigenpairs, Solver, top_eigenpairs
from nsgd.hessian import Closure, Losses, check_params, is_finite, loss_hessian, split, vector_dtype
from nsgd.low_rank import Which
from nsgd.options import COUNTERS, SHARED, Estimator, check_options, damping_options
from nsgd.random_basis import random_basis
from nsgd.rule import Move, correct, cosines, in_float32, project, rows, sgd_moves
from nsgd.samples import gradient_moment
from nsgd.tracking import Average, follow

# Products beyond 2k: at 2k + 2, k = 10, the directions of a small CNN in training overlap the exact ones by 0.77 to
# 0.94 (benchmarks/results/eigen.csv), and what a stale basis loses until the next refresh is more than is missing.
_EXTRA_PRODUCTS = 2

# Of the last directions in their running average with gradients of 32 samples, which alone are mostly noise
# (benchmarks/results/tracking.csv). Products on a sample stand for themselves.
_DECAY = 0.95


class Damped(Optimizer):
    """What every damped optimizer has beside its base class: refreshes, the damped step, diagnostics.

    Mixed in before the base optimizer's class, by :class:`nsgd.NSGD` and :func:`damp`. The basis costs k P floats
    between refreshes; a refresh of m products needs (m + 2k + 3) P and the graph it takes them from, one from m
    gradients up to (3m + 5k) P, a random one 5k P.
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
                (see :func:`nsgd.hessian.loss_hessian`); for gradients, one pair for each of two or more groups.
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
        _check_size(first["k"], params)
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
            block.to(device=p.device, dtype=_basis_dtype(p), copy=True)
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

    # -- the damped step -------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """The base optimizer's step, damped. A closure is handed to the base optimizer, which calls it as it wants.

        Never waits for the device. Costs two passes over the basis and, unless the base optimizer is
        ``torch.optim.SGD`` without Nesterov and ``bulk_scale`` is 1, a copy of the parameters in it.
        """
        damped: list[Tensor] = []
        before: dict[Tensor, Tensor] = {}  # only where the step has to be measured
        with ExitStack() as stack:

            def prepare() -> None:
                if damped:
                    return
                self._last_step.pop("coefficients", None)
                damped.extend(p for p in self._directions if p.requires_grad and p.grad is not None)
                if damped and self._has_effect:
                    stack.enter_context(in_float32(damped, self.state))
                if not self._step_is_known(damped):
                    before.update((p, p.detach().clone()) for p in damped)

            if closure is None:
                prepare()
                loss = self._base_step(None)
            else:
                # The directions may be refreshed inside the closure, so the step begins when it has run.
                loss = self._base_step(_followed_by(closure, prepare))
            if damped:
                self._damp(damped, before)
        self._count_step()
        return loss

    def _step_is_known(self, damped: list[Tensor]) -> bool:
        """Whether the base step is that of ``torch.optim.SGD``, and nothing but its part in the basis is wanted."""
        plain = super().step.__func__ is SGD.step and type(self)._init_group is SGD._init_group  # type: ignore[attr-defined]
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        dense = all(p.grad is not None and p.grad.layout == torch.strided for p in damped)
        simple = all(group["bulk_scale"] == 1 and not group.get("nesterov") for group in self.param_groups)
        return plain and not scaled and dense and simple

    def _sgd_moves(self, damped: list[Tensor]) -> Iterator[Move]:
        wanted = set(damped)
        for group in self.param_groups:
            yield from sgd_moves((p for p in group["params"] if p in wanted), group, self.state)

    def _project(self, moves: Iterable[Move]) -> None:
        coefficients, squared_norm = project(moves, self._directions)
        known = self.param_groups[0]["mean_square"]
        last = self._last_step.get("mean_square", None if math.isnan(known) else squared_norm.new_tensor(known))
        jumped, mean = jump(coefficients, squared_norm, self.param_groups[0].get("lr", 1.0), last)
        self._last_step.update(coefficients=coefficients, squared_norm=squared_norm, mean_square=mean)
        if self.param_groups[0]["refresh_every"] == "auto":
            self._alarm.note(jumped)

    def _base_step(self, closure: Closure | None) -> Any:
        step: Callable[..., Any] = super().step.__func__  # type: ignore[attr-defined]
        if getattr(step, "hooked", False):  # torch wraps step to run its hooks; ours is wrapped already
            step = step.__wrapped__  # type: ignore[attr-defined]
        return step(self) if closure is None else step(self, closure)

    @property
    def _has_effect(self) -> bool:
        return any(g["curvature"] and (g["gamma"] != 1 or g["bulk_scale"] != 1) for g in self.param_groups)

    def _damp(self, damped: list[Tensor], before: dict[Tensor, Tensor]) -> None:
        with torch.no_grad():
            moves = {p: old.neg_().add_(p) for p, old in before.items()}  # p - old, in place of the copy
            measured = ((p, move, 1.0) for p, move in moves.items())
            self._project(measured if moves else self._sgd_moves(damped))
            coefficients = self._last_step["coefficients"]
            wanted = set(damped)
            for group in self.param_groups:
                gamma, bulk_scale = group["gamma"], group["bulk_scale"]
                at_rest = not isinstance(group["lr"], Tensor) and group["lr"] == 0  # the base step moves nothing there
                if not group["curvature"] or at_rest or (gamma == 1 and bulk_scale == 1):
                    continue
                own = [p for p in group["params"] if p in wanted]
                correct(own, self._directions, coefficients * (self._gammas(group) - bulk_scale))
                if bulk_scale != 1:
                    for p in own:
                        p.add_(moves[p], alpha=bulk_scale - 1)

    def _gammas(self, group: dict[str, Any]) -> Tensor:
        """Factors on the step along the directions, (k,): gamma where the weight is positive, else 1."""
        coefficients = self._last_step["coefficients"]
        positive = self._positive.to(coefficients.device)  # moves only where parameters lie on several devices
        return torch.ones_like(coefficients).masked_fill(positive, group["gamma"])

    def _count_step(self) -> None:
        first = self.param_groups[0]
        first["steps"] += 1
        many = first["warmup_steps"] + 20  # the first refresh was due at once
        if first["attempted_at"] < 0 and first["steps"] >= many and self._has_effect:
            self._warn_once(
                "plain",
                f"{type(self).__name__} has taken {first['steps']} steps without a refresh, so it is the plain base "
                "optimizer; call optimizer.backward(loss) in place of loss.backward(), or add the RefreshDirections "
                "callback in Lightning",
            )

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

    # -- groups, state, copies -------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its parameters join the directions at the next refresh."""
        if "_directions" in self.__dict__ and isinstance(param_group, dict):  # not while the base is constructed
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group)
        if group.get("differentiable", False):
            raise ValueError("expected differentiable=False: a damped step is not differentiable, got True")
        lr = group.get("lr", 0)
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"expected lr >= 0, got {lr} for a group")
        first = self.param_groups[0]
        for name in (*SHARED, "maximize"):
            if group.get(name) != first.get(name):
                raise ValueError(
                    f"{name} is one value for the whole optimizer, {first.get(name)!r}, got {group.get(name)!r} for "
                    "one group; gamma, bulk_scale and curvature may differ between groups"
                )

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the basis beside each parameter's state ("directions") unless ``save_basis=False``."""
        self._note_alarm()
        saved = super().state_dict()
        if self.param_groups[0]["save_basis"]:
            ids = (i for group in saved["param_groups"] for i in group["params"])
            blocks = {i: self._directions.get(p) for i, p in zip(ids, self._all_params(), strict=True)}
            extra = {i: {**saved["state"].get(i, {}), "directions": b} for i, b in blocks.items() if b is not None}
            saved["state"] = {**saved["state"], **extra}
        return saved

    def _note_alarm(self) -> None:
        """Bring what the alarm goes by to the host, for a checkpoint or a copy."""
        if "mean_square" in self._last_step:
            self.param_groups[0]["mean_square"] = float(self._last_step["mean_square"])
        self.param_groups[0]["alarm"] = self._alarm.is_on()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; a checkpoint of the plain base optimizer loads too, and the next step refreshes."""
        # Taken out before torch sees them: it would cast them to the parameter's dtype, and Adam takes any state
        # for its own.
        state: dict[Any, Any] = {}
        directions: dict[Any, Tensor] = {}
        for i, entry in state_dict["state"].items():
            if isinstance(entry, dict) and "directions" in entry:
                directions[i] = entry["directions"]
                entry = {name: value for name, value in entry.items() if name != "directions"}
                if not entry:
                    continue
            state[i] = entry
        own = [{name: group[name] for name in damping_options()} for group in self.param_groups]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, self._all_params(), strict=False):  # torch says which numbers do not fit
            if i in directions and directions[i].shape[1:] != p.shape:
                raise ValueError(
                    f"expected directions for a parameter of shape {tuple(p.shape)}, got "
                    f"{tuple(directions[i].shape[1:])}; the checkpoint is of another model"
                )
        super().load_state_dict({**state_dict, "state": state})
        for group, saved, options in zip(self.param_groups, state_dict["param_groups"], own, strict=True):
            group.update({name: value for name, value in options.items() if name not in saved})
        self._directions.clear()
        self._last_step.clear()
        self._alarm = Alarm(bool(self.param_groups[0]["alarm"]))
        for i, p in zip(ids, self._all_params(), strict=True):
            if i in directions:
                self._directions[p] = directions[i].to(device=p.device, dtype=_basis_dtype(p), copy=True)
        self._note_positive()
        if not self._directions:
            self.param_groups[0]["attempted_at"] = -1  # the next step refreshes

    def __getstate__(self) -> dict[str, Any]:
        self._note_alarm()
        return {**super().__getstate__(), "_directions": self._directions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_directions", {})
        self.__dict__.setdefault("_last_step", {})
        self.__dict__.setdefault("_warned", set())
        self._fill_groups()
        self._alarm = Alarm(bool(self.param_groups[0]["alarm"]))
        self._note_positive()

    def _fill_groups(self) -> None:
        """Give groups of an older, or of a plain, checkpoint the options that they lack."""
        for group in self.param_groups:
            for name, value in damping_options().items():
                group.setdefault(name, self.defaults.get(name, value))
        first = self.param_groups[0]
        first.setdefault("weights", list(first.get("eigenvalues", [])))
        for name, value in COUNTERS.items():
            first.setdefault(name, copy.copy(value))

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _begin_damping(self, options: dict[str, Any]) -> None:
        """Called once, when the base optimizer is complete."""
        self._directions, self._last_step, self._alarm, self._warned = {}, {}, Alarm(), set()
        self.defaults = {**self.defaults, **options}
        self._fill_groups()
        for group in self.param_groups:
            self._check_group(group)
        params = self._curvature_params()
        if not params:
            count = len(self._all_params())
            raise ValueError(
                f"none of the {count} parameters requires a gradient in a group with curvature=True; unfreeze some "
                "with requires_grad_()"
            )
        check_params(params)
        _check_size(self.param_groups[0]["k"], params)
        if isinstance(self, LBFGS) and any(p.dtype.itemsize < 4 for p in params):
            raise ValueError(
                "expected float32 or float64 parameters for L-BFGS, got half precision; convert them first"
            )


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


def _check_size(k: int, params: list[Tensor]) -> None:
    size = sum(p.numel() for p in params)
    if k > size:
        raise ValueError(f"expected k of at most {size}, the number of trainable parameters, got {k}")


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _basis_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _followed_by(closure: Closure, action: Callable[[], None]) -> Closure:
    def both() -> Tensor:
        loss = closure()
        with torch.no_grad():
            action()
        return loss

    return both
