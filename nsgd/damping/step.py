"""The rule of Nudged SGD on any torch optimizer: scale its step down along the sharpest directions.

    step <- s * step + V (Gamma - s) V^T step        Gamma_i = gamma where eigenvalue i is positive, else 1

V holds the top k eigenvectors of the loss's Hessian, re-estimated now and then, and s is ``bulk_scale``
(Jastrzębski et al. 2019, section 5, with s = 1; gamma = 0 is Bulk-SGD and gamma = 1, s = 0 Dom-SGD of Song et al.
2025). The optimizer's own step is measured and rescaled, so its momentum, weight decay and schedules stay its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD

from nsgd.curvature.hessian import Closure, check_params
from nsgd.damping.rule import Move, correct, in_float32, project, sgd_moves
from nsgd.directions.alarm import Alarm, jump
from nsgd.directions.directions import Refreshing, basis_dtype, check_size
from nsgd.options import COUNTERS, SHARED, check_options, damping_options


class Damped(Refreshing):
    """What every damped optimizer has beside its base class: directions, the damped step, and their state.

    Mixed in before the base optimizer's class, by :class:`nsgd.NSGD` and :func:`nsgd.damp`.
    """

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
        many = first["warmup_steps"] + 10  # the first refresh was due at once; a gradient scaler may skip a few steps
        if first["attempted_at"] < 0 and first["steps"] >= many and self._has_effect:
            self._warn_once(
                "plain",
                f"{type(self).__name__} has taken {first['steps']} steps without a refresh, so it is the plain base "
                "optimizer; call optimizer.backward(loss) in place of loss.backward(), or add the RefreshDirections "
                "callback in Lightning",
            )

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
                self._directions[p] = directions[i].to(device=p.device, dtype=basis_dtype(p), copy=True)
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
        check_size(self.param_groups[0]["k"], params)
        if isinstance(self, LBFGS) and any(p.dtype.itemsize < 4 for p in params):
            raise ValueError(
                "expected float32 or float64 parameters for L-BFGS, got half precision; convert them first"
            )


def _followed_by(closure: Closure, action: Callable[[], None]) -> Closure:
    def both() -> Tensor:
        loss = closure()
        with torch.no_grad():
            action()
        return loss

    return both
