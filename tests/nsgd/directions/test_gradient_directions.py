"""Directions from the gradients of groups of samples, through NSGD and damp, against dense averages in NumPy."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from loops import assert_bitwise, everything, through_a_file
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from nsgd import NSGD, damp, sample_losses


def samples(run, i, group_size=1, factor=1.0, module=None):
    def loss(x, y):
        return factor * F.cross_entropy(run.model(x), y)

    return sample_losses(loss, *run.batches[i % 4], group_size=group_size, module=module)


def steps(run, optimizer, indices, group_size=1):
    for i in indices:
        optimizer.zero_grad()
        optimizer.backward(run.loss(i), curvature=samples(run, i, group_size), batch_fraction=0.25)
        optimizer.step()


def covariance(run, i, group_size=1):
    """The covariance of the groups' gradients, by one backward pass a group and by NumPy: (P, P)."""
    x, y = run.batches[i % 4]
    params, gradients = list(run.model.parameters()), []
    for part, labels in zip(x.split(group_size), y.split(group_size), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(run.model(part), labels), params)
        gradients.append(torch.cat([g.reshape(-1) for g in grads]).numpy())
    weights = [len(part) for part in x.split(group_size)]
    return np.cov(np.stack(gradients).T, aweights=weights, ddof=1)


def top(matrix, k):
    values, columns = np.linalg.eigh(matrix)
    return values[::-1][:k], columns[:, ::-1][:, :k].T


def agrees(optimizer, basis_of, values, vectors):
    # Float64 on both sides, with gaps that are no smaller than a hundredth of the largest eigenvalue.
    np.testing.assert_allclose(optimizer.weights, values, rtol=1e-9, atol=1e-12)
    rows = basis_of(optimizer).numpy()
    np.testing.assert_allclose(rows.T @ rows, vectors.T @ vectors, rtol=0, atol=1e-8)


# -- the average ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "gradients"])
@pytest.mark.parametrize("group_size", [1, 3])  # 16 samples: the last group is of one
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.7, None])
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_the_basis_is_that_of_the_dense_average_whatever_the_age_of_the_last(
    training, basis_of, solver, group_size, decay, at_once
):
    """A plain mean at first; the fourth estimate is a spike, of which twice the mean trace is taken."""
    run, k = training(torch.float64), 3
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=k, solver=solver, decay=decay, refresh_every=1000)
    average, trace, clips = 0.0, 0.0, []
    for step in range(18):
        if step in (0, 1, 3, 7, 17):
            share = min(0.95 if decay is None else decay, 1 - 1 / (len(clips) + 1))
            factor = 30.0 if step == 7 else 1.0
            new = factor**2 * covariance(run, step, group_size)
            clips.append(bool(share > 0 and new.trace() > 2 * trace))
            new *= 2 * trace / new.trace() if clips[-1] else 1.0
            trace = (trace + new.trace()) / 2 if share > 0 else new.trace()
            values, vectors = top(share * average + (1 - share) * new, k)
            average = (vectors.T * values) @ vectors
            assert optimizer.refresh(samples(run, step, group_size, factor, run.model if at_once else None))
            agrees(optimizer, basis_of, values, vectors)
            assert list(optimizer.weights) == sorted(optimizer.weights, reverse=True)
        optimizer.zero_grad()
        run.loss(step).backward()
        optimizer.step()
    assert clips == [False, False, False, decay != 0.0, False]
    assert optimizer.refreshes == 5
    assert optimizer.eigenvalues == ()
    assert optimizer.hvps == 0


@pytest.mark.parametrize(("largest", "taken"), [(20.0, 20.0), (60.0, 24.0)], ids=["whole", "clipped"])
def test_products_are_averaged_as_well(training, basis_of, largest, taken):
    """Two losses whose Hessians are known: the pairs are the best that two steps of the average leave."""
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = NSGD([weight], lr=0.1, k=2, decay=0.5)
    optimizer.refresh(0.5 * (torch.tensor([8.0, 4.0, 0.0, 0.0]) * weight.square()).sum())  # a trace of 12
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.refresh(0.5 * (torch.tensor([0.0, 0.0, largest, -2.0]) * weight.square()).sum())
    assert optimizer.weights == pytest.approx((taken / 2, 4.0))  # halves of this and of 8
    assert optimizer.eigenvalues == pytest.approx((largest, 0.0), abs=1e-9)  # of the last
    expected = torch.eye(4, dtype=torch.float64)[[2, 0]]
    torch.testing.assert_close(basis_of(optimizer).abs(), expected, rtol=0, atol=1e-7)


def test_the_scale_is_taken_out(training):
    run, twin = training(torch.float64), training(torch.float64)
    optimizer, plain = NSGD(run.model.parameters(), k=3), NSGD(twin.model.parameters(), k=3)
    optimizer.refresh([(lambda c=c: 256.0 * c(), n) for c, n in samples(run, 0)], scale=256.0)
    plain.refresh(samples(twin, 0))
    assert optimizer.weights == pytest.approx(plain.weights, rel=1e-12)


@pytest.mark.parametrize("groups", [2, 3])
def test_fewer_groups_than_directions_give_as_many_and_more_come_later(training, flat, basis_of, groups):
    run = training(torch.float64)
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=5, gamma=0.0)
    for refresh in (1, 2):
        optimizer.refresh(samples(run, refresh)[:groups])
        rank = min(5, refresh * (groups - 1))  # one for the mean
        vectors, beyond = basis_of(optimizer).tensor_split([rank])
        assert len(optimizer.weights) == rank
        assert not beyond.any()
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
        optimizer.zero_grad()
        run.loss(0).backward()
        before = flat(run.model.parameters())
        optimizer.step()
        moved = flat(run.model.parameters()) - before
        assert float((vectors @ moved).abs().max()) < 1e-14  # nothing is left inside
        assert float(moved.norm()) > 1e-3


@pytest.mark.parametrize("decay", [0.0, None])
@pytest.mark.filterwarnings("ignore:the gradients of the samples are all zero")
def test_groups_without_gradient_give_no_directions_and_training_goes_on(training, flat, decay):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, gamma=0.0, decay=decay)
    plain = SGD(twin.model.parameters(), lr=0.1)
    for i in range(3):
        optimizer.zero_grad(), plain.zero_grad()
        optimizer.refresh([(lambda c=c: 0.0 * c(), n) for c, n in samples(run, i)])
        run.loss(i).backward(), twin.loss(i).backward()
        optimizer.step(), plain.step()
    assert_bitwise(everything(run), everything(twin))


def test_a_second_refresh_at_one_step_is_not_ignored(basis_of):
    weight = nn.Parameter(torch.zeros(4))
    optimizer = NSGD([weight], lr=0.1, k=2)
    optimizer.refresh([(lambda: weight[0], 1), (lambda: 3 * weight[0], 1)])
    optimizer.refresh([(lambda: 0 * weight[1], 1), (lambda: 60 * weight[1], 1)])
    # Half the variances: 2 is that of the first, 1,800 that of the second, of which twice 2 are taken.
    assert optimizer.weights == pytest.approx((2.0, 1.0))
    torch.testing.assert_close(basis_of(optimizer).abs(), torch.eye(4)[[1, 0]])


@pytest.mark.parametrize("noisy", [False, True], ids=["samples agree", "samples differ"])
@pytest.mark.filterwarnings("ignore:the gradients of the samples are all zero or alike")
def test_a_descent_direction_in_which_all_samples_agree_is_not_damped(noisy):
    """Along t[0] the loss falls at a slope of 1 and has no curvature: 100 steps of 0.005 make 0.5, as by SGD."""
    t = nn.Parameter(torch.zeros(6))
    optimizer = NSGD([t], lr=0.005, k=2, gamma=0.1, solver="gradients", refresh_every=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        noise = 0.1 * torch.randn(8, generator=generator) if noisy else torch.zeros(8)

        def loss(noise):
            flat = 0.05 * (t[2:] - 0.001).square().sum()
            return -t[0] + 10 * (t[1] - 0.01 + noise).square().mean() + flat

        optimizer.zero_grad()
        optimizer.backward(loss(noise), curvature=sample_losses(loss, noise))
        optimizer.step()
    assert t[0].item() == pytest.approx(0.5, rel=1e-4)
    if noisy:  # and the one in which they differ is
        first = optimizer.directions([t])[0].abs()
        torch.testing.assert_close(first, torch.eye(6)[1], rtol=0, atol=1e-3)


# -- parameters that come and go ------------------------------------------------------------------------------


def test_parameters_frozen_later_leave_the_average_of_the_others(training, basis_of):
    run, k = training(torch.float64), 3
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=k, decay=0.5)
    optimizer.refresh(samples(run, 0))
    values, vectors = top(covariance(run, 0), k)
    steps(run, optimizer, range(1))  # the refresh of this step is taken
    free = slice(6 * 8 + 8, None)
    old, new = ((vectors.T * values) @ vectors)[free, free], covariance(run, 1)[free, free]
    run.model[0].requires_grad_(False)
    assert optimizer.refresh(samples(run, 1))
    values, vectors = top(0.5 * old + 0.5 * new, k)
    np.testing.assert_allclose(optimizer.weights, values, rtol=1e-9)
    rows = basis_of(optimizer).numpy()
    assert not rows[:, : free.start].any()
    np.testing.assert_allclose(rows[:, free].T @ rows[:, free], vectors.T @ vectors, rtol=0, atol=1e-8)


def test_parameters_added_later_begin_the_average_anew(training, basis_of):
    run, k = training(torch.float64), 3
    optimizer = NSGD(run.model[2].parameters(), lr=0.1, k=k, decay=0.9)
    steps(run, optimizer, range(2))
    optimizer.add_param_group({"params": list(run.model[0].parameters())})
    expected = top(covariance(run, 2), k)
    assert optimizer.refresh(samples(run, 2))
    np.testing.assert_allclose(optimizer.weights, expected[0], rtol=1e-9)
    steps(run, optimizer, range(2, 4))


# -- cost and trouble -----------------------------------------------------------------------------------------

# Of a refresh at k = 3 from 16 groups of one, in gradients of their samples: averaging counts 4k^2 + 2km + m^2 + 2m
# products a parameter, and the gradients three a sample, for the network has few weights and counts as dense.
REFRESH = 1 + (4 * 9 + 2 * 3 * 16 + 16**2 + 2 * 16) / (3 * 16)


def test_a_refresh_costs_the_gradient_of_its_samples_and_no_product(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, refresh_every=2)
    steps(run, optimizer, range(6))
    assert (optimizer.refreshes, optimizer.hvps) == (3, 0)
    assert optimizer.cost_gradients == pytest.approx(3 * 0.25 * REFRESH)


def test_the_samples_are_looked_at_only_when_a_refresh_is_due(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, refresh_every=3)
    calls = []
    for i in range(6):
        optimizer.zero_grad()
        losses = [(lambda c=c, i=i: calls.append(i) or c(), n) for c, n in samples(run, i, 8)]
        optimizer.backward(run.loss(i), curvature=losses)
        optimizer.step()
    assert calls == [0, 0, 3, 3]  # twice: two groups


def of_unknown(losses, count):
    """The same groups, so many of them with a loss of NaN."""
    return [((lambda c=c, i=i: c() * (torch.nan if i < count else 1.0)), n) for i, (c, n) in enumerate(losses)]


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda losses: of_unknown(losses, 16),
        lambda losses: of_unknown(losses, 15),  # a single one is left
        lambda losses: [*losses, (lambda: losses[0][0]() * torch.inf, 1)],
        lambda losses: [*of_unknown(losses, 3), (lambda: losses[3][0]() * torch.inf, 1)],
    ],
    ids=["all NaN", "all but one NaN", "infinite", "infinite and NaN"],
)
def test_groups_that_are_not_finite_skip_the_refresh_and_keep_the_directions(training, basis_of, spoilt):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, refresh_every=1)
    steps(run, optimizer, range(1))
    kept, weights = basis_of(optimizer), optimizer.weights
    with pytest.warns(UserWarning, match="refresh skipped at step 1, the last directions are kept: the loss is NaN"):
        assert not optimizer.refresh(spoilt(samples(run, 1)), batch_fraction=0.25)
    assert torch.equal(basis_of(optimizer), kept)
    assert optimizer.weights == weights
    assert (optimizer.refreshes, optimizer.skipped_refreshes) == (1, 1)
    m = len(spoilt(samples(run, 1)))
    second = 1 + (4 * 9 + 2 * 3 * m + m**2 + 2 * m) / (3 * m)
    assert optimizer.cost_gradients == pytest.approx(0.25 * (REFRESH + second))
    steps(run, optimizer, range(1, 3))
    assert optimizer.refreshes == 2  # not twice at one step


@pytest.mark.parametrize("unknown", [1, 14])
@pytest.mark.filterwarnings("ignore:the loss of one sample or more is NaN")
def test_groups_of_unknown_loss_are_left_out(training, basis_of, unknown):
    run = training(torch.float64)
    optimizer, k = NSGD(run.model.parameters(), lr=0.1, k=3, refresh_every=1), min(3, 15 - unknown)
    assert optimizer.refresh(of_unknown(samples(run, 0), unknown), batch_fraction=0.25)
    run.batches[0] = tuple(column[unknown:] for column in run.batches[0])
    agrees(optimizer, basis_of, *top(covariance(run, 0), k))
    assert optimizer.skipped_refreshes == 0
    assert optimizer.cost_gradients == pytest.approx(0.25 * REFRESH)


def test_a_basis_that_is_not_finite_does_not_outlive_the_next_refresh(training, basis_of):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    steps(run, optimizer, range(1))
    optimizer._directions.blocks[0].basis[1, 2] = float("nan")  # which no checkpoint brings: it is refused there
    assert optimizer.refresh(samples(run, 1))
    assert torch.isfinite(basis_of(optimizer)).all()


def test_gradients_of_one_loss_are_refused(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), k=3, solver="gradients")
    for loss in (run.loss(0), lambda: run.loss(0)):
        with pytest.raises(ValueError, match=r"expected a list of losses of groups of samples.*nsgd\.sample_losses"):
            optimizer.refresh(loss)
    with pytest.raises(ValueError, match="two or more groups of samples, got 1"):
        optimizer.refresh([(lambda: run.loss(0), 16)])


@pytest.mark.parametrize(
    ("solver", "by_products"), [("auto", False), ("gradients", False), ("lanczos", True), ("arpack", True)]
)
def test_the_solver_says_what_groups_are_for(training, solver, by_products):
    run = training()
    optimizer = NSGD(run.model.parameters(), k=3, solver=solver)
    optimizer.refresh(samples(run, 0, 8))
    assert bool(optimizer.hvps) == by_products == bool(optimizer.eigenvalues)
    assert len(optimizer.weights) == (3 if by_products else 1)  # two groups differ in one


@pytest.mark.parametrize("several", [False, True])
def test_auto_takes_products_of_one_loss(training, several):
    run = training()
    optimizer = NSGD(run.model.parameters(), k=3)
    optimizer.refresh([(lambda: run.loss(0), 16)] if several else run.loss(0))
    assert optimizer.hvps > 0
    assert optimizer.weights == optimizer.eigenvalues


def test_groups_may_come_from_a_generator(training):
    run, twin = training(), training()
    optimizer, other = NSGD(run.model.parameters(), k=3), NSGD(twin.model.parameters(), k=3)
    optimizer.refresh(pair for pair in samples(run, 0))
    other.refresh(samples(twin, 0))
    assert optimizer.weights == other.weights


# -- equivalences ---------------------------------------------------------------------------------------------


def test_gamma_one_is_bitwise_sgd_with_dropout_and_batchnorm(training):
    run, twin = training(noisy=True), training(noisy=True)
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3, gamma=1.0, refresh_every=2)
    plain = SGD(twin.model.parameters(), lr=0.1, momentum=0.9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        steps(run, optimizer, range(6), group_size=4)
        torch.manual_seed(0)
        for i in range(6):
            plain.zero_grad()
            twin.loss(i).backward()
            plain.step()
    assert optimizer.refreshes == 3
    assert_bitwise(everything(run), everything(twin))


MAKERS = {
    "nsgd": lambda params, **options: NSGD(params, lr=0.1, momentum=0.9, **options),
    "adamw": lambda params, **options: damp(AdamW(params, lr=0.01), **options),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("stop", [1, 4, 6])
@pytest.mark.parametrize("refresh_every", [3, "auto"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(training, flat, maker, stop, refresh_every):
    whole, part, resumed = training(), training(), training()
    options = {"k": 3, "gamma": 0.1, "refresh_every": refresh_every, "overhead": 1.0}
    optimizer, halted = (MAKERS[maker](run.model.parameters(), **options) for run in (whole, part))
    steps(whole, optimizer, range(10))
    steps(part, halted, range(stop))
    resumed.model.load_state_dict(through_a_file(part.model.state_dict()))
    again = MAKERS[maker](resumed.model.parameters(), k=2, decay=0.1, overhead=0.3)
    again.load_state_dict(through_a_file(halted.state_dict()))
    assert again.weights == halted.weights
    steps(resumed, again, range(stop, 10))
    assert torch.equal(flat(resumed.model.parameters()), flat(whole.model.parameters()))
    assert again.weights == optimizer.weights
    assert again.cost_gradients == optimizer.cost_gradients
    assert again.refreshes == optimizer.refreshes > 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("maker", MAKERS)
def test_copies_go_on_bitwise_and_on_their_own(training, flat, copied, maker):
    run = training()
    optimizer = MAKERS[maker](run.model.parameters(), k=3, refresh_every=3)
    steps(run, optimizer, range(2))
    model, twin_optimizer = copied((run.model, optimizer))
    twin = type(run)(model, run.batches)
    assert twin_optimizer.weights == optimizer.weights
    halfway = flat(run.model.parameters())
    steps(twin, twin_optimizer, range(2, 8))
    assert torch.equal(flat(run.model.parameters()), halfway)
    steps(run, optimizer, range(2, 8))
    assert torch.equal(flat(run.model.parameters()), flat(model.parameters()))
    assert twin_optimizer.weights == optimizer.weights
