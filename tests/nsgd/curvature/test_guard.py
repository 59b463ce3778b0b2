"""A measurement leaves everything as it found it, and holds nothing afterwards."""

from __future__ import annotations

import contextlib
import random
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from traces import assert_untouched, random_states, same_random_states, snapshot

from nsgd.curvature.guard import full_precision, untouched
from nsgd.curvature.hessian import loss_hessian
from nsgd.directions.samples import gradient_moment


def dense(hvp, size):
    return torch.stack([hvp(row) for row in torch.eye(size, dtype=torch.float64)])


# -- everything as found --------------------------------------------------------------------------------------


def sources(model, losses):
    return {"closure": losses[0][0], "batches": losses}


@pytest.mark.parametrize("source", ["closure", "batches"])
@pytest.mark.parametrize("fails", [False, True])
def test_grad_buffers_modes_parameters_and_random_state_stay_as_found(noisy, source, fails):
    model, losses = noisy
    model.net[1].eval()  # a mixture of modes
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    before, states = snapshot(model), random_states()

    def failing():
        model(torch.ones(3, 4, dtype=torch.float64)).sum()
        raise KeyError("inside")

    given = sources(model, losses)[source]
    if fails:
        with (
            pytest.raises(KeyError),
            loss_hessian(failing if source == "closure" else [(failing, 1)], model.parameters()),
        ):
            pass
    else:
        with loss_hessian(given, model.parameters()) as hessian:
            hessian.hvp(torch.ones_like(hessian.gradient))
    assert_untouched(model, before)
    same_random_states(states)


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_of_groups_leave_everything_as_found(noisy, fails):
    model, losses = noisy
    model.net[1].eval()
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)
    before, states = snapshot(model), random_states()

    def failing():
        losses[0][0]()
        model.eval()
        raise KeyError("inside")

    with pytest.raises(KeyError) if fails else torch.no_grad():
        gradient_moment([*losses, (failing, 1)] if fails else losses, list(model.parameters()))
    assert_untouched(model, before)
    same_random_states(states)


def test_a_given_loss_leaves_grad_and_random_state_as_found(noisy):
    model, losses = noisy
    loss = losses[0][0]()
    before, states = snapshot(model), random_states()
    with contextlib.suppress(KeyError), loss_hessian(loss, model.parameters()) as hessian:
        hessian.hvp(torch.ones_like(hessian.gradient))
        raise KeyError
    assert_untouched(model, before)
    same_random_states(states)


@pytest.mark.parametrize("fails", [False, True])
def test_untouched_restores_buffers_modes_and_random_state(noisy, fails):
    model, losses = noisy
    model.net[2].eval()
    before, states = snapshot(model), random_states()
    with pytest.raises(KeyError) if fails else torch.enable_grad(), untouched(model):
        losses[0][0]()
        model.eval()
        model.net[1].running_mean.add_(1.0)
        model.net[1].num_batches_tracked = torch.tensor(99)
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        if fails:
            raise KeyError
    assert_untouched(model, before)
    same_random_states(states)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("source", ["closure", "batches", "groups"])
def test_a_loss_that_evaluates_before_its_first_forward_pass_leaves_modes_as_found(noisy, source, fails):
    model, losses = noisy
    model.net[1].eval()  # a mixture of modes
    before, states, train = snapshot(model), random_states(), nn.Module.train

    def evaluated(of_loss):
        model.eval()
        model.net[2].train()
        if fails:
            raise KeyError("inside")
        return of_loss()

    given = [(lambda of_loss=of_loss: evaluated(of_loss), n) for of_loss, n in losses]
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        if source == "groups":
            gradient_moment(given, list(model.parameters()))
        else:
            with loss_hessian(given[0][0] if source == "closure" else given, model.parameters()) as hessian:
                hessian.hvp(torch.ones_like(hessian.gradient))
    assert_untouched(model, before)
    same_random_states(states)
    assert nn.Module.train is train


def test_guards_inside_each_other_leave_modes_as_found_and_what_others_put_in_place_of_train(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    calls, train = [], nn.Module.train
    monkeypatch.setattr(nn.Module, "train", lambda module, mode=True: calls.append(mode) or train(module, mode))
    others = nn.Module.train
    with untouched():
        model[1].eval()
        with untouched():
            model.eval()
            assert not model.training
        assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert all(m.training for m in model.modules())
    assert nn.Module.train is others
    assert len(calls) == 4  # of the parts, and the two of the whole's children


def test_a_measurement_between_forward_and_backward_does_not_spoil_the_backward(noisy):
    """The buffers that the first graph has saved are not written to: torch would raise an in-place error."""
    model, losses = noisy
    model.eval()  # BatchNorm's backward then needs the running statistics
    loss = losses[0][0]()
    model.train()
    with loss_hessian(losses, model.parameters()) as hessian:
        hessian.hvp(torch.ones_like(hessian.gradient))
    loss.backward()


@pytest.mark.parametrize("problem", ["tanh_mlp", "conv_batchnorm"], indirect=True)
def test_backward_of_the_loss_still_works_and_is_bitwise_the_same(problem):
    problem.loss().backward()
    expected = [p.grad for p in problem.params]
    problem.model.zero_grad()
    loss = problem.loss()
    with loss_hessian(loss, problem.params) as hessian:
        hessian.hvp(torch.ones_like(hessian.gradient))
    assert all(p.grad is None for p in problem.params)
    loss.backward()
    for p, grad in zip(problem.params, expected, strict=True):
        assert torch.equal(p.grad, grad)
        assert p.grad.grad_fn is None


# -- the graph's end ------------------------------------------------------------------------------------------


class Witness:
    """Lives as long as the graph that it was put into."""


class Identity(torch.autograd.Function):
    """A node that holds a witness."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.witness = Witness()
        Identity.alive.add(ctx.witness)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Square(torch.autograd.Function):
    """x^2, with a witness in the graph of its gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * Identity.apply(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_graph_of_the_gradient_is_freed_at_the_end_even_if_the_product_is_kept(fails):
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    loss = Square.apply(weight).sum()
    kept = []
    with contextlib.suppress(KeyError), loss_hessian(loss, [weight]) as hessian:
        kept.append(hessian)
        torch.testing.assert_close(dense(hessian.hvp, 3), 2 * torch.eye(3, dtype=torch.float64))
        assert len(Identity.alive) == 1  # the graph is there while it is open
        if fails:
            raise KeyError
    assert len(Identity.alive) == 0
    with pytest.raises(RuntimeError, match="inside `with loss_hessian"):
        kept[0].hvp(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("several", [False, True])
def test_the_graph_of_a_closure_is_freed_at_the_end(several):
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    calls = []

    def closure():
        calls.append(1)
        return Identity.apply(weight).exp().sum()

    with loss_hessian([(closure, 1)] if several else closure, [weight]) as hessian:
        hessian.hvp(torch.ones(3, dtype=torch.float64))
        hessian.hvp(torch.ones(3, dtype=torch.float64))
        # Over several batches no graph outlives its product.
        assert len(Identity.alive) == (0 if several else 1)
    assert len(calls) == (3 if several else 1)
    assert len(Identity.alive) == 0


# -- precision ------------------------------------------------------------------------------------------------

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def precisions():
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture
def settings():
    """The global settings of float32 products are put back afterwards."""
    found, everywhere = precisions(), torch.backends.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = everywhere
    for backend, precision in zip(BACKENDS, found, strict=True):
        backend.fp32_precision = "none"
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision
    assert (precisions(), torch.backends.fp32_precision) == (found, everywhere)


def everywhere(precision):
    for backend in BACKENDS:
        backend.fp32_precision = "none"
    torch.backends.fp32_precision = precision


def by_backend(cuda, mkldnn):
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = cuda, mkldnn


PRECISIONS = {
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32 everywhere": lambda: everywhere("tf32"),
    "ieee everywhere": lambda: everywhere("ieee"),
    "tf32 on cuda": lambda: by_backend("tf32", "ieee"),
    "bf16 on mkldnn": lambda: by_backend("ieee", "bf16"),
    "tf32 on both": lambda: by_backend("tf32", "tf32"),
    "as found": lambda: None,
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.usefixtures("settings")
def test_products_of_float32_are_not_rounded_inside_and_settings_stay_as_found(precision, fails):
    PRECISIONS[precision]()
    before, inside = precisions(), []

    @full_precision
    def function():
        inside.append(precisions())
        if fails:
            raise KeyError("inside")
        return 3

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        assert function() == 3
    assert not {"tf32", "bf16"} & set(inside[0])
    assert precisions() == before


@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
@pytest.mark.usefixtures("settings")
def test_the_legacy_setting_reads_as_before(precision):
    torch.set_float32_matmul_precision(precision)
    full_precision(lambda: None)()
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("first", ["tf32", "ieee"])
@pytest.mark.usefixtures("settings")
def test_a_setting_for_all_backends_is_still_followed_afterwards(first):
    everywhere(first)
    full_precision(lambda: None)()
    for later in ("ieee", "tf32", "ieee"):
        torch.backends.fp32_precision = later
        assert precisions() == [later, later]
