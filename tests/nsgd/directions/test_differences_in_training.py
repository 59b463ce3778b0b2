"""A loop with one line changed against SGD: what it leaves alone, and where its directions and options come from."""

from __future__ import annotations

import copy
import itertools
from abc import ABC

import pytest
import torch
from given import MAKERS, averaged, plain_loop
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from nsgd import NSGD, damp, sample_losses
from nsgd.damping.step import Damped

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
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
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


def test_a_wrapper_that_inherits_from_a_damped_class_keeps_its_own_step(training):
    """As Lightning wraps the optimizer of a training_step."""

    class Wrapper:
        calls = 0

        def step(self):
            self.calls += 1

    optimizer = damp(AdamW(training().model.parameters()), k=3)
    wrapper = object.__new__(type("Wrapped", (Wrapper, type(optimizer)), {}))
    wrapper.step()
    assert wrapper.calls == 1
