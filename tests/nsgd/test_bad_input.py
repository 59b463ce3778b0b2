"""Anything at all in the place of one argument: an error is one sentence of ours, and nothing is changed."""

from __future__ import annotations

import traceback
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from nsgd import NSGD, backward_in_chunks, damp, drawn_mse_loss, top_eigenpairs
from nsgd.trajectory import averaging, line, quadratic, sharpness, valley

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 50),
    st.sampled_from([-(2**70), 10**30, 1e300, -1e300, 1e-300]),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.lists(st.floats(-2, 2), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([torch.float32, torch.ones, object(), np.float32(0.5), np.int64(2), np.array([1.0, 2.0])]),
    st.sampled_from(
        [
            torch.empty(0),
            torch.ones(()),
            torch.ones(3),
            torch.ones(2, 2, 2),
            torch.tensor(float("nan")),
            torch.ones(3, dtype=torch.complex64),
            torch.ones(2, 2, dtype=torch.int64),
        ]
    ),
)


class Place:
    """A small model with its batch, and what is not to change."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.params = list(self.model.parameters())
        self.x, self.y = torch.randn(8, 4), torch.arange(8) % 2
        self.vector = torch.ones(sum(p.numel() for p in self.params))

    def loss(self):
        return cross_entropy(self.model(self.x), self.y)

    def of(self, x, y):
        return cross_entropy(self.model(x), y)

    def state(self):
        return [p.detach().clone() for p in self.params], torch.get_rng_state(), self.model.training


def methods(place):
    """Optimizers with directions, so that there is something that could change."""
    optimizer = NSGD(place.params, lr=0.1, k=2)
    optimizer.refresh(place.loss())
    return optimizer


WEIGHTS = torch.tensor([0.2, 0.3, 0.5])

# Function, and arguments that are good, made of the place.
CALLS = {
    "NSGD": (NSGD, lambda p: {"params": p.params, "lr": 0.1, **OPTIONS}),
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
        },
    ),
    "backward_in_chunks": (
        lambda loss, x, y, chunks: backward_in_chunks(loss, x, y, chunks=chunks),
        lambda p: {"loss": p.of, "x": p.x, "y": p.y, "chunks": 2},
    ),
    "drawn_mse_loss": (drawn_mse_loss, lambda p: {"prediction": torch.ones(3, 2)}),
    "refresh": (
        lambda optimizer, **given: optimizer.refresh(**given),
        lambda p: {"optimizer": methods(p), "loss": p.loss(), "scale": 1.0, "batch_fraction": 1.0},
    ),
    "load_state_dict": (
        lambda optimizer, state: optimizer.load_state_dict(state),
        lambda p: {"optimizer": methods(p), "state": methods(p).state_dict()},
    ),
    "ema_weights": (averaging.ema_weights, lambda p: {"steps": 5, "decay": 0.9}),
    "swa_weights": (averaging.swa_weights, lambda p: {"steps": 5, "window": 2}),
    "two_point_weights": (averaging.two_point_weights, lambda p: {"steps": 5, "spacing": 2}),
    "tail_sums": (averaging.tail_sums, lambda p: {"weights": WEIGHTS}),
    "equivalent_schedule": (averaging.equivalent_schedule, lambda p: {"weights": WEIGHTS, "lr": 0.1, "curvature": 1.0}),
    "stationary_variance": (averaging.stationary_variance, lambda p: {"lr": 0.1, "curvature": 1.0, "noise": 1.0}),
    "variance_ratio": (averaging.variance_ratio, lambda p: {"weights": WEIGHTS, "lr": 0.1, "curvature": 1.0}),
    "two_point_loss": (averaging.two_point_loss, lambda p: {"losses": [1.0, 2.0], "curvature": 1.0}),
    "losses_along": (
        line.losses_along,
        lambda p: {"loss": p.loss, "params": p.params, "direction": p.vector, "steps": [0.0, 0.1]},
    ),
    "held_out_rate": (quadratic.held_out_rate, lambda p: {"curvature": 1.0, "variance": 1.0, "noise": 1.0}),
    "best_multiple": (
        sharpness.best_multiple,
        lambda p: {"lr": 0.1, "eigenvalue": 1.0, "slope": 1.0, "second_moment": 1.0},
    ),
    "stability_limit": (sharpness.stability_limit, lambda p: {"lr": 0.1, "momentum": 0.9, "gamma": 0.1, "sine": 0.1}),
    "random_direction": (sharpness.random_direction, lambda p: {"params": p.params, "seed": 0}),
    "predicted_height": (valley.predicted_height, lambda p: {"slope": 1.0, "curvature": 1.0}),
    "segment": (valley.segment, lambda p: {"alphas": torch.linspace(0, 1, 4), "losses": torch.ones(4)}),
    "floor_barriers": (valley.floor_barriers, lambda p: {"floors": WEIGHTS}),
    "cosine": (valley.cosine, lambda p: {"one": WEIGHTS, "other": WEIGHTS}),
    "vertex": (line.vertex, lambda p: {"positions": WEIGHTS, "losses": WEIGHTS}),
    "squared_distance": (
        averaging.squared_distance,
        lambda p: {"spacing": 2, "lr": 0.1, "curvatures": WEIGHTS, "noise": 1.0},
    ),
    "r_squared": (quadratic.r_squared, lambda p: {"measured": WEIGHTS, "predicted": WEIGHTS}),
    "held_out_loss": (
        quadratic.held_out_loss,
        lambda p: {"rates": WEIGHTS, "curvature": 1.0, "variance": 1.0, "noise": 1.0},
    ),
    "root_sum_square": (sharpness.root_sum_square, lambda p: {"eigenvalues": WEIGHTS}),
    "alignment": (sharpness.alignment, lambda p: {"gradient": WEIGHTS, "directions": torch.eye(3)[:2]}),
    "own_batch": (sharpness.own_batch, lambda p: {"loss": p.loss(), "params": p.params}),
    "batch_sharpness": (sharpness.batch_sharpness, lambda p: {"losses": [p.loss()], "params": p.params}),
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
    "predicted_position": (valley.predicted_position, lambda p: {"slope": 1.0, "curvature": 1.0}),
}
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


def tried(name, data):
    place = Place()
    function, make = CALLS[name]
    arguments = make(place)
    changed = data.draw(st.sampled_from([key for key in arguments if key != "optimizer" or name == "damp"]))
    arguments[changed] = data.draw(ANYTHING)
    before = place.state()
    error = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)
    except (ValueError, TypeError, FloatingPointError) as met:
        error = met
    if error is not None:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        ours = "/nsgd/" in frames[-1] and "/tests/" not in frames[-1]
        torchs_own = "torch/optim" in frames[-1] or changed in ("lr", "params")  # as under any torch optimizer
        assert ours or torchs_own, (changed, arguments[changed], error, frames[-1])
        assert "\n" not in str(error)
        assert len(str(error)) > 15
    after = place.state()
    assert all(map(torch.equal, before[0], after[0]))
    assert torch.equal(before[1], after[1]) or name == "drawn_mse_loss"
    assert before[2] == after[2]
    assert name == "backward_in_chunks" or all(p.grad is None for p in place.params)


QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", CALLS)
@QUICK
@given(data=st.data())
def test_anything_in_the_place_of_an_argument(name, data):
    tried(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@LONG
@given(data=st.data())
def test_anything_in_the_place_of_an_argument_for_long(name, data):
    tried(name, data)
