"""Gradients of groups of samples all at once, against a backward pass for each."""

from __future__ import annotations

import pytest
import torch
from sample_cases import NETS, NORMALISED, SAMPLES, TOLERANCE, WITH_STATISTICS, Case, assert_equal
from torch import nn
from traces import assert_untouched, random_states, same_random_states, snapshot

from nsgd import NSGD, sample_losses
from nsgd.directions.samples import gradient_moment


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("net", "group_size"),
    [
        *((name, size) for name in NETS for size in (1, 4, 5)),
        *((name, size) for name in WITH_STATISTICS for size in (4, 5)),
    ],
)  # 10 samples in groups of 4: a last one of 2
def test_gradients_at_once_are_those_one_by_one(net, group_size, dtype):
    found, expected = Case(net, dtype).both(group_size)
    assert found[1].shape == (-(-SAMPLES // group_size), sum(p.numel() for p in Case(net).params))
    assert_equal(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("net", ["mlp", "conv", "transformer", "weighted", "layer_norm", *NORMALISED, *WITH_STATISTICS])
@pytest.mark.parametrize("group_size", [2, 4])  # a last group of 2, which is on its own
def test_gradients_under_autocast_are_those_one_by_one_to_half_precision(net, group_size):
    case = Case(net, torch.float32)
    before, states = snapshot(case.model), random_states()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = case.both(group_size)
    assert_untouched(case.model, before)  # in train mode, with statistics as they were
    same_random_states(states)
    full, _ = case.both(group_size)
    assert found[1].dtype == torch.float32
    assert not torch.equal(found[1], full[1])  # autocast did reach the forward pass
    assert_equal(found, expected, 0.05)  # eps 2^-8, a few times over


def test_half_precision_parameters_give_float32_gradients():
    found, expected = Case("mlp", torch.bfloat16).both(2)
    assert found[1].dtype == torch.float32
    assert_equal(found, expected, 0.05)


@pytest.mark.parametrize("group_size", [1, 4])
def test_the_scale_is_taken_out(group_size):
    (found, _), (expected, _) = (
        Case(factor=256.0).both(group_size, scale=256.0),
        Case().both(group_size),
    )
    assert_equal(found, expected, 1e-12)


def test_parameters_may_be_some_of_the_module_s_in_any_order():
    case = Case()
    case.params = [case.params[i] for i in (3, 0)]
    found, expected = case.both()
    assert found[1].shape == (SAMPLES, 3 + 30)
    assert_equal(found, expected, 1e-12)


def test_gradients_of_some_parameters_carry_no_graph(basis_of):
    case = Case()
    case.params = case.params[:2]
    optimizer = NSGD(case.params, lr=0.1, k=2)
    for _ in range(2):
        optimizer.refresh(case.losses())
    assert not gradient_moment(case.losses(), case.params)[1].requires_grad
    assert not basis_of(optimizer).requires_grad


@pytest.mark.parametrize("which", [slice(None), slice(2)], ids=["all", "some"])
def test_parameters_that_the_loss_reaches_past_the_module_are_not_lost(which):
    """As in a penalty on a list of parameters that was made once."""
    case = Case()
    of_labels, kept = case.loss, case.params[which]
    case.loss = lambda x, y: of_labels(x, y) + 0.5 * sum(p.square().sum() for p in kept)
    expected = gradient_moment(case.losses(False), case.params)
    try:
        found = gradient_moment(case.losses(), case.params)
    except ValueError:  # to say so is as good
        return
    assert_equal(found, expected, 1e-12)


def test_a_module_inside_another_need_only_hold_the_parameters():
    case = Case()
    outer = nn.ModuleDict({"net": case.model, "other": nn.Linear(2, 2)})
    found = gradient_moment(sample_losses(case.loss, case.x, case.y, module=outer), case.params)
    assert_equal(found, gradient_moment(case.losses(False), case.params), 1e-12)


def test_the_pairs_are_those_of_the_one_by_one_way():
    """For products, which take the same list."""
    case = Case()
    pairs, expected = case.losses(True, 4), case.losses(False, 4)
    assert [n for _, n in pairs] == [4, 4, 2]
    assert [closure().item() for closure, _ in pairs] == [closure().item() for closure, _ in expected]


def test_a_slice_of_the_losses_has_so_many_groups():
    case = Case()
    found, expected = (gradient_moment(case.losses(way)[2:6], case.params) for way in (True, False))
    assert found[1].shape[0] == 4
    assert_equal(found, expected, 0.0)


# -- through the optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "conv", "transformer", "tied", "frozen"])
def test_an_optimizer_takes_the_same_directions_either_way(net, basis_of):
    bases, weights, costs = [], [], []
    for at_once in (True, False):
        case = Case(net)
        optimizer = NSGD(case.params, lr=0.05, momentum=0.9, k=2, refresh_every=2)
        for _ in range(6):
            optimizer.zero_grad()
            optimizer.backward(case.loss(case.x, case.y), curvature=case.losses(at_once))
            optimizer.step()
        assert (optimizer.refreshes, optimizer.hvps) == (3, 0)
        rows = basis_of(optimizer)
        bases.append(rows.T @ rows)
        weights.append(optimizer.weights)
        costs.append(optimizer.cost_gradients)
    assert costs[0] == costs[1] > 3
    assert weights[0] == pytest.approx(weights[1], rel=1e-8)
    torch.testing.assert_close(*bases, rtol=0, atol=1e-8)
