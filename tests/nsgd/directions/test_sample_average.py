"""The running average of samples' gradients: against dense sums in float64, and without a look at the device."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nsgd import NSGD, sample_losses
from nsgd.curvature import guard, low_rank
from nsgd.curvature.small import inverse_root, orthogonal_iteration
from nsgd.directions import doubts, refresh
from nsgd.directions.flat import blocks_of
from nsgd.directions.sample_average import Cleaned, Past, centred, cleaned, fold

SIZES = (14, 9)


class Average:
    """Two blocks, of float32 and of what the test wants, beside the dense average in float64."""

    def __init__(self, second=torch.float64, k=4, decay=0.9):
        dtypes = (torch.float32, second)
        params = [nn.Parameter(torch.zeros(n, dtype=d)) for n, d in zip(SIZES, dtypes, strict=True)]
        self.blocks, self.k, self.decay = blocks_of(list(enumerate(params)), None), k, decay
        self.weights = torch.zeros(0, dtype=torch.float64)
        self.past = Past(*torch.zeros(2, dtype=torch.float64))
        self.dense, self.count, self.usual = np.zeros((23, 23)), 0, 0.0

    def add(self, gradients, values=None, counts=None):
        """One estimate more, (m, P) in float64; returns what was found of it."""
        m = len(gradients)
        counts = torch.ones(m, dtype=torch.float64) if counts is None else counts
        values = torch.zeros(m) if values is None else values
        sizes = [block.size for block in self.blocks]
        rows = [part.to(b.dtype) for part, b in zip(gradients.split(sizes, 1), self.blocks, strict=True)]
        new = cleaned(rows, values, counts)
        found = fold(self.blocks, rows, new, self.weights, self.past, decay=self.decay, k=self.k)
        self.weights, self.past = found.weights, found.past
        return new, found

    def expect(self, gradients, counts):
        """The same by NumPy, cut to rank k, as (P, P)."""
        gradients, shares = gradients.numpy(), (counts / counts.sum()).numpy()
        moment = (gradients.T * shares) @ gradients
        share = min(self.decay, 1 - 1 / (self.count + 1))
        if share > 0 and np.trace(moment) > 2 * self.usual:
            moment *= 2 * self.usual / np.trace(moment)
        self.usual = (self.usual + np.trace(moment)) / 2 if share > 0 else np.trace(moment)
        self.count += 1
        values, columns = np.linalg.eigh(share * self.dense + (1 - share) * moment)
        top = slice(-self.k, None)
        self.dense = (columns[:, top] * values[top]) @ columns[:, top].T
        return self.dense

    def found(self):
        rows = torch.cat([block.basis.double() for block in self.blocks], 1).numpy()
        return (rows.T * self.weights.numpy()) @ rows


def draws(count, seed, rank=6):
    """Gradients of a few directions, the first of which are a hundred times the last."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(23, 23, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q
    sizes = torch.logspace(0, -2, rank, dtype=torch.float64)
    return torch.randn(count, rank, generator=generator, dtype=torch.float64) * sizes @ axes[:rank]


# -- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [torch.float64, torch.float32], ids=["two blocks", "one block"])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25], ids=str)  # whose squares float32 does not hold
@pytest.mark.parametrize("decay", [0.9, 0.3, 0.0])
def test_it_is_the_dense_average_at_any_scale(second, scale, decay):
    average = Average(second, decay=decay)
    for i in range(6):
        gradients = scale * (20.0 if i == 3 else 1.0) * draws(8, i)
        counts = torch.tensor([4.0] * 7 + [1.0], dtype=torch.float64)
        expected = average.expect(gradients, counts)
        new, _ = average.add(gradients, counts=counts)
        assert bool(new.good)
        # The gradients are rounded to float32, and so are their inner products.
        np.testing.assert_allclose(average.found(), expected, rtol=0, atol=3e-6 * np.abs(expected).max())
        assert float(average.past.usual) == pytest.approx(average.usual, rel=1e-5)
    assert float(average.past.count) == (6 if decay else 1)


@pytest.mark.parametrize("unknown", [[], [2], [0, 1, 2, 3, 4, 5]])
def test_groups_without_a_label_count_for_nothing(unknown):
    average, other = Average(), Average()
    gradients, values = draws(8, 0), torch.zeros(8)
    values[unknown] = math.nan
    broken = gradients.clone()
    broken[unknown] = math.nan
    kept = [i for i in range(8) if i not in unknown]
    new, _ = average.add(broken, values)
    other.add(gradients[kept])
    assert bool(new.good)
    np.testing.assert_allclose(average.found(), other.found(), rtol=0, atol=1e-6 * np.abs(other.found()).max())


@pytest.mark.parametrize("unknown", [[], [2], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("common", [0.0, 1.0, 1e3])
def test_what_is_centred_is_the_covariance_of_the_groups_that_are_known(unknown, common):
    gradients, values = draws(8, 0) + common * draws(1, 99), torch.zeros(8)
    values[unknown] = math.nan
    counts = torch.tensor([4.0] * 7 + [1.0], dtype=torch.float64)
    rows = [gradients[:, :14].clone(), gradients[:, 14:].clone()]
    rows[0][unknown] = math.nan
    new = centred(rows, cleaned(rows, values, counts))
    whole = torch.cat(rows, 1).numpy() / float(new.scale)
    kept = [i for i in range(8) if i not in unknown]
    expected = np.cov(gradients[kept].numpy().T, aweights=counts[kept].numpy(), ddof=1)
    np.testing.assert_allclose((whole.T * new.shares.numpy()) @ whole, expected, rtol=0, atol=1e-9 * expected.max())


@pytest.mark.parametrize("second", [torch.float64, torch.float32], ids=["two blocks", "one block"])
def test_gradients_that_agree_but_for_rounding_leave_no_direction(second):
    average = Average(second)
    gradients = draws(1, 0).expand(7, -1) * (1 + 1e-7 * torch.randn(7, 1, generator=torch.Generator().manual_seed(0)))
    sizes = [block.size for block in average.blocks]
    rows = [part.to(b.dtype) for part, b in zip(gradients.split(sizes, 1), average.blocks, strict=True)]
    new = centred(rows, cleaned(rows, torch.zeros(7), torch.ones(7, dtype=torch.float64)))
    assert bool(new.good)
    assert not new.shares.any()
    found = fold(average.blocks, rows, new, average.weights, average.past, decay=0.9, k=4)
    assert not found.weights.any()
    assert all(not block.basis.any() for block in average.blocks)


def spoil(gradients, values, kind):
    if kind == "one is left":
        values[1:] = math.nan
    elif kind == "loss":
        values[3] = math.inf
    else:
        gradients[3, 20] = kind


@pytest.mark.parametrize("kind", ["one is left", "loss", math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("before", [0, 3])
def test_an_estimate_that_is_not_finite_leaves_everything_as_it_is(kind, before):
    average = Average()
    for i in range(before):
        average.add(draws(8, i))
    kept = [block.basis.clone() for block in average.blocks], average.weights, average.past
    gradients, values = draws(8, 10), torch.zeros(8)
    spoil(gradients, values, kind)
    new, _ = average.add(gradients, values)
    assert not bool(new.good)
    for block, basis in zip(average.blocks, kept[0], strict=True):
        assert torch.equal(block.basis[: len(basis)], basis)
        assert not block.basis[len(basis) :].any()
    assert average.weights[: len(kept[1])].equal(kept[1])
    assert not average.weights[len(kept[1]) :].any()
    assert average.past == kept[2]


def test_vectors_that_are_not_finite_begin_the_average_anew():
    average, fresh = Average(), Average()
    average.add(draws(8, 0))
    average.blocks[0].basis[1, 2] = math.nan
    average.add(draws(8, 1))
    fresh.add(draws(8, 1))
    np.testing.assert_allclose(average.found(), fresh.found(), rtol=0, atol=1e-6)
    assert float(average.past.count) == 1


def test_vectors_of_tiny_weights_are_orthonormal_in_float32():
    average = Average(torch.float32, k=6)
    for i in range(40):
        average.add(draws(8, i))
        rows, there = average.blocks[0].basis, average.weights > 0
        expected = torch.diag(there.float())  # what is below rounding has no direction
        torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=1e-6)
    assert there.sum() >= 5
    assert float(average.weights[there].min() / average.weights.max()) < 1e-3


@pytest.mark.parametrize("decay_of_sizes", [0.3, 0.6, 1.0])
def test_eigenpairs_without_a_wait_catch_what_exact_ones_do(monkeypatch, decay_of_sizes):
    """As on an accelerator, where pairs that are close stand for each other: the directions are as good."""
    size, k = 200, 10
    axes = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q
    spectrum = torch.arange(1, size + 1, dtype=torch.float64) ** -decay_of_sizes
    caught = []
    for iterated in (False, True):
        if iterated:
            monkeypatch.setattr(low_rank, "small_eigh", orthogonal_iteration)
        (block,) = blocks = blocks_of([(0, nn.Parameter(torch.zeros(size)))], None)
        weights, past = torch.zeros(0, dtype=torch.float64), Past(*torch.zeros(2, dtype=torch.float64))
        for i in range(30):
            generator = torch.Generator().manual_seed(i)
            normal = torch.randn(16, size, generator=generator, dtype=torch.float64)
            rows = [(normal * spectrum @ axes).float()]
            new = cleaned(rows, torch.zeros(16), torch.ones(16, dtype=torch.float64))
            found = fold(blocks, rows, new, weights, past, decay=0.95, k=k)
            weights, past = found.weights, found.past
        basis = block.basis.double()
        torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=2e-6)
        caught.append(float(((basis @ axes.T).square() * spectrum.square()).sum() / spectrum[:k].square().sum()))
    assert caught[1] == pytest.approx(caught[0], rel=0.01)


@pytest.mark.parametrize("off", [0.0, 1e-3, 0.1])
def test_the_inverse_root_is_that_of_numpy(off):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    matrix = torch.eye(7, dtype=torch.float64) + off * (noise + noise.T) / 4
    values, columns = np.linalg.eigh(matrix.numpy())
    expected = (columns / np.sqrt(values)) @ columns.T
    np.testing.assert_allclose(inverse_root(matrix).numpy(), expected, rtol=0, atol=1e-12)


def test_the_inverse_root_leaves_rows_of_zeros_alone():
    matrix = torch.diag(torch.tensor([1.0, 0.0, 4.0 / 3, 0.0], dtype=torch.float64))
    expected = torch.diag(torch.tensor([1.0, 1.0, 0.75**0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(inverse_root(matrix), expected)


# -- without a look at the device -----------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_neither_a_refresh_nor_a_step_reads_a_value(monkeypatch, at_once):
    """On meta tensors, which have none: whatever the host asked them would raise."""
    state = guard.RandomState
    monkeypatch.setattr(guard, "RandomState", lambda device: state(None))
    monkeypatch.setattr(refresh, "OnHost", lambda good: None)
    monkeypatch.setattr(doubts, "OnHost", lambda doubtful: SimpleNamespace(is_true=lambda: False))
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to("meta")
    optimizer = NSGD(model.parameters(), lr=0.1, k=4, solver="gradients", refresh_every=2)
    x, y = torch.empty(6, 6, device="meta"), torch.empty(6, device="meta", dtype=torch.long)
    for _ in range(4):
        samples = sample_losses(lambda x, y: F.cross_entropy(model(x), y), x, y, module=model if at_once else None)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y), curvature=samples)
        optimizer.step()
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.weights  # noqa: B018


class OnDevice:
    """A run whose device the host does not read at once, as if it were an accelerator."""

    def __init__(self, monkeypatch, refresh_every=1):
        monkeypatch.setattr(refresh, "_is_known_at_once", lambda device: False)
        self.weight = nn.Parameter(torch.zeros(8, dtype=torch.float64))
        self.optimizer = NSGD([self.weight], lr=0.1, k=3, refresh_every=refresh_every)

    def refresh(self, seed, factor=1.0):
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.optimizer.refresh([(lambda g=g: factor * (g @ self.weight), 1) for g in rows])

    def state(self):
        o = self.optimizer
        return o.weights, o.directions([self.weight]).tolist(), o.overlap


def test_off_the_cpu_a_refresh_that_fails_is_known_when_it_is_asked_for(monkeypatch):
    run = OnDevice(monkeypatch)
    run.refresh(0), run.refresh(1)
    before = run.state()
    assert run.refresh(2, factor=math.nan)
    assert run.state() == before
    with pytest.warns(UserWarning, match="refresh skipped at step 0, the last directions are kept: the loss is NaN"):
        assert run.optimizer.skipped_refreshes == 1
    assert run.optimizer.refreshes == 2
    run.refresh(3)
    assert (run.optimizer.refreshes, run.optimizer.skipped_refreshes) == (3, 1)


def test_off_the_cpu_it_is_told_at_the_next_refresh_at_the_latest(monkeypatch):
    run = OnDevice(monkeypatch)
    run.refresh(0, factor=math.inf)
    with pytest.warns(UserWarning, match="refresh skipped at step 0"):
        run.refresh(1)
    assert (run.optimizer.refreshes, run.optimizer.skipped_refreshes) == (1, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.filterwarnings("ignore:refresh skipped")
def test_checkpoints_and_copies_hold_what_came_of_the_last_refresh(monkeypatch, copied):
    run = OnDevice(monkeypatch)
    run.refresh(0), run.refresh(1, factor=math.nan)
    twin = copied(run.optimizer)
    resumed = OnDevice(monkeypatch).optimizer
    resumed.load_state_dict(run.optimizer.state_dict())
    for optimizer in (twin, resumed):
        assert (optimizer.refreshes, optimizer.skipped_refreshes) == (1, 1)
        assert optimizer.weights == run.optimizer.weights


def test_directions_are_the_same_whether_the_host_reads_or_not(monkeypatch):
    states = []
    for known in (True, False):
        run = OnDevice(monkeypatch)
        if known:
            monkeypatch.setattr(refresh, "_is_known_at_once", lambda device: True)
        for seed in range(4):
            run.refresh(seed)
        states.append(run.state())
    assert states[0] == states[1]


def test_groups_of_zero_gradient_leave_no_direction():
    average = Average()
    new, found = average.add(torch.zeros(8, 23, dtype=torch.float64))
    assert isinstance(new, Cleaned)
    assert bool(new.good)
    assert not found.weights.any()
    assert all(not block.basis.any() for block in average.blocks)
