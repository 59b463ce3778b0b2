"""The rule of Nudged SGD on any torch optimizer: scale its step down along the sharpest directions.

    step <- s * step + V (Gamma - s) V^T step        Gamma_i = gamma where direction i is damped, else 1

V holds the top k directions of the loss's Hessian, followed through training, and s is ``bulk_scale``
(Jastrzębski et al. 2019, section 5, with s = 1; gamma = 0 is Bulk-SGD and gamma = 1, s = 0 Dom-SGD of Song et al.
2025). The optimizer's own step is measured and rescaled, so its momentum, weight decay and schedules stay its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Optimizer

from nsgd.curvature.checks import above_zero
from nsgd.curvature.hessian import Closure, Losses, check_loss
from nsgd.curvature.vectors import checked_params, listed, refuse_meta
from nsgd.damping import state
from nsgd.damping.checks import check_followed, check_group, check_group_factors, checked_group_shape
from nsgd.damping.correction import Correction, at_rest
from nsgd.directions.directions import Directions
from nsgd.directions.refresh import refresh
from nsgd.options import FROM_TRAINING, PER_GROUP, DampingOptions


class Damped(Optimizer):
    """The half of a damped optimizer beside its base class: it holds ``Directions``, and its step is damped by them.

    Mixed in before the base optimizer's class, by :class:`nsgd.NSGD` and :func:`nsgd.damp`. All that it has of its own
    lies in one object, so that wrappers which copy an optimizer's attributes share it.
    """

    _directions: Directions

    # -- the damped step -------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """The base optimizer's step, damped. A closure is handed to the base optimizer, which calls it as it wants.

        Reads nothing of the device, but in the one step that settles :attr:`refresh_interval`, and waits for nothing
        that was queued since the last step. Costs two passes over the basis and a few over a vector as long as the
        parameters, which holds the step; once in some steps, where directions come from training gradients, the fold of
        :class:`nsgd.directions.differences.Differences`, whose end waits for the last step's numbers. A step at
        ``lr=0`` is the base optimizer's, and counts for nothing: torch's checkpoints take one to make the state.
        """
        for group in self._curvature_groups():
            check_group_factors(self, group)
        state.withdraw(self)
        if all(at_rest(group) for group in self.param_groups):
            loss = self._base_step(closure)
            self._directions.end_step()
            state.announce(self)
            return loss
        steps_as_sgd = self._base_code is SGD.step and type(self)._init_group is SGD._init_group  # type: ignore[attr-defined]
        with ExitStack() as guards:
            correction = Correction(self, guards, steps_as_sgd=steps_as_sgd)
            if closure is None:
                correction.prepare()
                loss = self._base_step(None)
            else:
                # The directions may be refreshed inside the closure, so the step begins when it has run.
                loss = self._base_step(_followed_by(closure, correction.prepare))
            correction.apply()
        self._directions.counts.steps += 1
        self._directions.end_step()
        self._directions.time_step()
        return loss

    @property
    def _base_code(self) -> Callable[..., Any]:
        """The function that the base optimizer steps by."""
        return super().step.__func__  # type: ignore[attr-defined,no-any-return]

    def _base_step(self, closure: Closure | None) -> Any:
        step = self._base_code
        if getattr(step, "hooked", False):  # torch wraps step to run its hooks; ours is wrapped already
            step = step.__wrapped__  # type: ignore[attr-defined]
        return step(self) if closure is None else step(self, closure)

    # -- directions from a second look at the loss -----------------------------------------------------------

    def backward(
        self,
        loss: Tensor,
        curvature: Tensor | Closure | Losses | None = None,
        scale: float = 1.0,
        *,
        batch_fraction: float = 1.0,
    ) -> None:
        """``loss.backward()``, after a refresh of the directions where one is due and has something to come from.

        Args:
            loss: The training loss. With solver "lanczos", "arpack" or "random" and no ``curvature``, the directions
                come from it; with "auto" and "differences" they then come from its gradient, in the step.
            curvature: Where the directions come from instead: a loss, a closure that computes one (called only
                when a refresh is due), or pairs of closure and sample count. A closure's buffers, modes and random
                state are restored.
            scale: What the loss that the curvature comes from was multiplied by.
            batch_fraction: Samples in ``curvature`` over samples in a training batch, for ``cost_gradients``.

        Raises:
            ValueError: If the loss is no scalar tensor with its graph, or as :meth:`refresh`.
        """
        if not isinstance(loss, Tensor):
            raise ValueError(f"expected the loss tensor, got a {type(loss).__name__}; a closure goes to curvature=")
        check_loss(loss)
        if curvature is not None:
            scale = above_zero("scale", scale)
            # A scaled loss may stand beside samples' that are not.
            batch_loss = loss.detach().mean() if scale == 1.0 else None
            self.refresh_if_due(curvature, scale, batch_fraction=batch_fraction, batch_loss=batch_loss)
        elif self._directions.options.solver not in FROM_TRAINING:
            self.refresh_if_due(loss, scale, batch_fraction=batch_fraction)
        torch.autograd.backward(loss)

    @property
    def refresh_due(self) -> bool:
        """Whether the next call of :meth:`refresh_if_due` refreshes; at most once between two steps."""
        return self._directions.refresh_due

    def refresh_if_due(
        self,
        loss: Tensor | Closure | Losses,
        scale: float = 1.0,
        *,
        batch_fraction: float = 1.0,
        batch_loss: Tensor | None = None,
    ) -> bool:
        """Refresh if it is due, or if there are no directions yet; call it before ``backward``.

        With ``refresh_every="auto"`` one is due every :attr:`refresh_interval` steps, once that is settled; before, as
        soon as all refreshes together cost no more than ``overhead`` gradients a step. Where a step left the basis with
        twice its usual length or more, a sharp direction may have escaped: then they may cost twice as much, and come
        twice as often.

        Takes and returns what :meth:`refresh` does.
        """
        if self._directions.options.solver != "differences" and not self.refresh_due:
            return False
        return self.refresh(loss, scale, batch_fraction=batch_fraction, batch_loss=batch_loss)

    def refresh(
        self,
        loss: Tensor | Closure | Losses,
        scale: float = 1.0,
        *,
        batch_fraction: float = 1.0,
        batch_loss: Tensor | None = None,
    ) -> bool:
        """Estimate the sharpest directions at the current parameters, and average them with the last ones.

        ``.grad``, buffers, modes and random state stay as found, and ``loss.backward()`` still works afterwards.
        Cost on the samples in the loss: one gradient from groups of them (solver "gradients") and their average, which
        costs a small dense network more than that (:attr:`cost_gradients`); with Lanczos
        2k + 2 products or fewer beside it, at two gradients each (three over several batches). With solver "random"
        the directions are drawn, nothing is averaged, and the loss is not looked at. With solver "auto" the directions
        come from what is given here from now on, and no longer from training gradients.

        In several processes all of them call it, each with what it has: samples are gathered, products averaged, and
        a NaN in one has all of them skip. What is given runs the network itself, not ``DistributedDataParallel``; a
        loss that is computed already may come from either.

        Args:
            loss: A loss with its graph, a closure that computes one, or pairs of closure and sample count
                (see :func:`nsgd.curvature.hessian.loss_hessian`); for gradients, one pair for each of two groups or
                more.
            scale: What the loss was multiplied by (loss scale, 1 / accumulation); taken out of the eigenvalues.
            batch_fraction: Samples in the loss over samples in a training batch, for ``cost_gradients``.
            batch_loss: Mean loss of the training batch, a scalar without ``scale``. Where the directions come from
                samples, and the mean of their losses is another, that is said once, with its usual causes. It is
                compared where it lies, at no wait, and changes nothing else.

        Returns:
            True if there are new directions; False if the loss, a gradient or a product was NaN or infinite: the
            last directions are kept, and the refresh counts as skipped. From samples on an accelerator, where the
            host does not wait to know, it is True, and ``skipped_refreshes`` tells.

        Raises:
            ValueError: If the solver is "differences"; the loss is no scalar, has no graph or reaches none of the
                parameters; gradients are wanted and there are no groups; ``batch_loss`` is no scalar; parameters are
                sharded; or processes give curvature of different kinds.
            RuntimeError: If another process has met an error.
        """
        self._directions.arrange(self._curvature_params())
        maximize = bool(self.param_groups[0].get("maximize", False))
        with self._directions.timed_refresh():
            return refresh(self._directions, loss, scale, batch_fraction, batch_loss, maximize=maximize)

    # -- diagnostics -----------------------------------------------------------------------------------------

    @property
    def eigenvalues(self) -> tuple[float, ...]:
        """Top eigenvalues that the last refresh found by products, a tuple, descending; empty where there were none."""
        return tuple(self._directions.eigenvalues)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the directions in their running average, a tuple of up to k, descending; one sync.

        From gradients they are variances: of the noise of a training batch's gradient ("differences"), or of single
        samples' gradients around their mean. They fall with the loss, and are no eigenvalues. By products they are
        eigenvalues, of random directions 1 each.
        """
        weights: list[float] = self._directions.weights.tolist()
        if not self._directions.eigenvalues:  # of the noise, where there may be less of it than k
            weights = [weight for weight in weights if weight > 0]
        return tuple(weights)

    def directions(self, params: Iterable[Tensor]) -> Tensor:
        """The directions along these parameters, (r, P), in the order of the weights; zero along parameters without.

        Orthonormal where the parameters are all those that have directions; r is 0 before the first. Of sharded
        parameters P counts what this process holds. Costs a copy of the basis, and one sync.
        """
        params = listed(params)
        refuse_meta(params)
        vectors = self._directions.along(params)
        return vectors[: len(self.weights)]

    @property
    def from_training_gradients(self) -> bool:
        """Whether the directions come from the gradients that training leaves, not from a second look at the loss."""
        return self._directions.differences is not None

    @property
    def overlap(self) -> float:
        """Mean squared cosine between the last two bases, in [0, 1]; NaN before the second; one sync."""
        return self._directions.overlap

    @property
    def alignment(self) -> float:
        """Share of the base optimizer's last step, in norm, inside the basis; NaN before the first; one sync."""
        return self._directions.alignment

    @property
    def refreshes(self) -> int:
        """Number of times that the directions have changed so far; one sync where the last refresh is under way."""
        return self._directions.known_counts.refreshes

    @property
    def skipped_refreshes(self) -> int:
        """Refreshes that met a NaN or an infinity, and kept the last directions; syncs as ``refreshes`` does."""
        return self._directions.known_counts.skipped_refreshes

    @property
    def hvps(self) -> int:
        """Hessian-vector products so far."""
        return self._directions.counts.hvps

    @property
    def cost_gradients(self) -> float:
        """Cost of the refreshes so far, a count of work in gradients of a training batch (forward and backward pass).

        From a share f of a batch's samples a refresh costs f (1 + a), with a the flops of averaging over those of the
        samples' gradients: 2P (4k^2 + 2km + m^2) for m groups and P parameters, over three forward passes on each
        sample. Those of a forward pass are counted at the first refresh by torch's formulas, 2P at least. By products
        it costs f times one for the gradient and two, or three over several batches, for each product.
        """
        return self._directions.counts.cost_gradients

    @property
    def refresh_interval(self) -> int | None:
        """Steps between two refreshes: ``refresh_every``, or how often ``overhead`` pays for one, once that is settled.

        For it the seconds of a refresh and of a step are measured, once, over three refreshes after the first. None
        while it is not settled, and where no refresh is needed.
        """
        directions = self._directions
        if directions.differences is not None:
            return None
        every = directions.options.refresh_every
        return directions.counts.interval or None if every == "auto" else every

    @property
    def options(self) -> DampingOptions:
        """The options of the rule and its directions; ``gamma`` and ``bulk_scale`` of a group are in the group."""
        return self._directions.options

    @property
    def steps(self) -> int:
        """Steps so far, without those at a learning rate of 0."""
        return self._directions.counts.steps

    def __repr__(self) -> str:
        """The base optimizer's groups, and below them what of the damping is not as by default."""
        options = self._directions.options
        usual = {"gamma": options.gamma, "bulk_scale": options.bulk_scale, "curvature": True}
        as_usual = {f"{self._key(name)}: {value}" for name, value in usual.items()}
        groups = [line for line in super().__repr__().removesuffix(")").splitlines() if line.strip() not in as_usual]
        values = [(field, getattr(options, field.name)) for field in fields(options)]
        chosen = [f"{field.name}={value!r}" for field, value in values if value != field.default]
        return "\n".join([*groups, "Damping", f"    {', '.join(chosen) or 'every option at its default'}", ")"])

    # -- groups, state, copies -------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        """The name of an option in a group: its own, unless the base optimizer has one of that name."""
        return state.group_key(self, name)

    def _curvature_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group[self._key("curvature")]]

    def _curvature_params(self) -> list[tuple[int, Tensor]]:
        """The parameters that have directions, with the numbers of their groups; each once, none without a shape."""
        key = self._key("curvature")
        groups = enumerate(self.param_groups)
        members = [(i, p) for i, group in groups if group[key] for p in group["params"]]
        found: dict[int, tuple[int, Tensor]] = {}
        for i, p in members:
            if p.requires_grad and not is_lazy(p):
                found.setdefault(id(p), (i, p))
        return list(found.values())

    def _waits_for_shapes(self) -> bool:
        """Whether parameters of lazy modules have no shape yet; then the first step arranges the directions."""
        return any(is_lazy(p) for group in self.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; its parameters join the directions at the next refresh, or step."""
        if "_directions" in self.__dict__:  # not while the base is constructed
            param_group = checked_group_shape(param_group)
            check_group(self, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        if "_directions" in self.__dict__:
            if self._waits_for_shapes():
                return
            try:
                params = self._curvature_params()
                checked_params([p for _, p in params])
                self._directions.arrange(params)
            except ValueError:  # no parameters that it can follow: as it was
                self.param_groups.pop()
                raise

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the basis beside each parameter's state ("directions") unless ``save_basis=False``."""
        return state.packed(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; a checkpoint of the plain base optimizer loads too, and directions then begin anew.

        All options become those of the checkpoint, as the learning rate does: k, gamma and solver too.
        """
        loaded = state.unpacked(self, state_dict)
        if loaded.options is None and self._directions.rank:
            warnings.warn("the checkpoint has no directions: those of this optimizer begin anew", stacklevel=2)
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(loaded.plain)
        state.take_over(self, loaded, before)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_directions": self._directions}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
        if "_directions" in self.__dict__:  # not in the middle of torch's load_state_dict of another
            for group in self.param_groups:
                for name in PER_GROUP:
                    group.setdefault(self._key(name), self.defaults[self._key(name)])
            if "_directions" in attributes:  # a copy, or a pickle; a checkpoint is taken over later
                self._directions.arrange(self._curvature_params())
                self._directions.end_step()

    def _begin_damping(self, options: DampingOptions) -> None:
        """Called once, when the base optimizer is complete."""
        self._directions = Directions(options)
        values = {"gamma": options.gamma, "bulk_scale": options.bulk_scale, "curvature": True}
        names = {name: f"nsgd_{name}" if name in self.defaults else name for name in values}
        self.defaults = {**self.defaults, **{names[name]: value for name, value in values.items()}}
        for group in self.param_groups:
            for name, value in values.items():
                group.setdefault(names[name], value)
            check_group(self, group)
        if self._waits_for_shapes():
            return
        params = self._curvature_params()
        check_followed(self, [p for _, p in params])
        self._directions.arrange(params)


def _followed_by(closure: Closure, action: Callable[[], None]) -> Closure:
    def both() -> Tensor:
        loss = closure()
        with torch.no_grad():
            action()
        return loss

    return both
