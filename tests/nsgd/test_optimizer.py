"""NSGD in a training loop: what it leaves as torch.optim.SGD has it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from loops import assert_bitwise, everything, train
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from nsgd import NSGD, damp


def groups_of(model, two):
    params = list(model.parameters())
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}] if two else params


# -- gamma = 1 is SGD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_groups", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("refreshing", [True, False])
def test_gamma_one_is_bitwise_sgd_with_dropout_and_batchnorm(
    training, momentum, nesterov, weight_decay, two_groups, refreshing
):
    """Refreshes and all: they leave weights, running statistics and the random state alone."""
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    run, twin = training(noisy=True), training(noisy=True)
    optimizer = NSGD(groups_of(run.model, two_groups), **options, k=3, gamma=1.0, refresh_every=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train(run, optimizer, 8, refreshing=refreshing)
        torch.manual_seed(0)
        train(twin, SGD(groups_of(twin.model, two_groups), **options), 8)
    assert optimizer.refreshes == (4 if refreshing else 7)  # or a fold of gradients at each step but the first
    assert_bitwise(everything(run), everything(twin))


def test_the_defaults_and_positions_are_those_of_sgd(training):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), 0.1, 0.9, 0.1, 0.01, False, k=3)
    plain = SGD(twin.model.parameters(), 0.1, 0.9, 0.1, 0.01, False)
    assert {name: optimizer.defaults[name] for name in plain.defaults} == plain.defaults
    assert isinstance(optimizer, SGD)
    default = NSGD(training().model.parameters())
    assert {name: default.defaults[name] for name in plain.defaults} == SGD(twin.model.parameters()).defaults


def test_before_the_first_refresh_it_is_bitwise_sgd(training):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3, gamma=0.0, bulk_scale=0.5, warmup_steps=5)
    train(run, optimizer, 5)
    train(twin, SGD(twin.model.parameters(), lr=0.1, momentum=0.9), 5)
    assert_bitwise(everything(run), everything(twin))
    train(run, optimizer, 1)
    train(twin, SGD(twin.model.parameters(), lr=0.1, momentum=0.9), 1)
    assert not torch.equal(run.model[0].weight, twin.model[0].weight)


@pytest.mark.parametrize("curvature", ["closure", "batches"])
def test_curvature_of_another_sample_leaves_a_noisy_run_bitwise_as_it_was(training, curvature):
    def run_with(make, sample):
        run = training(noisy=True)
        optimizer = make(run.model.parameters())
        x, y = run.batches[0]
        closure = lambda: nn.functional.cross_entropy(run.model(x[:6]), y[:6])  # noqa: E731
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for i in range(4):
                optimizer.zero_grad()
                if sample is None:
                    run.loss(i).backward()
                else:
                    optimizer.backward(run.loss(i), curvature=closure if sample == "closure" else [(closure, 6)])
                optimizer.step()
        return everything(run)

    nudged = run_with(lambda params: NSGD(params, lr=0.1, k=2, gamma=1.0, refresh_every=1), curvature)
    assert_bitwise(nudged, run_with(lambda params: SGD(params, lr=0.1), None))


# -- torch's own implementations and companions ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("bulk_scale", [1.0, 0.5])
def test_foreach_and_fused_are_the_loop(training, options, bulk_scale):
    def run_with(**options):
        run = training(torch.float64)
        common = {
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "k": 3,
            "refresh_every": 2,
            "bulk_scale": bulk_scale,
        }
        train(run, NSGD(run.model.parameters(), **common, **options), 6)
        return everything(run)

    loop, fast = run_with(foreach=False), run_with(**options)
    for name in loop:  # rounding, carried on through three refreshes
        torch.testing.assert_close(loop[name], fast[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_clipping_and_zero_grad_act_before_the_damping(training, flat, basis_of, gamma, set_to_none):
    run, twin = training(torch.float64), training(torch.float64)
    optimizer, plain = NSGD(run.model.parameters(), lr=0.5, k=3, gamma=gamma), SGD(twin.model.parameters(), lr=0.5)
    train(run, optimizer, 1, before_step=lambda: clip(run), set_to_none=set_to_none)
    before = flat(training(torch.float64).model.parameters())
    train(twin, plain, 1, before_step=lambda: clip(twin), set_to_none=set_to_none)
    step, vectors = flat(twin.model.parameters()) - before, basis_of(optimizer)
    assert float(step.norm()) == pytest.approx(0.5 * 0.01, rel=1e-4)  # torch's clipping divides by norm + 1e-6
    expected = before + step + (gamma - 1.0) * (vectors @ step) @ vectors
    # Exact in float64; all three eigenvalues are positive.
    torch.testing.assert_close(flat(run.model.parameters()), expected, rtol=1e-11, atol=1e-13)
    assert min(optimizer.eigenvalues) > 0


def clip(run):
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)


SCHEDULERS = {
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.2, total_steps=10),  # cycles the momentum too
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_sgd(training, scheduler):
    run, twin = training(), training()
    optimizer = NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3, gamma=1.0, refresh_every=2)
    plain = SGD(twin.model.parameters(), lr=0.1, momentum=0.9)
    schedule, plain_schedule = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](plain)
    train(run, optimizer, 8, after_step=schedule.step)
    train(twin, plain, 8, after_step=plain_schedule.step)
    assert_bitwise(everything(run), everything(twin))
    for name in ("lr", "momentum"):
        assert optimizer.param_groups[0][name] == plain.param_groups[0][name]


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_damp_and_a_scheduler_in_either_order(training, scheduler_first):
    """No warning that the scheduler steps before the optimizer: warnings are errors here."""
    run = training()
    optimizer = SGD(run.model.parameters(), lr=0.1)
    if scheduler_first:
        schedule = StepLR(optimizer, 2, gamma=0.5)
    damp(optimizer, k=3, gamma=0.0, refresh_every=2)
    if not scheduler_first:
        schedule = StepLR(optimizer, 2, gamma=0.5)
    for i in range(4):
        optimizer.zero_grad()
        optimizer.backward(value := run.loss(i), curvature=value)
        optimizer.step()
        schedule.step()
    assert optimizer.steps == 4
    assert optimizer.refreshes == 2
    assert optimizer.alignment > 0  # the damped step is the one that ran
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.25


def test_a_scheduler_that_steps_too_early_is_still_warned_about(training):
    run = training()
    optimizer = SGD(run.model.parameters(), lr=0.1)
    schedule = StepLR(optimizer, 2)
    damp(optimizer, k=3)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        schedule.step()


# -- closures and hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("refreshing", [True, False])
def test_a_closure_is_called_once_and_damps_the_same_step(training, flat, refreshing):
    def start():
        run = training()
        return run, NSGD(run.model.parameters(), lr=0.1, momentum=0.9, k=3, gamma=0.0)

    run, optimizer = start()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = run.loss(0)
        optimizer.backward(loss, curvature=loss) if refreshing else loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert calls == [True]
    twin, twin_optimizer = start()
    train(twin, twin_optimizer, 1, refreshing=refreshing)
    assert_bitwise(everything(run), everything(twin))


def test_the_loss_of_a_closure_comes_back_as_it_is(training):
    optimizer = NSGD(training().model.parameters(), k=3)
    loss = torch.tensor(3.0)
    assert optimizer.step(lambda: loss) is loss
    assert optimizer.step(lambda: None) is None
    assert optimizer.step() is None


HOOKED = """
import torch, copy
from torch import nn
from nsgd import NSGD, damp

class Mine(NSGD):
    pass

def make(name, params):
    return {"nsgd": NSGD, "mine": Mine, "adamw": lambda p, **o: damp(torch.optim.AdamW(p), **o)}[name](params, k=1)

for name in ORDER:
    if name == "plain":
        torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        continue
    weight = nn.Parameter(torch.ones(2))
    made = make(name, [weight])
    for optimizer in (made, copy.deepcopy(made)):
        weight = optimizer.param_groups[0]["params"][0]
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_: seen.append("post"))
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(value := weight.square().sum(), curvature=value)
            optimizer.step()
        assert seen == ["pre", "post"] * 2, (name, seen)
"""


@pytest.mark.parametrize(
    "order", [["nsgd", "plain", "nsgd"], ["plain", "nsgd", "mine"], ["mine", "nsgd", "adamw", "plain", "adamw", "mine"]]
)
def test_step_hooks_run_once_whatever_was_made_before(order):
    """In a process of its own: torch patches an optimizer's class when the first one of it is made."""
    code = HOOKED.replace("ORDER", repr(order))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_import_is_light():
    code = "import sys, nsgd; print([m for m in ('pytorch_lightning', 'lightning', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
