"""torch.distributed.checkpoint into a fresh optimizer: a resumed run is bitwise the uninterrupted one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW

from nsgd import NSGD, damp, sample_losses

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

MAKERS = {
    "differences": lambda params: NSGD(params, lr=0.1, momentum=0.9, k=4),
    "differences, stateless base": lambda params: NSGD(params, lr=0.1, k=4),
    "bfloat16": lambda params: NSGD(params, lr=0.1, k=4, basis_dtype=torch.bfloat16),
    "passes": lambda params: NSGD(params, lr=0.1, momentum=0.9, k=4),
    "samples": lambda params: NSGD(params, lr=0.1, momentum=0.9, k=4, solver="gradients", refresh_every=2),
    "samples, auto": lambda params: NSGD(params, lr=0.1, momentum=0.9, k=4, refresh_every=2),
    "products": lambda params: NSGD(params, lr=0.1, momentum=0.9, k=4, solver="lanczos", refresh_every=2),
    "adamw": lambda params: damp(AdamW(params, lr=0.01), k=4),
    "no basis": lambda params: NSGD(params, lr=0.1, momentum=0.9, k=4, save_basis=False),
}


def made(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, MAKERS[name](model.parameters())


def train(name, model, optimizer, first, last):
    for i in range(first, last):
        generator = torch.Generator().manual_seed(i)
        x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        if name.startswith("samples"):
            optimizer.refresh_if_due(sample_losses(lambda x, y: cross_entropy(model(x), y), x, y))
        loss = cross_entropy(model(x), y)
        if name == "products":
            optimizer.refresh_if_due(loss)
        if name == "passes":
            for part in range(2):
                (cross_entropy(model(x[part::2]), y[part::2]) / 2).backward()
        else:
            loss.backward()
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("stop", [1, 3, 25])  # before the first fold, between two, with rows that wait
def test_a_run_that_goes_on_from_its_files_is_bitwise_the_one_that_never_stopped(tmp_path, name, flat, stop):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = made(name)
    train(name, model, optimizer, 0, stop)
    checkpoint.save({"o": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)
    twin, other = made(name)
    twin.load_state_dict(model.state_dict())
    held = {"o": get_optimizer_state_dict(twin, other, options=options)}
    checkpoint.load(held, checkpoint_id=tmp_path)
    set_optimizer_state_dict(twin, other, held["o"], options=options)
    if name == "no basis":
        assert (other.weights, other.steps) == ((), stop)
        return
    assert other.weights == optimizer.weights
    assert torch.equal(other.directions(twin.parameters()), optimizer.directions(model.parameters()))
    train(name, model, optimizer, stop, stop + 12)
    train(name, twin, other, stop, stop + 12)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert (other.weights, other.refreshes) == (optimizer.weights, optimizer.refreshes)
    assert optimizer.refreshes > 0


@pytest.mark.parametrize("make", [lambda p: NSGD(p, lr=0.1, k=2), lambda p: damp(Adam(p, lr=0.1), k=2)])
def test_steps_at_rate_zero_before_training_leave_the_state_to_the_base_optimizer(make):
    """As of a warm-up that begins at 0, where a parameter has no gradient until later."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    twin = copy.deepcopy(model)
    optimizer, plain = make(model.parameters()), type(make(twin.parameters())).__bases__[-1](twin.parameters(), lr=0.1)
    for built, o in ((model, optimizer), (twin, plain)):
        for rate, first in ((0.0, 1), (0.0, 0), (0.1, 0), (0.1, 0)):
            o.param_groups[0]["lr"] = rate
            x = torch.ones(3, 2)
            o.zero_grad()
            for layer in built[first:]:
                x = layer(x)
            x.sum().backward()
            o.step()
    assert optimizer.steps == 2
    assert all(
        optimizer.state[p].keys() == plain.state[q].keys()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert "nsgd_version" not in optimizer.param_groups[0]


def test_what_is_not_there_takes_no_place_in_a_file():
    def size(optimizer):
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        return buffer.tell()

    parameter = nn.Parameter(torch.ones(100_000))
    optimizer = NSGD([parameter], lr=0.1, k=2)
    assert size(optimizer) < 10_000
    optimizer.refresh([(lambda: (parameter[:9] ** 2).sum(), 1), (lambda: parameter[9:].sum(), 1)])
    assert 800_000 < size(optimizer) < 820_000  # k directions in float32, and none of the rows of differences


def test_a_plain_checkpoint_in_the_place_of_directions_is_said():
    model, optimizer = made("differences")
    plain = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train("differences", model, optimizer, 0, 12)
    with pytest.warns(UserWarning, match="the checkpoint has no directions: those of this optimizer begin anew"):
        optimizer.load_state_dict(plain.state_dict())
    assert optimizer.weights == ()
