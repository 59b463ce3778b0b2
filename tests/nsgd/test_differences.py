"""Directions from the gradients that training leaves: a loop with one line changed against SGD."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
from abc import ABC

import pytest
import torch
from calls import Calls
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.profiler import ProfilerActivity, profile

from nsgd import NSGD, damp, sample_losses
from nsgd.curvature.small import orthogonal_iteration, small_eigh
from nsgd.damping.step import Damped
from nsgd.directions import differences
from nsgd.directions.differences import ROWS
from nsgd.directions.flat import blocks_of

MAKERS = {
    "nsgd": lambda params, **options: NSGD(params, lr=0.1, momentum=0.9, **options),
    "nesterov": lambda params, **options: NSGD(params, lr=0.1, momentum=0.9, nesterov=True, **options),
    "sgd": lambda params, **options: damp(SGD(params, lr=0.1), **options),
    "adamw": lambda params, **options: damp(AdamW(params, lr=0.01), **options),
}


def plain_loop(run, optimizer, first, last, *, before_step=None, set_to_none=True):
    """What a user of torch writes."""
    for i in range(first, last):
        optimizer.zero_grad(set_to_none=set_to_none)
        run.loss(i).backward()
        if before_step is not None:
            before_step(i)
        optimizer.step()


class Given:
    """Parameters whose gradients are what the test says."""

    def __init__(self, sizes=(12, 20), dtype=torch.float64, **options):
        self.params = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
        options = {"lr": 1e-3, "k": 5, **options}
        self.optimizer = NSGD(self.params, **options)

    def step(self, *gradients):
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        self.optimizer.step()

    def moment(self):
        """What the directions and their weights stand for, (P, P)."""
        vectors = self.optimizer.directions(self.params)
        weights = torch.tensor(self.optimizer.weights, dtype=vectors.dtype)
        vectors = vectors[: len(weights)]
        return vectors.T @ (weights[:, None] * vectors)


@pytest.fixture
def unclipped(monkeypatch):
    """Rows of any length count in full."""
    monkeypatch.setattr(differences, "_MOST", 1e9)


def draws(count, sizes=(12, 20), rank=3, seed=0):
    """Gradients in a space of few dimensions, and of one length, so that none is clipped."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, sum(sizes), generator=generator, dtype=torch.float64)
    rows = torch.randn(count, rank, generator=generator, dtype=torch.float64) @ basis
    return [row.split(sizes) for row in rows / rows.norm(dim=1, keepdim=True)]


def averaged(rows, decay):
    """The mean of half the outer products of rows, older ones decayed."""
    shares = [decay ** (len(rows) - 1 - i) for i in range(len(rows))]
    return sum(0.5 * share * torch.outer(row, row) for share, row in zip(shares, rows, strict=True)) / sum(shares)


# -- what is averaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.98])
@pytest.mark.parametrize("steps", [2, 3, 9, 41])
def test_the_weights_and_directions_are_those_of_the_decayed_mean_of_differences(unclipped, decay, steps):
    given, gradients = Given(step_decay=decay), draws(steps)
    for gradient in gradients:
        given.step(*gradient)
    pending = given.optimizer._directions.differences.pending
    flat = [torch.cat(gradient) for gradient in gradients][: steps - pending]
    expected = averaged([new - old for old, new in itertools.pairwise(flat)], decay)
    torch.testing.assert_close(given.moment(), expected, rtol=0, atol=1e-10)  # of rank 3, of five that are kept
    vectors = given.optimizer.directions(given.params)[: len(given.optimizer.weights)]
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)).double(), rtol=0, atol=1e-10)


def test_directions_overlap_the_hessians_outliers_and_the_step_is_damped_along_them(training, flat):
    """A quadratic with three outlying eigenvalues and batches whose noise is like its curvature."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([50.0, 30.0, 20.0, *[0.1] * 37], dtype=torch.float64)
    hessian, root = (axes * values) @ axes.T, (axes * values.sqrt()) @ axes.T
    weight = nn.Parameter(torch.ones(40, dtype=torch.float64))
    optimizer = NSGD([weight], lr=0.01, k=3, gamma=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        noise = root @ torch.randn(40, generator=generator, dtype=torch.float64)
        (0.5 * weight @ hessian @ weight + noise @ weight).backward()
        before = weight.detach().clone()
        optimizer.step()
    vectors = optimizer.directions([weight])
    assert float((vectors @ axes[:, :3]).square().sum() / 3) > 0.99
    change = weight.detach() - before
    torch.testing.assert_close(vectors @ change, torch.zeros(3).double(), rtol=0, atol=1e-12)
    expected = -0.01 * (weight.grad - vectors.T @ (vectors @ weight.grad))
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-12)
    assert optimizer.eigenvalues == ()
    assert 0 < optimizer.overlap <= 1
    assert 0 < optimizer.alignment <= 1
    assert (optimizer.steps, optimizer.hvps, optimizer.cost_gradients) == (60, 0, 0.0)
    assert optimizer.refreshes > 6


def test_a_flat_descent_direction_is_not_damped():
    """Where all gradients agree there is no difference: the first number falls as under SGD."""
    theta = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = NSGD([theta], lr=0.005, k=2)
    for _ in range(100):
        optimizer.zero_grad()
        rest = theta[2:] - 0.001
        (-theta[0] + 10 * (theta[1] - 0.01) ** 2 + 0.05 * rest.square().sum()).backward()
        optimizer.step()
    assert float(theta[0].detach()) == pytest.approx(0.5, rel=1e-6)


def test_a_spike_of_the_gradient_counts_for_little_more_than_the_usual():
    given = Given(step_decay=0.5)
    gradients = draws(30)
    for gradient in gradients:
        given.step(*gradient)
    before = sum(given.optimizer.weights)
    given.step(*[100 * g for g in gradients[0]])
    for _ in range(ROWS):
        given.step(*[100 * g for g in gradients[0]])  # the same again: differences of zero
    assert sum(given.optimizer.weights) < 1.5 * before


# -- gradients that are not there -----------------------------------------------------------------------------


def test_a_row_has_entries_only_where_a_parameter_has_this_gradient_and_the_last(unclipped):
    """A parameter that is used every other step is not taken for one whose gradient comes and goes."""
    given, gradients = Given(step_decay=0.9), draws(21)
    for i, (one, other) in enumerate(gradients):
        given.step(one, other if i % 2 else None)
    pending = given.optimizer._directions.differences.pending
    flat = [torch.cat([one, torch.zeros(20)]) for one, _ in gradients][: 21 - pending]
    expected = averaged([new - old for old, new in itertools.pairwise(flat)], 0.9)
    torch.testing.assert_close(given.moment(), expected, rtol=0, atol=1e-10)
    assert not given.optimizer.directions(given.params[1:]).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
@pytest.mark.parametrize("at", [0, 1, 7, 19])
def test_a_gradient_that_is_not_finite_leaves_its_row_out_and_no_more(unclipped, value, at):
    given, gradients = Given(step_decay=0.9), draws(41)
    for i, (one, other) in enumerate(gradients):
        one = one.clone()
        if i == at:
            one[:3] = value * torch.tensor([1.0, 1.0, 1.0])
        given.step(one, other)
        with torch.no_grad():
            for p in given.params:
                p.zero_()
    pending = given.optimizer._directions.differences.pending
    flat = [torch.cat(gradient) for i, gradient in enumerate(gradients[: 41 - pending])]
    rows, shares, last = [], [], None
    for i, gradient in enumerate(flat):
        if i == at:
            if last is not None:
                rows.append(torch.zeros(32, dtype=torch.float64)), shares.append(0.0)
            continue
        if last is not None:
            rows.append(gradient - last), shares.append(1.0)
        elif i > 0:
            rows.append(torch.zeros(32, dtype=torch.float64)), shares.append(0.0)
        last = gradient
    weights = [share * 0.9 ** (len(rows) - 1 - i) for i, share in enumerate(shares)]
    outer = [0.5 * w * torch.outer(row, row) for w, row in zip(weights, rows, strict=True)]
    torch.testing.assert_close(given.moment(), sum(outer) / sum(weights), rtol=0, atol=1e-10)


def test_sparse_gradients_pass_by():
    table, head = nn.Embedding(20, 6, sparse=True), nn.Linear(6, 3)
    optimizer = damp(SGD([*table.parameters(), *head.parameters()], lr=0.1), k=3, gamma=0.0)
    for i in range(20):
        optimizer.zero_grad()
        words = torch.arange(i, i + 8) % 20
        nn.functional.cross_entropy(head(table(words)), words % 3).backward()
        before, gradient = table.weight.detach().clone(), table.weight.grad.to_dense()
        optimizer.step()
        torch.testing.assert_close(table.weight.detach(), before - 0.1 * gradient)
    assert len(optimizer.weights) == 3
    assert torch.equal(optimizer.directions([table.weight]), torch.zeros(3, 120))


def test_frozen_parameters_join_when_they_train(training):
    run = training()
    first = list(run.model[0].parameters())
    for p in first:
        p.requires_grad_(False)
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 12)
    assert not optimizer.directions(first).any()
    for p in first:
        p.requires_grad_(True)
    plain_loop(run, optimizer, 12, 40)
    assert optimizer.directions(first).any()
    vectors = optimizer.directions(run.model.parameters())
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3), rtol=0, atol=1e-5)


def test_a_group_that_is_added_joins_and_one_without_curvature_stays_out(training):
    run = training()
    optimizer = NSGD(run.model[2].parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 6)
    optimizer.add_param_group({"params": [run.model[0].weight]})
    optimizer.add_param_group({"params": [run.model[0].bias], "curvature": False})
    plain_loop(run, optimizer, 6, 40)
    assert optimizer.directions([run.model[0].weight]).any()
    assert not optimizer.directions([run.model[0].bias]).any()


def test_a_model_that_changes_its_precision_takes_its_directions_along(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 12)
    before = optimizer.directions(run.model.parameters())
    run.model.double()
    twin = training(torch.float64)
    run = type(run)(run.model, twin.batches)
    optimizer.zero_grad()
    run.loss(0).backward()
    optimizer.step()
    after = optimizer.directions(run.model.parameters())
    assert after.dtype == torch.float64
    assert float((before.double() @ after.T).square().sum() / 3) > 0.5


# -- what it leaves alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gamma_one_is_bitwise_the_base_optimizer(training, flat, maker, set_to_none):
    run, twin = training(noisy=True), training(noisy=True)
    optimizer = MAKERS[maker](run.model.parameters(), k=3, gamma=1.0)
    base = {
        "nsgd": lambda params: SGD(params, lr=0.1, momentum=0.9),
        "nesterov": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
        "sgd": lambda params: SGD(params, lr=0.1),
        "adamw": lambda params: AdamW(params, lr=0.01),
    }[maker]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain_loop(run, optimizer, 0, 30, set_to_none=set_to_none)
        torch.manual_seed(0)
        plain_loop(twin, base(twin.model.parameters()), 0, 30, set_to_none=set_to_none)
    assert torch.equal(flat(run.model.parameters()), flat(twin.model.parameters()))
    assert optimizer.refreshes > 5
    assert len(optimizer.weights) == 3


@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_and_the_random_state_stay_as_found(training, maker):
    run = training()
    optimizer = MAKERS[maker](run.model.parameters(), k=3)
    plain_loop(run, optimizer, 0, 12)
    run.loss(0).backward()
    found = [p.grad.clone() for p in run.model.parameters()]
    state = torch.get_rng_state()
    optimizer.step()
    # torch's own Nesterov step with foreach changes gradients in place, which is its way.
    if maker != "nesterov":
        assert all(torch.equal(p.grad, g) for p, g in zip(run.model.parameters(), found, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_clipped_gradients_are_taken_as_the_step_finds_them(training):
    run = training(torch.float64)
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    seen = []

    def clip(_):
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
        seen.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))

    plain_loop(run, optimizer, 0, 3, before_step=clip)
    rows = [new - old for old, new in itertools.pairwise(seen)]
    assert sum(optimizer.weights) == pytest.approx(float(averaged(rows, 0.98).trace()), rel=1e-9)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 0.0, "momentum": 0.9}])
def test_a_step_at_rate_zero_counts_for_nothing(training, flat, options):
    """torch's distributed checkpoint takes one with gradients of zero, to make the state."""
    run = training()
    optimizer = NSGD(run.model.parameters(), **{**options, "lr": 0.1}, k=3)
    plain_loop(run, optimizer, 0, 7)
    twin, other = copy.deepcopy((run.model, optimizer))
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    if "momentum" not in options:
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    assert (optimizer.steps, optimizer.refreshes) == (7, other.refreshes)
    plain_loop(run, optimizer, 7, 20)
    plain_loop(type(run)(twin, run.batches), other, 7, 20)
    assert torch.equal(flat(run.model.parameters()), flat(twin.parameters()))


def test_an_exception_in_a_closure_changes_nothing(training, flat):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 7)
    before, state = flat(run.model.parameters()), copy.deepcopy(optimizer.state_dict())

    def closure():
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(closure)
    assert torch.equal(flat(run.model.parameters()), before)
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize("scaler_step", [True, False])
def test_a_gradient_scaler_gives_the_rows_of_the_plain_loss(training, scaler_step):
    """With the fused path the gradients are still scaled in the step, and the scale may change."""
    run, twin = training(), training()
    fused = {"fused": True} if scaler_step else {}
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, **fused)
    plain = NSGD(twin.model.parameters(), lr=0.1, k=3, **fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(12):
        optimizer.zero_grad()
        scaler.scale(run.loss(i)).backward()
        if i == 5:
            for p in run.model.parameters():
                p.grad.mul_(float("inf"))  # an overflow: this step is left out
        scaler.step(optimizer)
        scaler.update(2.0 ** (10 + i % 3))
        if i != 5:
            plain.zero_grad()
            twin.loss(i).backward()
            plain.step()
    # One row more, of the step that was left out, has moved the folds by a step.
    assert sum(optimizer.weights) == pytest.approx(sum(plain.weights), rel=0.1)
    assert optimizer.weights == pytest.approx(plain.weights, rel=0.2)


def test_l_bfgs_takes_its_row_from_the_first_closure(training):
    run = training()
    optimizer = damp(LBFGS(run.model.parameters(), lr=0.1, max_iter=3), k=3)

    def closure(i):
        optimizer.zero_grad()
        loss = run.loss(i)
        loss.backward()
        return loss

    for i in range(12):
        optimizer.step(lambda i=i: closure(i))
    assert optimizer._directions.differences.recorded == 11
    assert len(optimizer.weights) == 3


def test_maximize_sees_the_same_differences(training):
    run, twin = training(torch.float64), training(torch.float64)
    up = NSGD(run.model.parameters(), lr=0.1, k=3, maximize=True)
    down = NSGD(twin.model.parameters(), lr=0.1, k=3)
    for i in range(12):
        up.zero_grad(), down.zero_grad()
        (-run.loss(i)).backward(), twin.loss(i).backward()
        up.step(), down.step()
    assert up.weights == pytest.approx(down.weights, rel=1e-9)


# -- resumption -----------------------------------------------------------------------------------------------


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


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


# -- which source ---------------------------------------------------------------------------------------------


def test_backward_without_curvature_is_a_plain_backward(training):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    optimizer.backward(run.loss(0))
    twin.loss(0).backward()
    assert optimizer.hvps == 0
    for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_refresh_takes_over_and_says_so_once_where_there_were_directions(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 5)
    with pytest.warns(UserWarning, match="from step 5 on the directions come from the curvature that is given"):
        optimizer.refresh(run.loss(0))
    assert len(optimizer.eigenvalues) == 3
    basis = optimizer.directions(run.model.parameters())
    plain_loop(run, optimizer, 5, 40)
    optimizer.refresh(run.loss(0))  # and no warning
    assert optimizer.refreshes == 4 + 2
    assert basis.any()


def test_from_the_first_step_on_a_refresh_takes_over_in_silence(training):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3)
    x, y = run.batches[0]
    samples = sample_losses(lambda x, y: nn.functional.cross_entropy(run.model(x), y), x, y, module=run.model)
    optimizer.backward(run.loss(0), curvature=samples)
    optimizer.step()
    assert optimizer._directions.differences is None


@pytest.mark.parametrize("way", ["backward", "refresh", "refresh_if_due"])
def test_differences_alone_refuse_a_curvature(training, flat, way):
    run = training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, k=3, solver="differences")
    plain_loop(run, optimizer, 0, 5)
    before, weights = flat(run.model.parameters()), optimizer.weights
    loss = run.loss(0)
    with pytest.raises(ValueError, match="expected no curvature with solver='differences'"):
        optimizer.backward(loss, curvature=loss) if way == "backward" else getattr(optimizer, way)(loss)
    assert torch.equal(flat(run.model.parameters()), before)
    assert optimizer.weights == weights
    assert not optimizer.refresh_due


def test_the_warmup_is_plain(training, flat):
    run, twin = training(), training()
    plain_loop(run, optimizer := NSGD(run.model.parameters(), lr=0.1, k=3, warmup_steps=5), 0, 6)
    plain_loop(twin, SGD(twin.model.parameters(), lr=0.1), 0, 6)
    assert torch.equal(flat(run.model.parameters()), flat(twin.model.parameters()))  # the sixth has no difference yet
    plain_loop(run, optimizer, 6, 12), plain_loop(twin, SGD(twin.model.parameters(), lr=0.1), 6, 12)
    assert not torch.equal(flat(run.model.parameters()), flat(twin.model.parameters()))


# -- options and names of others ------------------------------------------------------------------------------


class WithOwnNames(SGD):
    """An optimizer that keeps a step count as ``k`` and a factor as ``gamma`` in its groups."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.defaults.update(k=0, gamma=0.5)
        for group in self.param_groups:
            group.update(k=0, gamma=0.5)

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["k"] += 1


def test_group_keys_of_the_base_optimizer_stay_its_own(training):
    run = training()
    optimizer = damp(WithOwnNames(run.model.parameters(), lr=0.1), k=3, gamma=0.2)
    plain_loop(run, optimizer, 0, 12)
    group = optimizer.param_groups[0]
    assert (group["k"], group["gamma"], group["nsgd_gamma"]) == (12, 0.5, 0.2)
    again = damp(WithOwnNames(training().model.parameters(), lr=0.1), k=2, gamma=0.7)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert (again.param_groups[0]["k"], again.param_groups[0]["nsgd_gamma"], again.options.k) == (12, 0.2, 3)


def test_a_wrapper_that_copies_attributes_and_inherits_methods_shares_the_state(training, flat):
    """As Fabric and Lightning's manual optimization wrap an optimizer."""
    run, twin = training(), training()
    plain = NSGD(run.model.parameters(), lr=0.1, k=3)
    wrapper = object.__new__(type("Wrapped", (NSGD,), {}))
    wrapper.__dict__ = dict(plain.__dict__)
    whole = NSGD(twin.model.parameters(), lr=0.1, k=3)
    for i in range(20):
        plain_loop(run, wrapper if i % 3 else plain, i, i + 1)
        plain_loop(twin, whole, i, i + 1)
    assert torch.equal(flat(run.model.parameters()), flat(twin.model.parameters()))
    assert wrapper.weights == plain.weights == whole.weights


def test_options_of_one_group_hold_for_it_alone(training):
    run = training(torch.float64)
    groups = [{"params": run.model[0].parameters(), "gamma": 0.0}, {"params": run.model[2].parameters(), "gamma": 1.0}]
    optimizer = NSGD(groups, lr=0.1, k=3)
    plain_loop(run, optimizer, 0, 12)
    optimizer.zero_grad()
    run.loss(0).backward()
    before = [p.detach().clone() for p in run.model.parameters()]
    optimizer.step()
    moved = [p.detach() - old for p, old in zip(run.model.parameters(), before, strict=True)]
    steps = [-0.1 * p.grad for p in run.model.parameters()]
    for change, step in zip(moved[2:], steps[2:], strict=True):
        torch.testing.assert_close(change, step, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(moved[0], steps[0])


# -- what it costs --------------------------------------------------------------------------------------------


WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "item")


@pytest.mark.parametrize("maker", ["nsgd", "nesterov", "sgd"])
def test_no_step_and_no_fold_asks_the_device_for_a_number(training, maker):
    run = training()
    optimizer = MAKERS[maker](run.model.parameters(), k=3)
    with Calls() as calls:
        for i in range(40):
            optimizer.zero_grad()
            optimizer.refresh_due  # noqa: B018
            run.loss(i).backward()
            optimizer.step()
    assert {name: calls.seen[name] for name in WAITS if calls.seen[name]} == {}


def dispatches(optimizer, params, steps):
    """Top-level operations a step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            for p in params:
                p.grad.mul_(1.01)
            optimizer.step()
    events = [e for e in profiled.events() if e.name.startswith("aten::")]
    inner = [e for e in events if e.cpu_parent is not None and e.cpu_parent.name.startswith("aten::")]
    return (len(events) - len(inner)) / steps - len(params)


@pytest.mark.parametrize("count", [10, 300])
def test_launches_do_not_grow_with_the_number_of_parameters(count):
    def built(make):
        params = [nn.Parameter(torch.ones(7)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn(7)
        optimizer = make(params)
        for _ in range(45):
            for p in params:
                p.grad = torch.randn(7)
            optimizer.step()
        return dispatches(optimizer, params, 4)  # between two folds

    plain = built(lambda params: SGD(params, lr=0.1, momentum=0.9, foreach=True))
    assert built(lambda params: NSGD(params, lr=0.1, momentum=0.9, foreach=True)) <= plain + 25
    adam = built(lambda params: Adam(params, foreach=True))
    assert built(lambda params: damp(Adam(params, foreach=True))) <= adam + 40


def test_a_basis_in_bfloat16_takes_half_the_memory_and_is_nearly_the_same(training, flat):
    run, twin = training(), training()
    half = NSGD(run.model.parameters(), lr=0.1, k=3, basis_dtype=torch.bfloat16)
    full = NSGD(twin.model.parameters(), lr=0.1, k=3)
    plain_loop(run, half, 0, 30), plain_loop(twin, full, 0, 30)
    assert half.state_dict()["state"][0]["directions"].dtype == torch.bfloat16
    torch.testing.assert_close(flat(run.model.parameters()), flat(twin.model.parameters()), rtol=0, atol=0.02)


# -- the small eigenproblem -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decades", [1, 3, 5])
@pytest.mark.parametrize("rank", [40, 7])
def test_orthogonal_iteration_finds_the_sum_that_eigh_finds(dtype, decades, rank):
    """Up to pairs that are so close that they may stand for each other; the kept share of the trace is the same."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -decades, 40, dtype=torch.float64)
    values[rank:] = 0
    matrix = ((axes * values) @ axes.T).to(dtype)
    found, vectors = orthogonal_iteration(matrix)
    exact, columns = small_eigh(matrix)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40, dtype=dtype), rtol=0, atol=tolerance)
    assert torch.equal(found.sort(descending=True).values, found)
    kept = vectors[:, :20]
    assert float((kept.T @ matrix @ kept).trace()) >= (1 - 2e-3) * float(exact[:20].sum())
    if rank < 20:  # nothing to choose: the same space
        overlap = (kept.T @ columns[:, :rank]).square().sum() / rank
        assert float(overlap) == pytest.approx(1, abs=1e-3)


def test_a_matrix_that_is_not_finite_raises_nothing():
    for function in (small_eigh, orthogonal_iteration):
        values, _ = function(torch.full((5, 5), float("nan"), dtype=torch.float64))
        assert values.shape == (5,)


def test_views_lie_in_memory_as_the_parameters_do():
    wide = nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last))
    scalar, empty = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(0, 3))
    (block,) = blocks_of([(0, wide), (0, scalar), (0, empty)], None)
    views = block.views(block.vector())
    assert [view.shape for view in views] == [p.shape for p in block.params]
    assert views[0].stride() == wide.stride()
    assert block.view(block.rows(2), 0).shape == (2, *wide.shape)


def held():
    """Tensors that live, and their bytes."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    return len(tensors), sum(t.numel() * t.element_size() for t in tensors)


def test_ten_thousand_steps_hold_no_more_than_a_hundred():
    weight = nn.Parameter(torch.zeros(64))
    optimizer = NSGD([weight], lr=1e-3, momentum=0.9, k=5)
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(10_000):
        weight.grad = torch.randn(64, generator=generator)
        optimizer.step()
        if i in (99, 9_999):
            found.append(held())
    assert found[0] == found[1]
    assert optimizer.refreshes == pytest.approx(1_000, abs=20)
    vectors = optimizer.directions([weight])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(5), rtol=0, atol=1e-4)  # after a thousand folds


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


class WithoutRate(torch.optim.Optimizer):
    """Calls its learning rate by another name."""

    def __init__(self, params):
        super().__init__(params, {"eta": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["eta"])


def test_an_optimizer_without_lr_is_damped(training):
    run = training()
    optimizer = damp(WithoutRate(run.model.parameters()), k=3)
    plain_loop(run, optimizer, 0, 12)
    assert 0 < optimizer.alignment <= 1


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


class Abstract(ABC, SGD):
    """Its first base is abstract, as nearly every class of pytorch_optimizer's is."""


def of_pytorch_optimizer(name):
    return lambda params: getattr(pytest.importorskip("pytorch_optimizer"), name)(params, lr=0.01)


@pytest.mark.parametrize(
    "make",
    [lambda params: Abstract(params, lr=0.1), *map(of_pytorch_optimizer, ("Lion", "SOAP", "Tiger"))],
    ids=["abstract", "Lion", "SOAP", "Tiger"],
)
def test_optimizers_with_an_abstract_base_are_damped(training, flat, make):
    run, twin = training(), training()
    plain_loop(run, optimizer := damp(make(run.model.parameters()), k=3, gamma=1.0), 0, 12)
    plain_loop(twin, make(twin.model.parameters()), 0, 12)
    assert torch.equal(flat(run.model.parameters()), flat(twin.model.parameters()))
    assert isinstance(optimizer, Damped)
    assert len(optimizer.weights) == 3
