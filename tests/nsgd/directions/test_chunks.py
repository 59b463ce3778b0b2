"""Gradients of samples in chunks: the same whatever the chunk size, and memory that it bounds."""

from __future__ import annotations

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
        ({"chunk_size": 0}, "expected a chunk_size of at least 1, or None for what 1 GiB holds, got 0"),
        ({"chunk_size": 2.0}, "expected a chunk_size of at least 1, .*got 2.0"),
        ({"chunk_size": True}, "expected a chunk_size of at least 1, .*got True"),
        ({"chunk_size": 4, "module": None}, "expected no chunk_size without module, got 4: .*leave it out"),
    ],
)
def test_a_chunk_size_that_cannot_be_is_refused(options, message):
    case = Case()
    with pytest.raises(ValueError, match=message):
        sample_losses(case.loss, case.x, case.y, **{"module": case.model, **options})
