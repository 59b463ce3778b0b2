"""Faults in training, each really injected: parameters are finite or as SGD's, and everything else is as found."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traces import assert_untouched, random_states, same_random_states, snapshot

from nsgd import NSGD, sample_losses

GRADIENTS, AT_ONCE, ONE_BY_ONE, PRODUCTS = "gradients", "samples at once", "samples one by one", "products"
SOURCES = (GRADIENTS, AT_ONCE, ONE_BY_ONE, PRODUCTS)
STEPS, K, MANY = 14, 3, 30
NAN, INF = math.nan, math.inf


class Net(nn.Module):
    """With BatchNorm's buffers, dropout's draws, and parameters at rest that a fault may act through."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 3))
        self.rest = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.rest.sum()


class Loop:
    """A loop of torch with GradScaler, or without, from one source of directions; a fault is put into its steps."""

    def __init__(self, source: str, *, scaled: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.source, self.model = source, Net()
        solver = {GRADIENTS: {}, PRODUCTS: {"solver": "lanczos"}}.get(source, {"solver": "gradients"})
        every = {} if source == GRADIENTS else {"refresh_every": 2}
        self.optimizer = NSGD(self.model.parameters(), lr=0.05, momentum=0.9, k=K, **{**solver, **every, **options})
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=scaled)
        self.generator = torch.Generator().manual_seed(1)

    def batch(self, n: int = 12) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 6, generator=self.generator), torch.randint(3, (n,), generator=self.generator)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def refresh(self, batch: tuple[Tensor, ...], loss_of: Any, loss: Tensor) -> bool:
        """What a user calls before the backward pass; all but the directions is as found."""
        found, random_state = snapshot(self.model), random_states()
        try:
            if self.source == PRODUCTS:
                return self.optimizer.refresh_if_due(loss)
            if self.source == GRADIENTS:
                return False
            module = self.model if self.source == AT_ONCE else None
            return self.optimizer.refresh_if_due(sample_losses(loss_of, *batch, group_size=4, module=module))
        finally:
            assert_untouched(self.model, found)
            same_random_states(random_state)

    def step(self, loss_of: Any = None, *, n: int = 12, spoil: Any = None) -> None:
        """A step on n samples; ``spoil`` gets the parameters after the backward pass."""
        batch, loss_of = self.batch(n), loss_of or self.loss
        self.optimizer.zero_grad()
        loss = loss_of(*batch)
        self.refresh(batch, loss_of, loss)
        self.scaler.scale(loss).backward()
        if spoil is not None:
            spoil(list(self.model.parameters()))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def check(self) -> None:
        """Parameters and directions are finite, and directions orthonormal."""
        params = list(self.model.parameters())
        assert all(bool(p.isfinite().all()) for p in params)
        vectors = self.optimizer.directions(params)
        assert len(vectors) == K
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(K), rtol=0, atol=1e-4)


def steps_of(request: pytest.FixtureRequest, source: str) -> list[int]:
    """Some steps at random, others for each source; all of them in the slow form."""
    if request.node.get_closest_marker("slow"):
        return list(range(MANY))
    return sorted(random.Random(source).sample(range(STEPS), 4))


SPANS = [pytest.param("quick"), pytest.param("every step", marks=pytest.mark.slow)]


def spoiled(value: float) -> Any:
    def spoil(params: list[Tensor]) -> None:
        params[1].grad[1, 2] = value

    return spoil


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_step_that_is_left_out_leaves_no_trace(request, record_property, source, where, value, span):
    """GradScaler leaves a step out whose gradients are not finite; the loss is refreshed from as well."""
    for at in steps_of(request, source):
        record_property(f"reliability: NaN or infinite {where}", 1)
        loop = Loop(source, scaled=True)

        def bad(x: Tensor, y: Tensor, loop: Loop = loop) -> Tensor:
            return loop.loss(x, y) * value

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(max(STEPS, at + 8)):
                faulty = i == at
                before = [p.detach().clone() for p in loop.model.parameters()]
                spoil = spoiled(value) if faulty and where == "gradient" else None
                loop.step(bad if faulty and where == "loss" else None, spoil=spoil)
                if faulty:
                    assert all(map(torch.equal, before, loop.model.parameters()))
        loop.check()
        said = [str(warning.message) for warning in caught]
        assert len(said) == loop.optimizer.skipped_refreshes
        assert all(
            message.startswith(f"refresh skipped at step {at}, the last directions are kept") for message in said
        )
        refreshed = source != GRADIENTS and where == "loss" and at % 2 == 0
        assert len(said) == refreshed


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("source", SOURCES)
def test_a_step_that_is_made_all_the_same_spoils_what_sgd_would(request, record_property, source, value, span):
    for at in steps_of(request, source):
        record_property("reliability: NaN or infinite gradient", 1)
        loop = Loop(source)
        for i in range(at + 1):
            before = [p.detach().clone() for p in loop.model.parameters()]
            velocities = [loop.optimizer.state[p].get("momentum_buffer") for p in loop.model.parameters()]
            velocities = [None if v is None else v.clone() for v in velocities]
            loop.step(spoil=spoiled(value) if i == at else None)
        grads = [p.grad for p in loop.model.parameters()]
        for p, old, v, g in zip(loop.model.parameters(), before, velocities, grads, strict=True):
            step = -0.05 * (g if v is None else 0.9 * v + g)
            assert torch.equal((old + step).isfinite(), p.isfinite())
        with torch.no_grad():  # back to what was before, and on
            for p, old in zip(loop.model.parameters(), before, strict=True):
                p.copy_(old)
                loop.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        for _ in range(12):
            loop.step()
        loop.check()


@pytest.mark.parametrize("span", SPANS)
def test_a_product_that_is_not_finite_skips_the_refresh(request, record_property, span):
    """The derivative of |x|^1.5 is 0 at 0, and its second derivative infinite."""
    for at in steps_of(request, PRODUCTS):
        record_property("reliability: product that is not finite", 1)
        loop = Loop(PRODUCTS, refresh_every=1)

        def bad(x: Tensor, y: Tensor, loop: Loop = loop) -> Tensor:
            still = loop.model.rest - loop.model.rest.detach()
            return loop.loss(x, y) + still.abs().pow(1.5).sum()

        for _ in range(at):
            loop.step()
        before = loop.optimizer.directions(loop.model.parameters())
        with pytest.warns(UserWarning, match="refresh skipped"):
            loop.step(bad)
        assert loop.optimizer.skipped_refreshes == 1
        assert torch.equal(before, loop.optimizer.directions(loop.model.parameters()))
        for _ in range(3):
            loop.step()
        loop.check()


@pytest.mark.parametrize("flat", ["zero gradients", "constant loss"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:the gradients of the samples are all zero")
def test_where_nothing_moves_sgd_nothing_moves(record_property, source, flat):
    record_property(f"reliability: steps with {flat}", STEPS)
    loop = Loop(source)
    found = [p.detach().clone() for p in loop.model.parameters()]

    def still(x: Tensor, y: Tensor) -> Tensor:
        return loop.loss(x, y) * 0.0 if flat == "zero gradients" else (loop.model(x) * 0.0).sum() + 1.0

    for _ in range(STEPS):
        loop.step(still)
    assert all(map(torch.equal, found, loop.model.parameters()))
    for _ in range(STEPS):
        loop.step()
    loop.check()
    now = dict(loop.model.named_parameters())
    moved = [name for p, name in zip(found, now, strict=True) if not torch.equal(p, now[name])]
    # Those at rest, and a bias before BatchNorm, have no gradient but for rounding.
    assert {*moved, "rest", "net.0.bias"} == set(now)


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_of_one_trains_or_is_refused_for_samples(record_property, source):
    record_property("reliability: batches of one", 2 * STEPS)
    loop = Loop(source)
    loop.model.eval()  # a batch of one has no statistics
    for i in range(2 * STEPS):
        if source in (AT_ONCE, ONE_BY_ONE) and i % 2 == 0:
            with pytest.raises(
                ValueError, match=r"losses of two or more groups of samples, got 1: .*split the samples"
            ):
                loop.step(n=1)
            loop.step()
        else:
            loop.step(n=1)
    loop.check()


class Stop(Exception):
    """A user's own."""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("at", [0, 1, 6])
def test_an_exception_in_the_loss_of_a_refresh_is_the_users_and_the_run_goes_on_as_if_it_had_not_been(
    record_property, source, at
):
    record_property("reliability: exceptions in a loss", int(source != GRADIENTS))
    ends = []
    for faulty in (True, False):
        loop = Loop(source)
        for i in range(STEPS):
            if faulty and i == at and source != GRADIENTS:

                def stops(x: Tensor, y: Tensor, loop: Loop = loop) -> Tensor:
                    loop.loss(x, y)
                    loop.model.eval()
                    raise Stop

                found, random_state = snapshot(loop.model), random_states()
                module = loop.model if source == AT_ONCE else None
                batch = torch.ones(12, 6), torch.zeros(12, dtype=torch.long)
                losses = sample_losses(stops, *batch, group_size=4, module=module)
                with pytest.raises(Stop):
                    loop.optimizer.refresh(losses if source != PRODUCTS else losses[0][0])
                assert_untouched(loop.model, found)
                same_random_states(random_state)
            loop.step()
        ends.append([p.detach().clone() for p in loop.model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("late", [True, False])  # after its backward pass, or before
def test_an_exception_in_the_closure_of_a_step_is_the_users_and_the_run_goes_on(record_property, late):
    for at in (0, 1, 6, 13):
        record_property("reliability: exceptions in a closure", 1)
        loop = Loop(GRADIENTS)
        for i in range(STEPS + 4):
            x, y = loop.batch()

            def closure(x: Tensor = x, y: Tensor = y, fails: bool = i == at, loop: Loop = loop) -> Tensor:
                loop.optimizer.zero_grad()
                loss = loop.loss(x, y)
                if fails and not late:
                    raise Stop
                loss.backward()
                if fails:
                    raise Stop
                return loss

            before = [p.detach().clone() for p in loop.model.parameters()]
            if i == at:
                with pytest.raises(Stop):
                    loop.optimizer.step(closure)
                assert all(map(torch.equal, before, loop.model.parameters()))
            else:
                loop.optimizer.step(closure)
        loop.check()


@pytest.mark.parametrize("source", [ONE_BY_ONE, PRODUCTS])
def test_out_of_memory_at_a_refresh_is_torchs_error_and_the_run_goes_on(record_property, source):
    """Where there are no chunks to halve; those of samples at once are in directions/test_chunks.py."""
    loop = Loop(source, refresh_every=1)
    for i in range(STEPS):
        if i in (0, 3, 9):

            def full(x: Tensor, y: Tensor, loop: Loop = loop) -> Tensor:
                loop.loss(x, y)
                raise torch.OutOfMemoryError("CUDA out of memory")

            found, random_state = snapshot(loop.model), random_states()
            losses = sample_losses(full, *loop.batch(), group_size=4)
            with pytest.raises(torch.OutOfMemoryError):
                loop.optimizer.refresh(losses if source == ONE_BY_ONE else losses[0][0])
            assert_untouched(loop.model, found)
            same_random_states(random_state)
            record_property("reliability: out of memory", 1)
        loop.step()
    loop.check()
