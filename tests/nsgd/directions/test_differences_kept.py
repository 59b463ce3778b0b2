"""Directions from training gradients through checkpoints, copies, and changes of the parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from given import MAKERS, Given, draws, plain_loop
from loops import through_a_file
from torch import nn

from nsgd import NSGD

# -- resumption -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("stop", [0, 1, 2, 5, 26, 33])
@pytest.mark.parametrize("basis_dtype", [None, torch.bfloat16])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(training, flat, maker, stop, basis_dtype):
    options = {"k": 3, "gamma": 0.1, "basis_dtype": basis_dtype}
    whole, part, resumed = training(), training(), training()
    optimizer = MAKERS[maker](whole.model.parameters(), **options)
    plain_loop(whole, optimizer, 0, 60)
    halted = MAKERS[maker](part.model.parameters(), **options)
    plain_loop(part, halted, 0, stop)
    resumed.model.load_state_dict(through_a_file(part.model.state_dict()))
    again = MAKERS[maker](resumed.model.parameters(), k=2, gamma=0.7, step_decay=0.3)
    again.load_state_dict(through_a_file(halted.state_dict()))
    plain_loop(resumed, again, stop, 60)
    assert torch.equal(flat(resumed.model.parameters()), flat(whole.model.parameters()))
    assert again.weights == optimizer.weights
    assert again.overlap == optimizer.overlap
    assert (again.refreshes, again.steps) == (optimizer.refreshes, 60)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_go_on_bitwise_and_on_their_own(training, flat, maker, copied):
    run = training()
    optimizer = MAKERS[maker](run.model.parameters(), k=3)
    plain_loop(run, optimizer, 0, 33)
    twin, other = copied((run.model, optimizer))
    before = flat(run.model.parameters())
    plain_loop(type(run)(twin, run.batches), other, 33, 60)
    assert torch.equal(flat(run.model.parameters()), before)
    plain_loop(run, optimizer, 33, 60)
    assert torch.equal(flat(run.model.parameters()), flat(twin.parameters()))


def test_without_the_basis_a_checkpoint_is_as_small_as_sgds_and_directions_begin_anew(training):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3, save_basis=False)
    plain_loop(run, optimizer, 0, 20)
    state = through_a_file(optimizer.state_dict())
    assert all(entry.keys() == {"momentum_buffer"} for entry in state["state"].values())
    again = NSGD(twin.model.parameters(), lr=0.1, momentum=0.9, k=3)
    again.load_state_dict(state)
    assert again.weights == ()
    plain_loop(twin, again, 20, 30)
    assert len(again.weights) == 3


# -- what happens to parameters on the way --------------------------------------------------------------------


def test_a_checkpoint_while_everything_is_frozen_loses_nothing(training, flat):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 13)
    other = copy.deepcopy(optimizer)
    run.model.requires_grad_(False)
    state = optimizer.state_dict()
    optimizer.step()  # whatever is left of gradients moves as under SGD, which is nothing new to directions
    run.model.requires_grad_(True)
    assert torch.equal(state["state"][0]["directions"], other.state_dict()["state"][0]["directions"])
    vectors = optimizer.directions(run.model.parameters())
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3), rtol=0, atol=1e-5)


def test_a_group_that_is_frozen_whole_leaves_the_rest_to_plain_sgd(training):
    run = training()
    groups = [{"params": run.model[0].parameters()}, {"params": run.model[2].parameters(), "curvature": False}]
    optimizer = NSGD(groups, lr=0.1, k=3)
    run.model[0].requires_grad_(False)
    plain_loop(run, optimizer, 0, 3)
    assert optimizer.weights == ()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("way", ["copy", "load"])
def test_what_is_made_under_inference_mode_can_be_stepped(training, way):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 13)
    model, other = copy.deepcopy((run.model, optimizer))
    with torch.inference_mode():
        state = other.state_dict()
        if way == "load":
            other.load_state_dict(state)
    plain_loop(type(run)(model, run.batches), other, 13, 30)
    assert len(other.weights) == 3


@pytest.mark.parametrize("options", [{"dtype": torch.float32, "basis_dtype": torch.float16}, {"dtype": torch.float32}])
def test_a_row_that_overflows_costs_its_fold_and_not_the_basis(options):
    dtype = options.pop("dtype")
    given = Given(dtype=dtype, step_decay=0.9, **options)
    for i, (one, other) in enumerate(draws(60)):
        scale = {30: 1e38, 31: -3e38}.get(i, 1.0)
        given.step((scale * one).to(dtype), other.to(dtype))
        with torch.no_grad():
            given.params[0].zero_()
    vectors = given.optimizer.directions(given.params)
    assert vectors.isfinite().all()
    tolerance = 0.02 if options else 1e-4  # float16 has three digits
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)), rtol=0, atol=tolerance)


def test_a_layout_that_changes_leaves_the_directions_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 3))
    optimizer = NSGD(model.parameters(), lr=0.1, k=3)
    for i in range(12):
        optimizer.zero_grad()
        x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(i))
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
    before = optimizer.directions(model.parameters())
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(optimizer.directions(model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_a_weight_decay_that_takes_all_is_measured(decay):
    """lr * weight_decay = 1 leaves no trace of the parameter as it was."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(20, generator=generator, dtype=torch.float64))
    optimizer = NSGD([weight], lr=1.0, weight_decay=decay, k=2, gamma=0.0)
    for _ in range(12):
        weight.grad = torch.randn(20, generator=generator, dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
    vectors = optimizer.directions([weight])
    step = -(weight.grad + decay * before)
    torch.testing.assert_close(weight.detach(), before + step - vectors.T @ (vectors @ step), rtol=1e-9, atol=1e-12)


def test_a_refresh_that_fails_keeps_the_directions_of_training(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 12)
    weights = optimizer.weights
    with pytest.warns(UserWarning, match="the last directions are kept"):
        assert not optimizer.refresh(run.loss(0) * float("nan"))
    assert optimizer.weights == weights
    assert optimizer.from_training_gradients


@pytest.mark.parametrize("maker", MAKERS)
def test_a_parameter_that_has_changed_its_shape_is_refused_and_nothing_is_changed(training, flat, maker):
    run = training()
    optimizer = MAKERS[maker](run.model.parameters(), k=3)
    plain_loop(run, optimizer, 0, 13)
    weight = run.model[2].weight
    weight.data = torch.zeros(6, 8)
    weight.grad = torch.ones(6, 8)
    before = flat(run.model.parameters())
    with pytest.raises(ValueError, match=r"expected a parameter of shape \(4, 8\), as it was .* got \(6, 8\); make"):
        optimizer.step()
    assert torch.equal(flat(run.model.parameters()), before)
    assert optimizer.steps == 13
