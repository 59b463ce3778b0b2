"""Public functions with arguments that are good, to put anything else in the place of one; and what is public."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import nsgd
from nsgd import NSGD, backward_in_chunks, damp, drawn_mse_loss, sample_losses, top_eigenpairs
from nsgd.curvature.copies import fresh_batch
from nsgd.curvature.hessian import loss_hessian
from nsgd.curvature.low_rank import low_rank
from nsgd.curvature.vectors import checked_params
from nsgd.damping.step import Damped
from nsgd.directions.samples import gradient_moment
from nsgd.trajectory import averaging, line, quadratic, sharpness, valley
from nsgd.trajectory.escape import diffusion, landscape, potentials, theory, walkers


class Place:
    """A small model with its batch, and what is not to change."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.params = list(self.model.parameters())
        self.x, self.y = torch.randn(8, 4), torch.arange(8) % 2
        self.vector = torch.ones(sum(p.numel() for p in self.params))
        self.optimizers = []

    def loss(self):
        return cross_entropy(self.model(self.x), self.y)

    def of(self, x, y):
        return cross_entropy(self.model(x), y)

    def refreshed(self, make=NSGD, **options):
        """An optimizer with directions, so that there is something that could change."""
        optimizer = make(self.params, lr=0.1, k=2, **options)
        optimizer.refresh(self.loss() if options.get("solver") != "gradients" else self.samples())
        self.optimizers.append(optimizer)
        return optimizer

    def damped(self):
        """The same by ``damp``, on an optimizer with state of its own."""
        return self.refreshed(lambda params, k, **options: damp(SGD(params, momentum=0.9, **options), k=k))

    def samples(self):
        return sample_losses(self.of, self.x, self.y)

    def product(self):
        """The Hessian of the loss as a matrix, for products that keep no graph open."""
        return lambda vector: 2 * vector

    def state(self):
        optimizers = [(len(o.param_groups), o.directions(self.params), o.steps, o.refreshes) for o in self.optimizers]
        directions = [d for _, d, *_ in optimizers]
        counts = [(groups, *rest) for groups, _, *rest in optimizers]
        tensors = [*(p.detach().clone() for p in self.params), self.x.clone(), self.vector.clone(), *directions]
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        modes = [m.training for m in self.model.modules()]
        return {"tensors": tensors, "grads": grads, "modes": modes, "counts": counts, "random": torch.get_rng_state()}


WEIGHTS = torch.tensor([0.2, 0.3, 0.5])
OPTIONS = {
    "k": 2,
    "gamma": 0.1,
    "refresh_every": 5,
    "overhead": 0.1,
    "decay": None,
    "step_decay": 0.9,
    "which": "LA",
    "bulk_scale": 1.0,
    "solver": "auto",
    "warmup_steps": 0,
    "save_basis": True,
    "basis_dtype": None,
    "seed": 0,
}
SGD_OPTIONS = {"lr": 0.01, "noise": 10.0, "batch_size": 10.0, "momentum": 0.5}
ESCAPE = {"walkers": 4, "steps": 3, "seed": 0}


def a_landscape():
    return landscape.built_in_landscape("double-well", barrier=1.0, skew=0.3, walls=40.0)


def tilted(points):
    """A potential of a user's, (n, d) to (n,)."""
    return (points**2 - 1).square().sum(-1) + 0.1 * points.sum(-1)


def well(x):
    return (x * x - 1) ** 2


def opened(loss, params, **options):
    with loss_hessian(loss, params, **options) as hessian:
        return hessian.hvp(hessian.gradient)


def held(params, direction, step):
    with line.moved(params, direction, step):
        pass


def method(name):
    def call(optimizer, *given, **named):
        return getattr(optimizer, name)(*given, **named)

    return call


def of_optimizer(make):
    """Cases of the public methods of an optimizer that is made of the place."""
    return {
        "refresh": lambda p: {"optimizer": make(p), "loss": p.loss(), "scale": 1.0, "batch_fraction": 1.0},
        "refresh_if_due": lambda p: {"optimizer": make(p), "loss": p.loss(), "scale": 1.0, "batch_fraction": 1.0},
        "backward": lambda p: {
            "optimizer": make(p),
            "loss": p.loss(),
            "curvature": p.loss,
            "scale": 1.0,
            "batch_fraction": 1.0,
        },
        "directions": lambda p: {"optimizer": make(p), "params": p.params},
        "add_param_group": lambda p: {
            "optimizer": make(p),
            "param_group": {"params": [nn.Parameter(torch.ones(2))], "lr": 0.1, "gamma": 0.5, "curvature": True},
        },
        "load_state_dict": lambda p: {"optimizer": make(p), "state_dict": make(p).state_dict()},
    }


# Function, and arguments that are good, made of the place.
CALLS: dict[str, tuple[Callable, Callable]] = {
    "NSGD": (NSGD, lambda p: {"params": p.params, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **OPTIONS}),
    "damp": (damp, lambda p: {"optimizer": SGD(p.params), **OPTIONS}),
    "top_eigenpairs": (
        top_eigenpairs,
        lambda p: {
            "loss_or_hvp": p.loss(),
            "params": p.params,
            "k": 2,
            "which": "LA",
            "solver": "lanczos",
            "start": None,
            "max_hvps": 20,
            "tol": 1e-3,
            "seed": 0,
            "scale": 1.0,
            "repeated": True,
        },
    ),
    "backward_in_chunks": (
        lambda loss, x, y, **given: backward_in_chunks(loss, x, y, **given),
        lambda p: {"loss": p.of, "x": p.x, "y": p.y, "chunks": 2, "backward": torch.Tensor.backward},
    ),
    "sample_losses": (
        lambda loss, x, y, **given: sample_losses(loss, x, y, **given),
        lambda p: {"loss": p.of, "x": p.x, "y": p.y, "group_size": 2, "module": p.model, "chunk_size": 2},
    ),
    "drawn_mse_loss": (drawn_mse_loss, lambda p: {"prediction": torch.ones(3, 2)}),
    "loss_hessian": (opened, lambda p: {"loss": p.loss, "params": p.params, "scale": 1.0}),
    "low_rank": (low_rank, lambda p: {"weights": WEIGHTS, "vectors": torch.eye(3), "k": 2, "which": "LA"}),
    "checked_params": (checked_params, lambda p: {"params": p.params}),
    "fresh_batch": (fresh_batch, lambda p: {"batch": p.x}),
    "gradient_moment": (gradient_moment, lambda p: {"losses": p.samples(), "params": p.params, "scale": 1.0}),
    "ema_weights": (averaging.ema_weights, lambda p: {"steps": 5, "decay": 0.9}),
    "swa_weights": (averaging.swa_weights, lambda p: {"steps": 5, "window": 2}),
    "two_point_weights": (averaging.two_point_weights, lambda p: {"steps": 5, "spacing": 2}),
    "tail_sums": (averaging.tail_sums, lambda p: {"weights": WEIGHTS}),
    "equivalent_schedule": (averaging.equivalent_schedule, lambda p: {"weights": WEIGHTS, "lr": 0.1, "curvature": 1.0}),
    "average_moments": (averaging.average_moments, lambda p: {"weights": WEIGHTS, "lr": 0.1, "curvature": 1.0}),
    "stationary_variance": (averaging.stationary_variance, lambda p: {"lr": 0.1, "curvature": 1.0, "noise": 1.0}),
    "variance_ratio": (averaging.variance_ratio, lambda p: {"weights": WEIGHTS, "lr": 0.1, "curvature": 1.0}),
    "two_point_loss": (averaging.two_point_loss, lambda p: {"losses": [1.0, 2.0], "curvature": 1.0}),
    "squared_distance": (
        averaging.squared_distance,
        lambda p: {"spacing": 2, "lr": 0.1, "curvatures": WEIGHTS, "noise": 1.0},
    ),
    "moved": (held, lambda p: {"params": p.params, "direction": p.vector, "step": 0.1}),
    "losses_along": (
        line.losses_along,
        lambda p: {"loss": p.loss, "params": p.params, "direction": p.vector, "steps": [0.0, 0.1]},
    ),
    "vertex": (line.vertex, lambda p: {"positions": WEIGHTS, "losses": WEIGHTS}),
    "held_out_rate": (quadratic.held_out_rate, lambda p: {"curvature": 1.0, "variance": 1.0, "noise": 1.0}),
    "r_squared": (quadratic.r_squared, lambda p: {"measured": WEIGHTS, "predicted": WEIGHTS}),
    "held_out_loss": (
        quadratic.held_out_loss,
        lambda p: {"rates": WEIGHTS, "curvature": 1.0, "variance": 1.0, "noise": 1.0},
    ),
    "best_multiple": (
        sharpness.best_multiple,
        lambda p: {"lr": 0.1, "eigenvalue": 1.0, "slope": 1.0, "second_moment": 1.0},
    ),
    "stability_limit": (sharpness.stability_limit, lambda p: {"lr": 0.1, "momentum": 0.9, "gamma": 0.1, "sine": 0.1}),
    "random_direction": (sharpness.random_direction, lambda p: {"params": p.params, "seed": 0}),
    "root_sum_square": (sharpness.root_sum_square, lambda p: {"eigenvalues": WEIGHTS}),
    "alignment": (sharpness.alignment, lambda p: {"gradient": WEIGHTS, "directions": torch.eye(3)[:2]}),
    "own_batch": (sharpness.own_batch, lambda p: {"loss": p.loss(), "params": p.params}),
    "batch_sharpness": (sharpness.batch_sharpness, lambda p: {"losses": [p.loss()], "params": p.params}),
    "damped_sharpness": (
        sharpness.damped_sharpness,
        lambda p: {
            "hvp": p.product(),
            "params": p.params,
            "directions": torch.eye(len(p.vector))[:2],
            "gamma": 0.1,
            "max_hvps": 9,
            "tol": 1e-3,
            "seed": 0,
        },
    ),
    "cross_section": (
        sharpness.cross_section,
        lambda p: {"loss": p.loss, "params": p.params, "direction": p.vector, "scale": 0.1, "offsets": [0.0, 1.0]},
    ),
    "step_losses": (
        sharpness.step_losses,
        lambda p: {
            "loss": p.loss,
            "params": p.params,
            "gradient": p.vector,
            "lr": 0.1,
            "direction": p.vector,
            "multiples": [1.0],
        },
    ),
    "segment": (valley.segment, lambda p: {"alphas": torch.linspace(0, 1, 4), "losses": torch.ones(4)}),
    "predicted_height": (valley.predicted_height, lambda p: {"slope": 1.0, "curvature": 1.0}),
    "predicted_position": (valley.predicted_position, lambda p: {"slope": 1.0, "curvature": 1.0}),
    "floor_barriers": (valley.floor_barriers, lambda p: {"floors": WEIGHTS}),
    "cosine": (valley.cosine, lambda p: {"one": WEIGHTS, "other": WEIGHTS}),
    "temperature": (diffusion.temperature, lambda p: dict(SGD_OPTIONS)),
    "inertia": (diffusion.inertia, lambda p: {"lr": 0.1, "momentum": 0.5}),
    "kramers_factor": (
        diffusion.kramers_factor,
        lambda p: {"inertia": 0.5, "saddle": torch.tensor([-1.0, 1, 1])},
    ),
    "energy_factor": (
        diffusion.energy_factor,
        lambda p: {"potential": well, "saddle": 0.0, "far": -2.0, "inertia": 1.0, "temperature": 0.5, "points": 51},
    ),
    "escape_time": (
        diffusion.escape_time,
        lambda p: {"barrier": 1.0, "temperature": 0.1, "minimum": WEIGHTS, "saddle": torch.tensor([-1.0, 1, 1])},
    ),
    "passage_time": (
        diffusion.passage_time,
        lambda p: {"potential": well, "start": -1.0, "end": 1.0, "far": -3.0, "temperature": 0.5, "points": 51},
    ),
    "gibbs_mass": (
        diffusion.gibbs_mass,
        lambda p: {"potential": well, "edges": np.array([-2.0, 0.0, 2.0]), "temperature": 0.5, "points": 51},
    ),
    "gibbs_mean": (
        diffusion.gibbs_mean,
        lambda p: {
            "potential": well,
            "quantity": well,
            "edges": np.array([-2.0, 0.0, 2.0]),
            "temperature": 0.5,
            "points": 51,
        },
    ),
    "laplace_mass": (
        diffusion.laplace_mass,
        lambda p: {"depths": WEIGHTS[:2], "curvatures": torch.ones(2, 3), "temperature": 0.5},
    ),
    "excess_loss": (diffusion.excess_loss, lambda p: {"curvatures": WEIGHTS, **SGD_OPTIONS}),
    "DoubleWell": (potentials.DoubleWell, lambda p: {"barrier": 1.0, "skew": 0.3}),
    "Channel": (potentials.Channel, lambda p: {"well": potentials.DoubleWell(), "walls": 40.0}),
    "built_in_landscape": (
        landscape.built_in_landscape,
        lambda p: {"name": "channel", "barrier": 1.0, "skew": 0.3, "walls": 40.0},
    ),
    "with_noise": (
        landscape.with_noise,
        lambda p: {"landscape": a_landscape(), "follows": "loss", "floor": 0.3},
    ),
    "landscape_between": (
        landscape.landscape_between,
        lambda p: {
            "potential": tilted,
            "start": torch.tensor([-1.0]),
            "goal": torch.tensor([1.0]),
            "saddle": torch.tensor([0.0]),
            "name": "mine",
        },
    ),
    "predicted_steps": (
        theory.predicted_steps,
        lambda p: {"landscape": a_landscape(), "sgd": SGD_OPTIONS, "out": 1.0, "across": 1.0},
    ),
    "predicted_stay": (theory.predicted_stay, lambda p: {"landscape": a_landscape(), "sgd": SGD_OPTIONS}),
    "simulate": (
        walkers.simulate,
        lambda p: {
            "gradient": lambda x: x,
            "start": torch.ones(4, 1),
            "goal": lambda x: x[:, 0] < 0.5,
            **SGD_OPTIONS,
            "steps": 3,
            "seed": 0,
            "scale": torch.ones(1),
            "progress": lambda step, reached: None,
        },
    ),
    "escape": (
        walkers.escape,
        lambda p: {
            "landscape": a_landscape(),
            "sgd": SGD_OPTIONS,
            **ESCAPE,
            "update": lambda step, said: None,
            "scale": torch.eye(1),
        },
    ),
    "stay": (
        walkers.stay,
        lambda p: {"landscape": a_landscape(), "sgd": SGD_OPTIONS, **ESCAPE, "update": lambda step, said: None},
    ),
    **{f"NSGD.{name}": (method(name), make) for name, make in of_optimizer(Place.refreshed).items()},
    **{f"damp.{name}": (method(name), make) for name, make in of_optimizer(Place.damped).items()},
    **{
        f"NSGD of samples, {name}": (
            method(name),
            lambda p, make=make: {**make(p), "optimizer": p.refreshed(solver="gradients"), "loss": p.samples()},
        )
        for name, make in of_optimizer(Place.refreshed).items()
        if name.startswith("refresh")
    },
}

# Functions that others call with what they have checked, some of them in every step.
INNER = {
    "nsgd.curvature.arpack": ["arpack"],
    "nsgd.curvature.copies": ["copied_attributes"],
    "nsgd.curvature.eigen": ["product_of"],
    "nsgd.curvature.guard": ["full_precision", "untouched", "RandomState"],
    "nsgd.curvature.hessian": [
        *("check_finite", "check_loss", "checked_pairs", "gradient_of", "NoProductError", "say_unreached"),
    ],
    "nsgd.curvature.lanczos": ["lanczos", "rounding"],
    "nsgd.curvature.low_rank": ["leading_indices", "squared_lengths", "top_of_sum"],
    "nsgd.curvature.nystrom": ["nystrom"],
    "nsgd.curvature.small": ["inverse_root", "orthogonal_iteration", "small_eigh"],
    "nsgd.trajectory.escape.diffusion": ["effective_potential"],
    "nsgd.curvature.vectors": [
        "flatten",
        "is_finite",
        "length",
        "listed",
        "refuse_meta",
        "matmul",
        "random_unit",
        "split",
        "vector_dtype",
    ],
}
# Take nothing, or a closure of the user's, as under any torch optimizer.
PLAIN_METHODS = ["state_dict", "step"]


def _is_public(name: str, found: object, module: str) -> bool:
    own = not name.startswith("_") and getattr(found, "__module__", None) == module
    # Results are classes that functions make, and check nothing.
    is_result = (
        inspect.isclass(found) and hasattr(found, "__dataclass_fields__") and not hasattr(found, "__post_init__")
    )
    return own and not is_result and (inspect.isfunction(found) or inspect.isclass(found))


def public() -> Iterator[str]:
    """Names of everything public: in ``nsgd`` itself, its optimizers' methods, its mathematics."""
    yield from (name for name in nsgd.__all__ if not hasattr(getattr(nsgd, name), "__dataclass_fields__"))
    for name, found in vars(Damped).items():
        if inspect.isfunction(found) and not name.startswith("_") and name not in PLAIN_METHODS:
            yield from (f"NSGD.{name}", f"damp.{name}")
    for room in (nsgd.curvature, nsgd.trajectory):
        for info in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            if info.name == "nsgd.curvature.checks":  # which checks
                continue
            module = importlib.import_module(info.name)
            inner = INNER.get(info.name, [])
            yield from (n for n, found in vars(module).items() if _is_public(n, found, info.name) and n not in inner)
