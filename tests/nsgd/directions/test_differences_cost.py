"""What directions from training gradients cost: launches, waits, memory."""

from __future__ import annotations

import gc

import pytest
import torch
from calls import Calls
from given import MAKERS, plain_loop
from torch import nn
from torch.optim import SGD, Adam
from torch.profiler import ProfilerActivity, profile

from nsgd import NSGD, damp

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
    # But whether a fold is good, of the numbers that the host has then.
    assert {name: calls.seen[name] for name in WAITS if calls.seen[name]} == {
        "_local_scalar_dense": optimizer.refreshes
    }


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
