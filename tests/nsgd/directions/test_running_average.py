"""What one estimate weighs in the running average: little where there are many, and a spike no more than twice."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from nsgd import NSGD
from nsgd.directions import sample_average

SIZE = 30
EYE = torch.eye(SIZE, dtype=torch.float64)


class Toy:
    """Numbers without a loss of their own: a refresh takes the gradients that it is given."""

    def __init__(self, k=SIZE, **options):
        self.weight = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.optimizer = NSGD([self.weight], lr=0.1, k=k, **options)

    def refresh(self, gradients):
        assert self.optimizer.refresh([(lambda g=g: g @ self.weight, 1) for g in gradients])

    def group(self):
        return json.loads(self.optimizer.state_dict()["param_groups"][0]["nsgd_counts"])


def noise(seed, count=8):
    """Gradients that are mostly of three directions, with noise in all."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, count, SIZE, generator=generator, dtype=torch.float64)
    return draws[0] @ torch.diag_embed(torch.tensor([5.0, 4.0, 3.0, *[0.0] * (SIZE - 3)]).double()) + 0.5 * draws[1]


def along(vector):
    """Two gradients whose covariance is the outer product of a vector with itself."""
    return [vector / 2**0.5, -vector / 2**0.5]


def overlap(one, other):
    return float((one @ other.T).square().sum() / len(one))


# -- shares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "most"), [(None, 20), (0.5, 2), (0.9, 10)])
def test_the_average_is_the_plain_mean_of_the_first_estimates_and_then_forgets(decay, most):
    toy, shares = Toy(decay=decay), np.zeros(SIZE)
    for n in range(1, SIZE):
        toy.refresh(along(EYE[n]))  # a direction of its own, of weight 1
        shares = shares * (1 - 1 / most if n > most else 1 - 1 / n)
        shares[n] = 1 / most if n > most else 1 / n
        expected = np.sort(shares[1 : n + 1])[::-1]
        np.testing.assert_allclose(toy.optimizer.weights, expected[: len(toy.optimizer.weights)], rtol=1e-9)
        assert np.all(expected[len(toy.optimizer.weights) :] < 1e-6)
        if n <= most:
            np.testing.assert_allclose(toy.optimizer.weights, np.full(n, 1 / n), rtol=1e-9)
        assert toy.group()["trace"] == pytest.approx(1.0)


def test_without_a_decay_every_estimate_stands_alone():
    toy = Toy(decay=0.0)
    for n in range(1, 5):
        toy.refresh(along(100.0**n * EYE[n]))
        assert toy.optimizer.weights == pytest.approx((100.0 ** (2 * n),))


def test_a_new_parameter_begins_count_and_trace_anew():
    toy = Toy(k=3)
    for seed in range(4):
        toy.refresh(noise(seed))
    other = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    toy.optimizer.add_param_group({"params": [other]})
    vectors = along(100 * torch.ones(2, dtype=torch.float64))
    toy.optimizer.refresh([(lambda v=v: v @ other + 0 * toy.weight.sum(), 1) for v in vectors])
    assert (toy.group()["averaged"], toy.group()["trace"]) == (1, pytest.approx(2e4))
    assert toy.optimizer.weights == pytest.approx((2e4,))


# -- spikes and growth ----------------------------------------------------------------------------------------


def directions(toy):
    return toy.optimizer.directions([toy.weight])


def after_a_spike(at, refreshes=30):
    """Overlap of the directions at the end with those of a run that had none, and right after the spike."""
    clean, spiked, found = Toy(k=3), Toy(k=3), []
    for i in range(refreshes):
        gradients = noise(i)
        clean.refresh(gradients)
        spiked.refresh(100.0 * noise(1000 + i).roll(7, 1) if i == at else gradients)
        if i >= at:
            found.append(overlap(directions(clean), directions(spiked)))
    return found


@pytest.mark.parametrize("at", [10, 20, 25])
def test_a_spike_moves_the_directions_only_a_little(at, monkeypatch):
    assert min(after_a_spike(at)) > 0.9
    monkeypatch.setattr(sample_average, "MOST", float("inf"))
    assert max(after_a_spike(at)) < 0.1  # without the clip they are the spike's own to the end


@pytest.mark.parametrize("factor", [1.5, 10.0, 1e4])
@pytest.mark.parametrize(
    ("k", "before", "most"), [(3, 1, 4), (3, 5, 25), (6, 5, 4), (6, 40, 4), (3, 40, 45)]
)  # where the old ones take up all of k, they have to decay first
def test_growth_in_other_directions_is_followed(k, before, most, factor):
    toy = Toy(k=k)
    for i in range(before):
        toy.refresh(noise(i))
    for i in range(most):
        toy.refresh(factor * noise(1000 + i).roll(7, 1))
    assert overlap(EYE[7:10], directions(toy)) > 0.9


@pytest.mark.parametrize(("factor", "most"), [(10.0, 19), (100.0, 8), (1e4, 8)])
def test_strong_growth_is_followed_although_the_old_directions_take_up_all_of_k(factor, most):
    toy = Toy(k=3)
    for i in range(40):
        toy.refresh(noise(i))
    for i in range(most):
        toy.refresh(factor**0.5 * noise(1000 + i).roll(7, 1))
    assert overlap(EYE[7:10], directions(toy)) > 0.9


@pytest.mark.parametrize("factor", [10.0, 1e4])
def test_growth_that_lasts_counts_in_full_after_a_few_refreshes(factor):
    toy, weight, usual = Toy(k=3), 1.0, 1.0
    for _ in range(40):
        toy.refresh(along(EYE[0]))
    for _ in range(30):
        toy.refresh(along(factor**0.5 * EYE[0]))
        counted = min(factor, 2 * usual)  # of a new one
        usual = (usual + counted) / 2
        weight += 0.05 * (counted - weight)
        assert toy.optimizer.weights == pytest.approx((weight,))
    assert counted == factor


def test_the_trace_that_clips_is_that_of_the_clipped():
    toy = Toy(k=3)
    weights = []
    for gradient, trace in ((1.0, 1.0), (1.2, 1.22), (100.0, 1.22 * 3 / 2)):
        toy.refresh(along(gradient * EYE[0]))
        assert toy.group()["trace"] == pytest.approx(trace)
        weights.append(toy.optimizer.weights[0])
    assert weights == pytest.approx([1.0, 1.22, (2 * 1.22 + 2 * 1.22) / 3])  # the mean of three, the last one clipped


# -- checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 21])
def test_count_and_trace_survive_a_checkpoint_to_the_bit(stop, tmp_path):
    whole, resumed = Toy(k=3), Toy(k=3)
    for i in range(stop):
        whole.refresh(noise(i))
    torch.save(whole.optimizer.state_dict(), tmp_path / "state")
    resumed.optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for toy in (whole, resumed, copied := copy.deepcopy(whole)):
        for i, factor in enumerate((1.0, 50.0, 1.0)):  # with a spike, which needs the trace
            toy.refresh(factor * noise(100 + i))
    for toy in (resumed, copied):
        assert str(toy.group()) == str(whole.group())
        states = [t.optimizer.state_dict()["state"][0]["directions"] for t in (toy, whole)]
        assert torch.equal(*states)
    assert whole.group()["averaged"] == stop + 3
