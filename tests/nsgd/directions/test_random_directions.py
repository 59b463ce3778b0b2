"""solver="random": orthonormal directions that the loss has no part in, and the rule along them."""

from __future__ import annotations

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from loops import assert_bitwise, everything, through_a_file
from torch import nn
from torch.optim import SGD, AdamW

from nsgd import NSGD, damp, sample_losses
from nsgd.directions.random_basis import random_basis

MAKERS = {
    "nsgd": lambda params, **options: NSGD(params, lr=0.1, momentum=0.9, solver="random", **options),
    "adamw": lambda params, **options: damp(AdamW(params, lr=0.01), solver="random", **options),
}


def steps(run, optimizer, first, last, batch_fraction=1.0):
    for i in range(first, last):
        optimizer.zero_grad()
        optimizer.backward(value := run.loss(i), curvature=value, batch_fraction=batch_fraction)
        optimizer.step()


# -- the directions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("k", [1, 7, 92])  # up to as many as there are parameters
def test_the_basis_is_orthonormal_over_all_parameters_jointly(training, basis_of, dtype, rounding, k):
    run = training(dtype)
    optimizer = NSGD(run.model.parameters(), k=k, solver="random")
    optimizer.refresh(run.loss(0))
    basis = basis_of(optimizer)
    assert basis.dtype == dtype
    assert basis.shape == (k, 92)
    # A few roundings in float32; 92 random vectors in 92 dimensions are so ill-conditioned that float64 loses 1e-13.
    inner = basis.double() @ basis.double().T
    torch.testing.assert_close(inner, torch.eye(k, dtype=torch.float64), rtol=0, atol=rounding)


def test_directions_are_uniform_on_the_sphere():
    """Of 2,000 draws in five dimensions: no mean, and a covariance of a fifth of the identity."""
    weights = [torch.zeros(2), torch.zeros(3)]
    drawn = torch.stack([random_basis(weights, k=2, seed=seed) for seed in range(2000)])  # (2000, 2, 5)
    for rows in (drawn[:, 0], drawn[:, 1]):
        error = 1 / math.sqrt(2000)  # at most: entries are below 1
        assert rows.mean(0).abs().max() < 4 * error * math.sqrt(0.2)
        assert (rows.T @ rows / 2000 - 0.2 * torch.eye(5)).abs().max() < 4 * error
    assert len({tuple(rows.flatten().tolist()) for rows in drawn}) == 2000


def test_frozen_parameters_and_groups_without_curvature_have_no_part(training, basis_of):
    run = training()
    first, _, last = run.model
    first.bias.requires_grad_(False)
    groups = [{"params": first.parameters()}, {"params": last.parameters(), "curvature": False}]
    optimizer = NSGD(groups, lr=0.1, k=5, solver="random")
    steps(run, optimizer, 0, 2)
    basis = basis_of(optimizer)
    assert basis[:, 48:].abs().sum() == 0  # all but the 6 x 8 weights of the first layer
    torch.testing.assert_close(basis @ basis.T, torch.eye(5), rtol=0, atol=1e-6)


# -- the rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("gamma", "bulk_scale"), [(0.1, 1.0), (0.0, 1.0), (5.0, 1.0), (1.0, 0.0)])
def test_the_step_is_the_base_optimizers_by_the_formula(training, flat, basis_of, maker, gamma, bulk_scale):
    """Step by step in NumPy, from the step of a plain optimizer that is given the same gradients."""
    run, twin = training(torch.float64), training(torch.float64)
    optimizer = MAKERS[maker](run.model.parameters(), k=4, gamma=gamma, bulk_scale=bulk_scale, refresh_every=2)
    params = list(twin.model.parameters())
    plain = SGD(params, lr=0.1, momentum=0.9) if maker == "nsgd" else AdamW(params, lr=0.01)
    for i in range(5):
        before = flat(run.model.parameters()).numpy()
        steps(run, optimizer, i, i + 1)
        for p, source in zip(params, run.model.parameters(), strict=True):
            p.grad = source.grad.clone()
        plain.step()
        step, v = flat(params).numpy() - before, basis_of(optimizer).numpy()
        expected = before + bulk_scale * step + v.T @ ((gamma - bulk_scale) * (v @ step))
        np.testing.assert_allclose(flat(run.model.parameters()).numpy(), expected, rtol=0, atol=1e-13)  # rounding
        with torch.no_grad():
            for p, source in zip(params, run.model.parameters(), strict=True):
                p.copy_(source)
    assert optimizer.refreshes == 3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gamma_1_is_bitwise_sgd(training, momentum):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=momentum, k=5, gamma=1.0, solver="random")
    plain = SGD(twin.model.parameters(), lr=0.1, momentum=momentum)
    steps(run, optimizer, 0, 12, batch_fraction=0.1)
    for i in range(12):
        plain.zero_grad()
        twin.loss(i).backward()
        plain.step()
    assert_bitwise(everything(run), everything(twin))
    assert optimizer.refreshes > 1


# -- what it costs, and when it comes -------------------------------------------------------------------------


def test_a_draw_computes_nothing_and_says_that_it_knows_nothing(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), k=5, solver="random", refresh_every=1)

    def called():
        raise AssertionError("the closure was called")

    for curvature in (None, called, [(called, 8), (called, 8)]):
        optimizer.zero_grad()
        optimizer.backward(run.loss(0), curvature=curvature)
        optimizer.step()
    assert optimizer.refreshes == 3
    assert (optimizer.cost_gradients, optimizer.hvps) == (0.0, 0)
    assert optimizer.eigenvalues == ()
    assert optimizer.weights == (1.0,) * 5
    assert 0 < optimizer.alignment < 1


def test_every_refresh_draws_afresh(training, basis_of):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=5, solver="random")
    drawn = []
    for _ in range(3):  # with no step in between, as well
        optimizer.refresh(run.loss(0))
        drawn.append(basis_of(optimizer).clone())
    # Independent spaces of 5 in 92 dimensions: mean squared cosine 5 / 92 = 0.054.
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (drawn[one] @ drawn[other].T).square().sum() / 5 < 0.2
    assert optimizer.overlap == pytest.approx(float((drawn[1] @ drawn[2].T).square().sum() / 5), rel=1e-5)


@pytest.mark.parametrize("batch_fraction", [0.25, 1.0])
@pytest.mark.usefixtures("averaging_is_free")
def test_auto_draws_as_often_as_gradients_of_the_same_samples_refresh(training, batch_fraction):
    def refreshed_at(solver):
        run, found = training(), []
        optimizer = NSGD(run.model.parameters(), lr=1e-30, k=3, solver=solver)  # steps of no length never alarm
        for i in range(40):
            x, y = run.batches[i % 4]
            loss = sample_losses(lambda x, y: nn.functional.cross_entropy(run.model(x), y), x, y)
            if optimizer.refresh_if_due(loss, batch_fraction=batch_fraction):
                found.append(i)
            optimizer.zero_grad()
            run.loss(i).backward()
            optimizer.step()
        return found

    drawn = refreshed_at("random")
    assert drawn == refreshed_at("gradients")
    assert len(drawn) == pytest.approx(40 * 0.1 / batch_fraction, abs=1)


# -- the seed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_one_seed_gives_one_path_and_another_another(training, flat, maker):
    def end(seed):
        run = training()
        steps(run, MAKERS[maker](run.model.parameters(), k=5, refresh_every=2, seed=seed), 0, 7)
        return flat(run.model.parameters())

    assert torch.equal(end(3), end(3))
    assert not torch.equal(end(3), end(4))


def test_the_global_random_state_is_left_alone_and_not_used(training, basis_of):
    found = []
    for seed in (0, 1):
        run = training()
        optimizer = NSGD(run.model.parameters(), k=5, solver="random")
        torch.manual_seed(seed)
        before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        optimizer.refresh(run.loss(0))
        after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        found.append(basis_of(optimizer))
    assert torch.equal(*found)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("stop", [1, 4, 6])  # within a cycle, and just before a refresh
@pytest.mark.parametrize("refresh_every", [3, "auto"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(training, maker, stop, refresh_every):
    whole, part, resumed = training(), training(), training()
    options = {"k": 3, "refresh_every": refresh_every, "seed": 11}
    optimizer, halted = (MAKERS[maker](run.model.parameters(), **options) for run in (whole, part))
    steps(whole, optimizer, 0, 12, batch_fraction=0.3)
    steps(part, halted, 0, stop, batch_fraction=0.3)
    resumed.model.load_state_dict(part.model.state_dict())
    again = MAKERS[maker](resumed.model.parameters(), k=3)  # the seed comes with the checkpoint
    again.load_state_dict(through_a_file(halted.state_dict()))
    steps(resumed, again, stop, 12, batch_fraction=0.3)
    assert_bitwise(everything(resumed), everything(whole))
    assert again.refreshes == optimizer.refreshes > 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_the_same_way(training, copied):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, refresh_every=2, solver="random", seed=5)
    steps(run, optimizer, 0, 3)
    model, again = copied((run.model, optimizer))
    twin = type(run)(model, run.batches)
    steps(run, optimizer, 3, 8)
    steps(twin, again, 3, 8)
    assert_bitwise(everything(run), everything(twin))


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.5}, "expected no decay with solver='random', whose directions are not averaged, got 0.5"),
        ({"decay": 0.0}, "expected no decay with solver='random'"),
        ({"seed": -1}, "expected seed to be a whole number of at least 0, got -1"),
        ({"seed": 1.5}, "expected seed to be a whole number of at least 0, got 1.5"),
    ],
)
@pytest.mark.parametrize("way", ["nsgd", "damp"])
def test_what_cannot_be_is_refused_in_one_sentence(training, way, options, message):
    params = list(training().model.parameters())
    with pytest.raises(ValueError, match=message) as error:
        NSGD(params, solver="random", **options) if way == "nsgd" else damp(SGD(params), solver="random", **options)
    assert "\n" not in str(error.value)


def test_one_seed_serves_the_whole_optimizer(training):
    first, _, last = training().model
    with pytest.raises(ValueError, match="seed is one value for the whole optimizer, 0, got 3"):
        NSGD([{"params": first.parameters()}, {"params": last.parameters(), "seed": 3}], solver="random")
