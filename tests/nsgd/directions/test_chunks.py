"""Gradients of samples in chunks: the same whatever the chunk size, and memory that it bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sample_cases import Case, assert_equal
from torch import nn
from torch.nn import functional as F

from nsgd import NSGD, sample_losses
from nsgd.directions import samples
from nsgd.directions.samples import gradient_moment


@pytest.mark.parametrize("net", ["mlp", "conv", "transformer", "weighted", "batch_norm"])
@pytest.mark.parametrize("group_size", [1, 4])  # 10 samples: two whole groups of 4 and a last one of 2
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 10, 99])
def test_gradients_are_the_same_whatever_the_chunk_size(net, group_size, chunk_size):
    if net == "batch_norm" and group_size == 1:
        group_size = 2
    case = Case(net)
    losses = sample_losses(case.loss, case.x, case.y, group_size=group_size, module=case.model, chunk_size=chunk_size)
    expected = gradient_moment(case.losses(False, group_size), case.params)
    assert_equal(gradient_moment(losses, case.params), expected, 1e-12)


def test_so_many_groups_are_computed_at_once(monkeypatch, groups_at_once):
    case = Case()

    for chunk_size in (4, None):
        gradient_moment(sample_losses(case.loss, case.x, case.y, module=case.model, chunk_size=chunk_size), case.params)
    size = sum(p.numel() for p in case.params)
    monkeypatch.setattr(samples, "_MOST_AT_ONCE", 3 * size + 1)  # by default, what so many entries are the gradients of
    gradient_moment(case.losses(), case.params)
    monkeypatch.setattr(samples, "_MOST_AT_ONCE", size // 2)
    gradient_moment(case.losses(), case.params)
    assert groups_at_once == [4, 4, 2, 10, 3, 3, 3, 1, *[1] * 10]


@pytest.fixture
def little_memory(monkeypatch):
    """Memory for the gradients of three samples at once, and an error for more, which can be chosen."""
    tried, run = [], samples.vmap
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]

    def small(function, **options):
        def inner(*args):
            tried.append(len(args[-1]))
            torch.rand(3)  # draws are made before it is noticed
            if tried[-1] > 3:
                raise errors[0]
            return run(function, **options)(*args)

        return inner

    monkeypatch.setattr(samples, "vmap", small)
    return tried, errors


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_where_memory_ends_fewer_are_taken_at_once_with_the_same_result(record_property, little_memory, error):
    record_property("reliability: out of memory", 1)
    tried, errors = little_memory
    errors[0] = error
    case = Case("batch_norm_eval")
    with pytest.warns(
        UserWarning, match=r"^out of memory with more groups .* 3 of 10 were taken .*chunk_size=3"
    ) as said:
        found = gradient_moment(case.losses(), case.params)
    assert said[0].filename == __file__
    assert tried == [10, 5, 3, 3, 3, 1]
    assert_equal(found, gradient_moment(case.losses(False), case.params), 1e-12)


def test_too_little_memory_is_said_once_by_an_optimizer(little_memory):
    case = Case("mlp", dtype=torch.float32)
    optimizer = NSGD(case.params, lr=0.1, k=3, solver="gradients", refresh_every=1)
    with pytest.warns(UserWarning, match="out of memory") as said:
        assert all(optimizer.refresh(case.losses()) for _ in range(4))
    assert [warning.filename for warning in said] == [__file__]
    assert optimizer.refreshes == 4
    assert len(optimizer.weights) == 3


def test_no_memory_for_a_single_group_is_torchs_error_and_leaves_everything_as_found(monkeypatch):
    def none(function, **options):
        def inner(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return inner

    monkeypatch.setattr(samples, "vmap", none)
    case = Case("batch_norm")
    found, random_state = [t.clone() for t in case.model.state_dict().values()], torch.get_rng_state()
    optimizer = NSGD(case.params, lr=0.1, k=3, solver="gradients")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        optimizer.refresh(case.losses(group_size=2))
    assert all(torch.equal(a, b) for a, b in zip(found, case.model.state_dict().values(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    assert optimizer.refreshes == 0
    assert all(p.grad is None for p in case.params)


def peak_memory(action):
    """Bytes that torch held at most on the CPU, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    held, most = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_a_refresh_takes_a_row_for_each_group_and_what_a_chunk_takes():
    """In multiples of the parameters: 32 rows, k of the basis where that is made, and a few for each of a chunk."""
    model = nn.Sequential(nn.Linear(300, 1000), nn.Tanh(), nn.Linear(1000, 10))
    size = 4 * sum(p.numel() for p in model.parameters())
    x, y, peaks = torch.randn(32, 300), torch.randint(10, (32,)), {}
    for chunk_size in (1, 4, 32):
        optimizer = NSGD(model.parameters(), lr=0.1, k=5, solver="gradients")
        losses = sample_losses(lambda x, y: F.cross_entropy(model(x), y), x, y, module=model, chunk_size=chunk_size)
        optimizer.refresh(losses)
        peaks[chunk_size] = peak_memory(lambda o=optimizer, losses=losses: o.refresh(losses)) / size
    assert 33 <= peaks[1] < 35
    assert 36 <= peaks[4] < 42
    assert 64 <= peaks[32] < 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"chunk_size": 0},
            "expected chunk_size to be None for what 1 GiB holds, or a whole number of at least 1, got 0",
        ),
        ({"chunk_size": 2.0}, "expected chunk_size .*got 2.0"),
        ({"chunk_size": True}, "expected chunk_size .*got True"),
        ({"chunk_size": 4, "module": None}, "expected no chunk_size without module, got 4: .*leave it out"),
    ],
)
def test_a_chunk_size_that_cannot_be_is_refused(options, message):
    case = Case()
    with pytest.raises(ValueError, match=message):
        sample_losses(case.loss, case.x, case.y, **{"module": case.model, **options})


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_counts_of_other_libraries_are_taken(kind):
    net = nn.Linear(3, 1)
    losses = sample_losses(
        lambda x: net(x).mean(), torch.zeros(5, 3), group_size=kind(2), module=net, chunk_size=kind(1)
    )
    assert [count for _, count in losses] == [2, 2, 1]
    assert [type(losses.group_size), type(losses.chunk_size)] == [int, int]
