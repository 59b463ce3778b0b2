"""Samples whose loss is not the batch's, or tells nothing of a parameter, are said once; good ones are not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nsgd import NSGD, sample_losses, top_eigenpairs
from nsgd.trajectory.sharpness import batch_sharpness, own_batch


def said_by(
    net, loss, *, given=(16, 6), steps=3, solver="gradients", module=False, labels=None, samples=16, group_size=1
):
    """What an optimizer says in some steps of a network, and the optimizer."""
    torch.manual_seed(1)
    optimizer = NSGD(
        [p for p in net.parameters() if p.requires_grad], lr=0.01, k=2, solver=solver, refresh_every=1, decay=0.5
    )
    x, y = torch.randn(*given), torch.arange(given[0]) % 3 if labels is None else labels
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            part = x[:samples], y[:samples]
            curvature = (
                sample_losses(loss, *part, group_size=group_size, module=net if module else None)
                if solver == "gradients"
                else lambda part=part: loss(*part)
            )
            optimizer.backward(loss(x, y), curvature=curvature)
            optimizer.step()
    return [str(w.message) for w in said if "None of the inputs" not in str(w.message)], optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("module", [False, True])
def test_class_weights_are_said_once(module):
    net = network()
    weight = torch.tensor([100.0, 1.0, 0.01])
    with torch.no_grad():
        net[2].bias.copy_(torch.tensor([5.0, 0.0, -5.0]))  # the heavy class is known well
    said, _ = said_by(net, lambda x, y: F.cross_entropy(net(x), y, weight=weight), module=module)
    assert len(said) == 1
    assert "class weights" in said[0]


def test_a_sum_in_place_of_a_mean_is_said_once():
    net = network()
    said, _ = said_by(net, lambda x, y: F.cross_entropy(net(x), y, reduction="sum"))
    assert len(said) == 1
    assert 'reduction="sum"' in said[0]


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("samples", [16, 4])
def test_a_plain_loss_also_of_a_part_and_with_dropout_says_nothing(module, samples):
    net = nn.Sequential(network(), nn.Dropout(0.3))
    said, _ = said_by(net, lambda x, y: F.cross_entropy(net(x), y), module=module, samples=samples)
    assert said == []


@pytest.mark.parametrize(("factor", "count"), [(1.0, 0), (3.0, 1)])
def test_the_loss_of_the_batch_is_told_to_a_refresh_without_its_scale(factor, count):
    net = network()
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    batch_loss = factor * F.cross_entropy(net(x), y)
    optimizer = NSGD(net.parameters(), lr=0.01, k=2, solver="gradients")
    losses = sample_losses(lambda x, y: 1024 * F.cross_entropy(net(x), y), x, y)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert optimizer.refresh_if_due(losses, 1024.0, batch_loss=batch_loss)
        assert optimizer.refresh(losses, 1024.0, batch_loss=batch_loss.reshape(1))
    assert ["another mean" in str(w.message) for w in said] == [True] * count


@pytest.mark.parametrize("wrong", [1.0, torch.zeros(2), "loss"])
def test_a_batch_loss_that_is_no_scalar_is_refused(wrong):
    net = network()
    optimizer = NSGD(net.parameters(), lr=0.01, k=2, solver="gradients")
    losses = sample_losses(lambda x: net(x).mean(), torch.randn(16, 6))
    with pytest.raises(ValueError, match=r"expected batch_loss to be a tensor of one number, .* got "):
        optimizer.refresh(losses, batch_loss=wrong)
    assert optimizer.refreshes == 0


def test_a_loss_of_pairs_has_no_directions_and_says_so():
    net = network()

    def contrastive(x, y):
        features = F.normalize(net(x), dim=1)
        return F.cross_entropy(features @ features.T, torch.arange(len(x)))

    said, optimizer = said_by(net, contrastive)
    assert optimizer.weights == ()
    assert sum("are all zero or alike, so there are no directions" in message for message in said) == 1
    assert sum("another mean" in message for message in said) == 1


def vicreg(net):
    """The variance term of VICReg (Bardes et al. 2022, eq. 1): of a single sample it is NaN."""
    return lambda x, y: F.relu(1 - (net(x).var(dim=0) + 1e-4).sqrt()).mean()


@pytest.mark.parametrize("module", [False, True])
def test_a_loss_that_is_nan_on_single_samples_names_the_ways_out_once(module):
    net = network()
    said, optimizer = said_by(net, vicreg(net), module=module)
    assert (optimizer.refreshes, optimizer.skipped_refreshes) == (0, 3)
    said = [message for message in said if "degrees of freedom" not in message]
    assert len(said) == 1
    assert "group_size" in said[0]
    assert "solver='lanczos'" in said[0]


@pytest.mark.parametrize("way_out", [{"group_size": 4}, {"solver": "lanczos"}])
def test_the_ways_out_of_a_loss_that_is_nan_on_single_samples_work(way_out):
    net = network()
    said, optimizer = said_by(net, vicreg(net), **way_out)
    assert said == []
    assert (optimizer.refreshes, optimizer.skipped_refreshes) == (3, 0)
    assert max(optimizer.weights) > 0


@pytest.mark.parametrize("module", [False, True])
def test_samples_without_a_loss_are_said_once_and_the_others_go(module):
    net = network()
    labels = torch.arange(16) % 3
    labels[3] = -100
    said, optimizer = said_by(net, lambda x, y: F.cross_entropy(net(x), y), module=module, labels=labels, samples=16)
    assert len(said) == 1
    assert "NaN or has no value" in said[0]
    assert (optimizer.refreshes, optimizer.skipped_refreshes) == (3, 0)


class Stem(nn.Module):
    """A frozen layer, and one behind it whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mid, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x):
        return self.head(checkpoint(lambda h: torch.tanh(self.mid(h)), self.stem(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("solver", ["gradients", "lanczos"])
def test_reentrant_checkpointing_behind_a_frozen_stem_is_said(solver):
    for reentrant in (True, False):
        net = Stem(reentrant)
        said, _ = said_by(net, lambda x, y, net=net: F.cross_entropy(net(x), y), solver=solver)
        assert len(said) == (1 if reentrant else 0)
        assert all("use_reentrant=False" in message for message in said)


MEASURES = {
    "eigenpairs": lambda loss, params: top_eigenpairs(loss, params, k=1),
    "eigenpairs, a closure": lambda loss, params: top_eigenpairs([(lambda: loss, 16)], params, k=1),
    "own batch": own_batch,
    "batch sharpness": lambda loss, params: batch_sharpness([loss, loss], params),
}


@pytest.mark.filterwarnings("ignore:None of the inputs")  # torch's own word on it, which says nothing of curvature
@pytest.mark.parametrize("measure", MEASURES)
def test_functions_say_once_which_weights_reentrant_checkpointing_hides(measure):
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    for reentrant in (True, False):
        net = Stem(reentrant)
        loss, params = F.cross_entropy(net(x), y), [p for p in net.parameters() if p.requires_grad]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            MEASURES[measure](loss, params)
        assert [w.filename for w in said] == ([__file__] if reentrant else [])
        expected = "the directions have no share in the parameter number 0, of shape (5, 6), whose gradients"
        assert all(str(w.message).startswith(expected) for w in said)
        assert all("use_reentrant=False" in str(w.message) for w in said)


def test_a_batch_that_is_cut_along_time_names_the_recurrent_weights():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cells, self.head = nn.LSTM(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.cells(x)[0])

    net = Recurrent()
    labels = torch.randint(3, (12, 16))
    said, _ = said_by(
        net,
        lambda x, y: F.cross_entropy(net(x).flatten(0, 1), y.flatten()),
        given=(12, 16, 6),
        module=True,
        labels=labels,
        samples=12,
    )
    assert len(said) == 1
    assert "'cells.weight_hh_l0'" in said[0]
    assert "time-major" in said[0]
