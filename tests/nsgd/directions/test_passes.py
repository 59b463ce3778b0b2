"""Rows of single backward passes: what they are, and when the difference of two steps is taken in their place."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings

import pytest
import torch
from calls import Calls
from given import MAKERS, Given, averaged, draws
from loops import through_a_file
from torch import nn
from torch.nn.functional import cross_entropy

from nsgd import NSGD, backward_in_chunks, sample_losses
from nsgd.directions import differences, passes
from nsgd.directions.passes import MOST


@pytest.fixture
def unclipped(monkeypatch):
    """Rows of any length count in full."""
    monkeypatch.setattr(differences, "_MOST", 1e9)


@pytest.fixture
def alike(monkeypatch):
    """Passes are taken for samples of one thing from the second that are kept on."""
    monkeypatch.setattr(passes, "_UNLIKE", 2.0)


def run_passes(given, gradients, *, before_step=None, set_to_none=True):
    """A step of several backward passes with these gradients."""
    given.optimizer.zero_grad(set_to_none=set_to_none)
    for gradient in gradients:
        sum((g * p).sum() for g, p in zip(gradient, given.params, strict=True) if g is not None).backward()
    if before_step is not None:
        before_step()
    given.optimizer.step()


def passes_of(steps, count, seed=0):
    """Gradients for so many passes of so many steps."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    rows = torch.randn(steps, count, 5, generator=generator, dtype=torch.float64) @ basis
    return [[row.split((12, 20)) for row in step] for step in rows]


def covariance(step, last=None):
    """Of the sum of these gradients: the textbook's estimate from them, averaged with that from the last sum."""
    rows = torch.stack([torch.cat(gradient) for gradient in step])
    own = len(rows) * torch.cov(rows.T)
    if last is None:
        return own
    difference = rows.sum(0) - last
    share = 2 / len(rows) ** 2
    return (1 - share) * own + share * 0.5 * torch.outer(difference, difference)


def covariances(steps):
    """Of each step from the second on; there the first deviations have none to be compared with."""
    sums = [whole(step) for step in steps]
    later = [covariance(step, last) for step, last in zip(steps[2:], sums[1:-1], strict=True)]
    return [0.5 * torch.outer(sums[1] - sums[0], sums[1] - sums[0]), *later]


def state_of(given):
    return given.optimizer._directions.differences


# -- what the rows are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, MOST])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_directions_are_those_of_the_decayed_mean_of_the_passes_covariance(unclipped, alike, count, set_to_none):
    given, steps = Given(step_decay=0.9, k=20), passes_of(12, count)
    for step in steps:
        run_passes(given, step, set_to_none=set_to_none)
    each = covariances(steps)
    shares = [0.9**age for age in reversed(range(len(each)))]
    expected = sum(share * one for share, one in zip(shares, each, strict=True)) / sum(shares)
    torch.testing.assert_close(given.moment(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [MOST + 1, 2 * MOST, 21])
def test_many_passes_are_put_together_and_estimate_the_same(unclipped, alike, count):
    """The mean over many draws is the covariance of the sum, as it is where each pass is a row of its own."""
    steps = passes_of(400, count)
    given = Given(step_decay=0.999, k=20)
    for step in steps:
        run_passes(given, step)
    expected = sum(map(covariance, steps)) / len(steps)
    assert torch.linalg.matrix_norm(given.moment() - expected) < 0.12 * torch.linalg.matrix_norm(expected)
    assert given.moment().trace() == pytest.approx(float(expected.trace()), rel=0.05)


def test_passes_and_differences_estimate_one_thing(unclipped, alike):
    """Gradients that are noise alone: one pass a step, or eight, weigh the directions alike."""
    steps = passes_of(400, 8)
    one, eight = Given(step_decay=0.999, k=20), Given(step_decay=0.999, k=20)
    for step in steps:
        run_passes(eight, step)
        run_passes(one, [[sum(parts) for parts in zip(*step, strict=True)]])
    assert one.moment().trace() == pytest.approx(float(eight.moment().trace()), rel=0.15)


def test_they_overlap_the_outliers_better_than_differences_of_as_many_steps():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([50.0, 30.0, 20.0, *[1.0] * 37], dtype=torch.float64)
    hessian, root = (axes * values) @ axes.T, (axes * values.sqrt()) @ axes.T
    noise = torch.randn(30, 8, 40, generator=generator, dtype=torch.float64) @ root
    overlaps = {}
    for count in (1, 8):
        weight = nn.Parameter(torch.ones(40, dtype=torch.float64))
        optimizer = NSGD([weight], lr=0.01, k=3)
        for draw in noise:
            optimizer.zero_grad()
            for part in draw.reshape(count, 8 // count, 40).mean(1):
                ((0.5 * weight @ hessian @ weight + part @ weight) / count).backward()
            optimizer.step()
        overlaps[count] = float((optimizer.directions([weight]) @ axes[:, :3]).square().sum() / 3)
    assert overlaps[8] > 0.97 > 0.95 > overlaps[1]


@pytest.mark.parametrize("how", ["clipped", "scaled loss, unscaled gradients"])
def test_rows_are_on_the_scale_of_the_gradient_that_the_step_finds(unclipped, alike, how):
    steps, factor = passes_of(9, 4), 0.01 if how == "clipped" else 2.0**-16
    plain, other = Given(step_decay=0.9, k=20), Given(step_decay=0.9, k=20)

    def rescale():
        for p in other.params:
            p.grad.mul_(factor)

    for step in steps:
        run_passes(plain, step)
        if how == "clipped":
            run_passes(other, step, before_step=rescale)
        else:
            run_passes(other, [[g / factor for g in gradient] for gradient in step], before_step=rescale)
    expected = plain.moment() * (factor**2 if how == "clipped" else 1)
    torch.testing.assert_close(other.moment() / expected.trace(), expected / expected.trace(), rtol=0, atol=1e-9)


def test_the_number_of_passes_may_change_from_step_to_step(unclipped, alike):
    given, steps = Given(step_decay=0.9, k=20), passes_of(20, 6)
    counts = [6, 6, 2, 5, 1, 6, 6, 1, 1, 3, *[1] * 10]
    for step, count in zip(steps, counts, strict=True):
        run_passes(given, step[:count])
    each, last = [], None
    for i, (step, count) in enumerate(zip(steps, counts, strict=True)):
        whole = torch.stack([torch.cat(gradient) for gradient in step[:count]]).sum(0)
        if i > 1 and count > 1:
            each.append(covariance(step[:count], last))
        elif last is not None:
            each.append(0.5 * torch.outer(whole - last, whole - last))
        last = whole
    each = each[: len(each) - state_of(given).pending]
    shares = [0.9**age for age in reversed(range(len(each)))]
    expected = sum(share * one for share, one in zip(shares, each, strict=True)) / sum(shares)
    torch.testing.assert_close(given.moment(), expected, rtol=0, atol=1e-9)


# -- when the difference is taken in their place --------------------------------------------------------------


def differences_alone(given, sums, decay=0.9):
    flat = sums[: len(sums) - state_of(given).pending]
    expected = averaged([new - old for old, new in itertools.pairwise(flat)], decay)
    torch.testing.assert_close(given.moment(), expected, rtol=0, atol=1e-9)


def whole(step):
    return torch.stack([torch.cat(gradient) for gradient in step]).sum(0)


def test_a_pass_that_is_thrown_away_as_zeros_is_no_row(unclipped, alike):
    given, steps = Given(step_decay=0.9, k=20), passes_of(12, 3)
    for step in steps:
        sum((10 * p).sum() for p in given.params).backward()
        run_passes(given, step, set_to_none=False)
    differences_alone(given, [whole(step) for step in steps])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("look", ["backward", "grad"])
def test_a_pass_that_zero_grad_throws_away_leaves_no_trace(unclipped, alike, count, look):
    """As in a GAN, whose generator's loss goes back through the discriminator: not a fold more than without it."""
    plain, given = (Given(step_decay=0.9, k=20) for _ in range(2))
    for step in passes_of(40, count):
        run_passes(plain, step)
        loss = sum((10 * p).sum() for p in given.params)
        loss.backward() if look == "backward" else torch.autograd.grad(loss, given.params)
        run_passes(given, step)
    assert given.optimizer.refreshes == plain.optimizer.refreshes < (40 if count == 1 else 41)
    assert torch.equal(given.moment(), plain.moment())
    assert all(map(torch.equal, given.params, plain.params))


def test_a_parameter_that_only_a_thrown_away_pass_reaches_has_no_part(unclipped, alike):
    plain, given = (Given(step_decay=0.9, k=20) for _ in range(2))
    for step in passes_of(12, 3):
        step = [(one, None) for one, _ in step]
        run_passes(plain, step)
        given.params[1].sum().backward()
        run_passes(given, step)
    assert torch.equal(given.moment(), plain.moment())


def test_a_look_at_gradients_after_the_pass_is_no_row(unclipped, alike):
    given, steps = Given(step_decay=0.9, k=20), passes_of(12, 1)

    def look():
        torch.autograd.grad(sum((3 * p).sum() for p in given.params), given.params)

    for step in steps:
        run_passes(given, step, before_step=look)
    differences_alone(given, [whole(step) for step in steps])


def test_gradients_that_are_left_over_are_no_rows(unclipped, alike):
    given, steps = Given(step_decay=0.9, k=20), passes_of(12, 3)
    left = torch.full((12,), 5.0, dtype=torch.float64)

    def leave():
        given.params[0].grad.add_(left)

    for step in steps:
        run_passes(given, step, before_step=leave)
    differences_alone(given, [whole(step) + torch.cat([left, torch.zeros(20)]) for step in steps])


def test_a_parameter_that_some_passes_leave_out_has_them_all_taken_for_one(unclipped, alike):
    given, steps = Given(step_decay=0.9, k=20), passes_of(12, 3)
    steps = [[(one, None) if i == 1 else (one, other) for i, (one, other) in enumerate(step)] for step in steps]
    for step in steps:
        run_passes(given, step)
    sums = [torch.cat([step[0][0] + step[1][0] + step[2][0], step[0][1] + step[2][1]]) for step in steps]
    differences_alone(given, sums)


def test_a_parameter_that_no_pass_uses_has_no_part(unclipped, alike):
    given, steps = Given(step_decay=0.9, k=20), passes_of(12, 3)
    for step in steps:
        run_passes(given, [(one, None) for one, _ in step])
    assert not given.optimizer.directions(given.params[1:]).any()
    assert float(state_of(given).shares[1]) > 0.9  # rows of passes: the first parameter's are taken


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_pass_that_is_not_finite_leaves_the_step_out_and_no_more(unclipped, alike, value, at):
    given, steps = Given(step_decay=0.9, k=20), passes_of(12, 3)
    for i, step in enumerate(steps):
        if i == at:
            step = [(one * value, other) for one, other in step]
        run_passes(given, step)
        with torch.no_grad():
            for p in given.params:
                p.zero_()
    each, last, compared = [], None, False
    for i, step in enumerate(steps):
        if i == at:
            one = torch.zeros(32, 32, dtype=torch.float64)
        elif compared:
            one = covariance(step, last)
        elif last is not None:
            one = 0.5 * torch.outer(whole(step) - last, whole(step) - last)
        else:
            one = torch.zeros(32, 32, dtype=torch.float64)
        compared = compared or (i > 0 and i != at)  # with the deviations of an earlier step
        each.append((one, float(bool(one.any()))))
        last = last if i == at else whole(step)
    shares = [0.9**age * counted for age, (_, counted) in zip(reversed(range(12)), each, strict=True)]
    expected = sum(share * one for share, (one, _) in zip(shares, each, strict=True)) / sum(shares)
    torch.testing.assert_close(given.moment(), expected, rtol=0, atol=1e-9)


def test_losses_of_two_tasks_are_no_samples_of_one_gradient(training, flat):
    """Passes that differ in the same way at each step would make that difference the sharpest direction."""
    torch.manual_seed(0)
    given = Given(step_decay=0.9, k=3)
    one, other = draws(1, seed=1)[0], draws(1, seed=2)[0]
    noise = draws(40, seed=3)
    for draw in noise:
        run_passes(given, [[5 * a + 0.1 * n for a, n in zip(one, draw, strict=True)], [5 * b for b in other]])
    between = torch.cat(one) - torch.cat(other)
    vectors = given.optimizer.directions(given.params)
    assert float((vectors @ (between / between.norm())).square().sum()) < 0.5
    assert float(state_of(given).shares[1]) == 0  # differences


# -- what stays as it is --------------------------------------------------------------------------------------


def accumulate(run, optimizer, first, last, chunks=3):
    for i in range(first, last):
        optimizer.zero_grad()
        x, y = run.batches[i % len(run.batches)]
        backward_in_chunks(lambda x, y: cross_entropy(run.model(x), y), x, y, chunks=chunks)
        optimizer.step()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 13])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(training, flat, maker, stop):
    whole, part, resumed = training(), training(), training()
    optimizer = MAKERS[maker](whole.model.parameters(), k=3)
    accumulate(whole, optimizer, 0, 25)
    halted = MAKERS[maker](part.model.parameters(), k=3)
    accumulate(part, halted, 0, stop)
    resumed.model.load_state_dict(through_a_file(part.model.state_dict()))
    again = MAKERS[maker](resumed.model.parameters(), k=2)
    again.load_state_dict(through_a_file(halted.state_dict()))
    accumulate(resumed, again, stop, 25)
    assert torch.equal(flat(resumed.model.parameters()), flat(whole.model.parameters()))
    assert again.weights == optimizer.weights
    assert float(again._directions.differences.shares[1]) > 0.9  # rows of passes


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_go_on_bitwise_and_on_their_own(training, flat, copied):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3)
    accumulate(run, optimizer, 0, 13)
    twin, other = copied((run.model, optimizer))
    before = flat(run.model.parameters())
    accumulate(type(run)(twin, run.batches), other, 13, 25)
    assert torch.equal(flat(run.model.parameters()), before)
    accumulate(run, optimizer, 13, 25)
    assert torch.equal(flat(run.model.parameters()), flat(twin.parameters()))
    assert float(optimizer._directions.differences.shares[1]) > 0.9


def test_a_group_that_is_added_has_its_part_in_the_rows(training):
    run = training()
    params = list(run.model.parameters())
    optimizer = NSGD(params[:2], lr=0.1, k=3)
    accumulate(run, optimizer, 0, 5)
    optimizer.add_param_group({"params": params[2:]})
    accumulate(run, optimizer, 5, 15)
    assert optimizer.directions(params[2:]).abs().amax() > 0.01
    assert float(optimizer._directions.differences.shares[1]) > 0.9


def test_one_pass_a_step_costs_no_operation_in_the_pass(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    for i in range(12):
        optimizer.zero_grad()
        run.loss(i).backward()
        optimizer.step()
    optimizer.zero_grad()
    loss, plain = run.loss(0), run.loss(0)
    with Calls() as ours:
        loss.backward()
    optimizer._directions.differences.passes.leave()
    optimizer.zero_grad()
    with Calls() as theirs:
        plain.backward()
    assert ours.seen == theirs.seen


def test_hooks_go_with_the_optimizer_and_with_differences(training):
    run = training()
    params = list(run.model.parameters())
    optimizer = NSGD(params, lr=0.1, k=3)
    assert all(len(p._backward_hooks) == 1 for p in params)
    x, y = run.batches[0]
    losses = sample_losses(lambda x, y: cross_entropy(run.model(x), y), x, y, module=run.model)
    optimizer.refresh(losses)  # by vmap, which passes a hook of ours by
    assert not any(p._backward_hooks for p in params)
    optimizer = NSGD(params, lr=0.1, k=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.dumps(params)
        torch.utils.hooks.warn_if_has_hooks(params[0])
    del optimizer
    gc.collect()
    run.loss(0).backward()  # hooks of an optimizer that is gone do nothing
    assert all(p.grad is not None for p in params)


def test_hooks_of_optimizers_that_are_gone_are_taken_away(training):
    params = list(training().model.parameters())
    for _ in range(3):
        NSGD(params, lr=0.1, k=3)
    gc.collect()
    assert not any(p._backward_hooks for p in params)


def test_many_gradients_at_once_beside_the_passes_are_no_rows(training):
    run = training()
    params = list(run.model.parameters())
    optimizer = NSGD(params, lr=0.1, k=3)
    accumulate(run, optimizer, 0, 5)
    out = run.model(run.batches[0][0][:1]).squeeze(0)
    torch.autograd.grad(out, params, torch.eye(len(out)), is_grads_batched=True)
    accumulate(run, optimizer, 5, 6)
    assert float(optimizer._directions.differences.shares[0]) == 0.5  # the difference alone
    accumulate(run, optimizer, 6, 15)
    assert float(optimizer._directions.differences.shares[1]) > 0.9


@pytest.mark.parametrize("scale", [1e-13, 1e13])
def test_passes_are_compared_at_any_scale(scale):
    given = Given(step_decay=0.9, k=5, dtype=torch.float32)
    for step in passes_of(12, 4):
        run_passes(given, [[(scale * g).float() for g in gradient] for gradient in step])
    assert float(state_of(given).shares[1]) > 0.9


# -- a batch in chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "parts"), [(9, 3), (10, 5), (12, 6), (13, 8), (16, 8), (3, 3), (1, 1)])
def test_parts_are_of_one_size_where_they_can_be(samples, parts):
    model, sizes = nn.Linear(2, 1), []
    backward_in_chunks(lambda x: (sizes.append(len(x)), model(x).mean())[1], torch.randn(samples, 2))
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) == (1 if samples == 13 else 0)


@pytest.mark.parametrize("chunks", [1, 3, 8, 1000])
def test_chunks_add_up_to_the_gradient_of_the_batch(chunks):
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3).double(), torch.randn(29, 5).double(), torch.arange(29) % 3
    expected = cross_entropy(model(x), y)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = backward_in_chunks(lambda x, y: cross_entropy(model(x), y), x, y, chunks=chunks)
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_the_backward_pass_may_be_somebody_elses():
    model, x, y = nn.Linear(5, 3), torch.randn(16, 5), torch.arange(16) % 3
    cross_entropy(model(x), y).backward()
    plain = model.weight.grad.clone()
    model.zero_grad()
    backward_in_chunks(
        lambda x, y: cross_entropy(model(x), y), x, y, chunks=4, backward=lambda part: (1024 * part).backward()
    )
    torch.testing.assert_close(model.weight.grad, 1024 * plain)


@pytest.mark.parametrize(
    ("tensors", "options", "said"),
    [
        ([], {}, "tensors of one length"),
        ([torch.zeros(4, 5), torch.zeros(3)], {}, "tensors of one length"),
        ([torch.zeros(0, 5)], {}, "tensors of one length"),
        ([torch.zeros(4, 5)], {"chunks": 0}, "whole number of at least 1, got 0"),
        ([torch.zeros(4, 5)], {"chunks": 2.0}, "whole number of at least 1, got 2.0"),
        ([torch.zeros(4, 5)], {}, r"scalar tensor, the samples' mean, got shape \(1, 3\)"),
    ],
)
def test_bad_chunks_get_a_sentence(tensors, options, said):
    model = nn.Linear(5, 3)
    with pytest.raises(ValueError, match=said):
        backward_in_chunks(lambda x: model(x), *tensors, **options)
    assert model.weight.grad is None
