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
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nsgd.eigen import Eigenpairs, Solver, Which, top_eigenpairs
from nsgd.hessian import Closure, Losses, check_params, loss_hessian, split
from nsgd.rule import correct, in_float32, project, rows

# Products beyond 2k: at 2k + 2, k = 10, the directions of a small CNN in training overlap the exact ones by 0.96 to
# 1.0 (benchmarks/results/eigen.csv), and what a stale basis loses until the next refresh is more than is missing.
_EXTRA_PRODUCTS = 2

# Options that one optimizer has once; gamma, bulk_scale and curvature may differ from group to group.
_SHARED = ("k", "refresh_every", "which", "solver", "warmup_steps", "save_basis")

# Plain numbers kept in the first parameter group, so that any checkpoint carries them.
_COUNTERS: dict[str, Any] = {
    "steps": 0,
    "refreshed_at": -1,  # value of steps at the last refresh
    "attempted_at": -1,  # and at the last attempt, also one that met a NaN
    "refreshes": 0,
    "skipped_refreshes": 0,
    "hvps": 0,
    "cost_gradients": 0.0,
    "overlap": math.nan,
    "eigenvalues": [],
}


def damping_options(
    *,
    k: int = 10,
    gamma: float = 0.1,
    refresh_every: int = 100,
    which: Which = "LA",
    bulk_scale: float = 1.0,
    solver: Solver = "lanczos",
    warmup_steps: int = 0,
    save_basis: bool = True,
) -> dict[str, Any]:
    """Validate the options of the rule and return them by name; :class:`nsgd.NSGD` describes them."""
    options = {
        "k": k,
        "gamma": gamma,
        "refresh_every": refresh_every,
        "which": which,
        "bulk_scale": bulk_scale,
        "solver": solver,
        "warmup_steps": warmup_steps,
        "save_basis": save_basis,
        "curvature": True,
    }
    _check_options(options)
    return options


def _check_options(options: dict[str, Any]) -> None:
    for name, least in (("k", 1), ("refresh_every", 1), ("warmup_steps", 0)):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"expected {name} to be a whole number of at least {least}, got {value!r}")
    for name in ("gamma", "bulk_scale"):
        value = options[name]
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"expected {name} to be a finite number >= 0 (1 leaves the step as it is), got {value!r}")
    for name, kind in (("which", Which), ("solver", Solver)):
        if options[name] not in get_args(kind):
            raise ValueError(f"expected {name} to be one of {', '.join(get_args(kind))}, got {options[name]!r}")


class Damped(Optimizer):
    """What every damped optimizer has beside its base class: refreshes, the damped step, diagnostics.

    Mixed in before the base optimizer's class, by :class:`nsgd.NSGD` and :func:`damp`. The basis costs k P floats
    between refreshes; a refresh of m products needs (m + k + 3) P and the graph it takes them from.
    """

    _directions: dict[Tensor, Tensor]  # parameter -> (k, *shape), float32 or float64, on the parameter's device
    _last_step: dict[str, Tensor]  # of the last damped step: coefficients (k,) and its squared norm
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
        return not self._directions or steps - counters["refreshed_at"] >= counters["refresh_every"]

    def refresh_if_due(
        self, loss: Tensor | Closure | Losses, scale: float = 1.0, *, batch_fraction: float = 1.0
    ) -> bool:
        """Refresh if ``refresh_every`` steps have passed, or there are no directions yet; before ``backward``.

        Takes and returns what :meth:`refresh` does.
        """
        return self.refresh_due and self.refresh(loss, scale, batch_fraction=batch_fraction)

    def refresh(self, loss: Tensor | Closure | Losses, scale: float = 1.0, *, batch_fraction: float = 1.0) -> bool:
        """Take new directions: the top eigenvectors of this loss's Hessian at the current parameters.

        ``.grad``, buffers, modes and random state stay as found, and ``loss.backward()`` still works afterwards.
        Cost: 2k + 2 products or fewer with Lanczos, at two gradients each (three over several batches).

        Args:
            loss: A loss with its graph, a closure that computes one, or pairs of closure and sample count
                (see :func:`nsgd.hessian.loss_hessian`).
            scale: What the loss was multiplied by (loss scale, 1 / accumulation); taken out of the eigenvalues.
            batch_fraction: Samples in the loss over samples in a training batch, for ``cost_gradients``.

        Returns:
            True if there are new directions; False if the loss or a product was NaN or infinite: the last
            directions are kept, and the refresh counts as skipped.

        Raises:
            ValueError: If the loss is no scalar, has no graph or reaches none of the parameters, or if fewer than
                k parameters can train.
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
        sign = -1.0 if first.get("maximize", False) else 1.0  # ascent on f is descent on -f
        limit = 2 * first["k"] + _EXTRA_PRODUCTS if first["solver"] == "lanczos" else None
        products, cost = 0, 1.0  # what a refresh that fails has spent: its gradient, and the products so far

        def hvp(vector: Tensor) -> Tensor:
            nonlocal products, cost
            products, cost = products + 1, hessian.cost(products + 1)
            return hessian.hvp(vector)

        try:
            with loss_hessian(loss, params, scale=sign * scale) as hessian:
                pairs = top_eigenpairs(
                    hvp,
                    params,
                    k=first["k"],
                    which=first["which"],
                    solver=first["solver"],
                    start=hessian.gradient,
                    max_hvps=limit,
                    seed=first["steps"],
                    repeated=False,
                )
        except FloatingPointError as error:
            self._count_refresh(products, cost * batch_fraction)
            first["skipped_refreshes"] += 1
            self._warn_once(
                "nan",
                f"refresh skipped at step {first['steps']}, the last directions are kept: {error}. Further "
                "skips are counted in skipped_refreshes without a warning",
            )
            return False
        self._count_refresh(products, cost * batch_fraction)
        self._take(pairs, params)
        first["refreshed_at"] = first["steps"]
        first["refreshes"] += 1
        return True

    def _count_refresh(self, products: int, cost: float) -> None:
        first = self.param_groups[0]
        first["attempted_at"] = first["steps"]
        first["hvps"] += products
        first["cost_gradients"] += cost

    def _take(self, pairs: Eigenpairs, params: list[Tensor]) -> None:
        blocks = [
            block.to(device=p.device, dtype=_basis_dtype(p), copy=True)
            for block, p in zip(split(pairs.eigenvectors, params), params, strict=True)
        ]
        overlap = math.nan
        if self._directions:
            known = [(self._directions[p], b) for p, b in zip(params, blocks, strict=True) if p in self._directions]
            cosines = sum((rows(old) @ rows(new).T).double().cpu() for old, new in known)  # (k, k)
            overlap = float(torch.as_tensor(cosines).square().sum() / len(pairs.eigenvalues))
        self._directions.clear()
        self._directions.update(zip(params, blocks, strict=True))
        self._last_step.clear()
        self.param_groups[0]["overlap"] = overlap
        self.param_groups[0]["eigenvalues"] = pairs.eigenvalues.tolist()

    def _curvature_params(self) -> list[Tensor]:
        return [p for g in self.param_groups if g["curvature"] for p in g["params"] if p.requires_grad]

    # -- the damped step -------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """The base optimizer's step, damped. A closure is handed to the base optimizer, which calls it as it wants.

        Never waits for the device. Costs two passes over the basis and a copy of the parameters in it.
        """
        before: dict[Tensor, Tensor] = {}
        with ExitStack() as stack:

            def prepare() -> None:
                if not before and self._directions:
                    damped = [p for p in self._directions if p.requires_grad and p.grad is not None]
                    if self._has_effect:
                        stack.enter_context(in_float32(damped, self.state))
                    before.update((p, p.detach().clone()) for p in damped)

            if closure is None:
                prepare()
                loss = self._base_step(None)
            else:
                # The directions may be refreshed inside the closure, so the step begins when it has run.
                loss = self._base_step(_followed_by(closure, prepare))
            self._last_step.pop("coefficients", None)
            if before:
                self._damp(before)
        self._count_step()
        return loss

    def _base_step(self, closure: Closure | None) -> Any:
        step: Callable[..., Any] = super().step.__func__  # type: ignore[attr-defined]
        if getattr(step, "hooked", False):  # torch wraps step to run its hooks; ours is wrapped already
            step = step.__wrapped__  # type: ignore[attr-defined]
        return step(self) if closure is None else step(self, closure)

    @property
    def _has_effect(self) -> bool:
        return any(g["curvature"] and (g["gamma"] != 1 or g["bulk_scale"] != 1) for g in self.param_groups)

    def _damp(self, before: dict[Tensor, Tensor]) -> None:
        with torch.no_grad():
            moves = {p: old.neg_().add_(p) for p, old in before.items()}  # p - old, in place of the copy
        coefficients, squared_norm = project(moves, self._directions)
        self._last_step.update(coefficients=coefficients, squared_norm=squared_norm)
        positive = self._positive(coefficients)
        for group in self.param_groups:
            at_rest = not isinstance(group["lr"], Tensor) and group["lr"] == 0  # the base step moves nothing there
            if group["curvature"] and not at_rest:
                own = {p: moves[p] for p in group["params"] if p in moves}
                correct(own, self._directions, coefficients, positive, group["gamma"], group["bulk_scale"])

    def _positive(self, like: Tensor) -> Tensor:
        """Which eigenvalues are positive, (k,), copied to the device once a refresh."""
        if "positive" not in self._last_step or self._last_step["positive"].device != like.device:
            values = torch.tensor(self.param_groups[0]["eigenvalues"], dtype=torch.float64)
            self._last_step["positive"] = (values > 0).to(like.device)
        return self._last_step["positive"]

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
        """The current top eigenvalues, descending; empty before the first refresh."""
        return tuple(self.param_groups[0]["eigenvalues"])

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
        _check_options(group)
        if group.get("differentiable", False):
            raise ValueError("expected differentiable=False: a damped step is not differentiable, got True")
        lr = group.get("lr", 0)
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"expected lr >= 0, got {lr} for a group")
        first = self.param_groups[0]
        for name in (*_SHARED, "maximize"):
            if group.get(name) != first.get(name):
                raise ValueError(
                    f"{name} is one value for the whole optimizer, {first.get(name)!r}, got {group.get(name)!r} for "
                    "one group; gamma, bulk_scale and curvature may differ between groups"
                )

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the basis beside each parameter's state ("directions") unless ``save_basis=False``."""
        saved = super().state_dict()
        if self.param_groups[0]["save_basis"]:
            ids = (i for group in saved["param_groups"] for i in group["params"])
            blocks = {i: self._directions.get(p) for i, p in zip(ids, self._all_params(), strict=True)}
            extra = {i: {**saved["state"].get(i, {}), "directions": b} for i, b in blocks.items() if b is not None}
            saved["state"] = {**saved["state"], **extra}
        return saved

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
        for i, p in zip(ids, self._all_params(), strict=True):
            if i in directions:
                self._directions[p] = directions[i].to(device=p.device, dtype=_basis_dtype(p), copy=True)
        if not self._directions:
            self.param_groups[0]["attempted_at"] = -1  # the next step refreshes

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_directions": self._directions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_directions", {})
        self.__dict__.setdefault("_last_step", {})
        self.__dict__.setdefault("_warned", set())
        self._fill_groups()

    def _fill_groups(self) -> None:
        """Give groups of an older, or of a plain, checkpoint the options that they lack."""
        for group in self.param_groups:
            for name, value in damping_options().items():
                group.setdefault(name, self.defaults.get(name, value))
        for name, value in _COUNTERS.items():
            self.param_groups[0].setdefault(name, copy.copy(value))

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _begin_damping(self, options: dict[str, Any]) -> None:
        """Called once, when the base optimizer is complete."""
        self._directions, self._last_step, self._warned = {}, {}, set()
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
