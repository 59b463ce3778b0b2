"""Samples that do not lie along the first dimension: cut along batch_dim they are those of a batch-first twin."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsgd import NSGD, backward_in_chunks, sample_losses
from nsgd.directions.samples import gradient_moment

ROUNDING = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 1e-6}}


class Tagger(nn.Module):
    """A label at every time, or one for a sequence."""

    def __init__(self, kind: type[nn.RNNBase], *, batch_first: bool, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.head = kind(6, 4, batch_first=batch_first), nn.Linear(4, 3)
        self.batch_first, self.whole = batch_first, whole

    def forward(self, x: Tensor) -> Tensor:
        out = self.cells(x)[0]
        if self.whole:
            out = out[:, -1] if self.batch_first else out[-1]
        return self.head(out)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x).flatten(end_dim=-2), y.view(-1))  # view: of a layout like the batch's

    def recurrent_share(self, optimizer: NSGD) -> float:
        """Of the recurrent weights in the directions' squares."""
        vectors, start = optimizer.directions(list(self.parameters())), 0
        for name, p in self.named_parameters():
            if name == "cells.weight_hh_l0":
                return float(vectors[:, start : start + p.numel()].square().sum() / vectors.square().sum())
            start += p.numel()
        raise AssertionError(name)


def drawn(time: int, samples: int, *, whole: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A time-major batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(time, samples, 6, dtype=dtype, generator=generator)
    return x, torch.randint(3, (samples,) if whole else (time, samples), generator=generator)


@pytest.mark.parametrize(("time", "samples"), [(5, 12), (12, 12)], ids=["", "time == samples"])
@pytest.mark.parametrize(
    ("kind", "at_once"),
    [(nn.LSTM, True), (nn.LSTM, False), (nn.GRU, False)],
    ids=["LSTM, at once", "LSTM, one by one", "GRU, one by one"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["labels in time", "a label each"])
def test_a_time_major_batch_has_the_directions_of_its_batch_first_twin(kind, at_once, time, samples, whole):
    dtype = torch.float32 if at_once else torch.float64  # torch runs no LSTM of float64 under vmap
    x, y = drawn(time, samples, whole=whole, dtype=dtype)
    found = []
    for batch_first in (True, False):
        net = Tagger(kind, batch_first=batch_first, whole=whole).to(dtype)
        batch = (x.transpose(0, 1).contiguous(), y if whole else y.T.contiguous()) if batch_first else (x, y)
        dims = 0 if batch_first else (1, 0) if whole else 1
        module = net if at_once else None
        losses = sample_losses(net.loss, *batch, group_size=3, module=module, batch_dim=dims)
        optimizer = NSGD(net.parameters(), lr=0.1, k=3, solver="gradients")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.refresh(losses)
        found.append((*gradient_moment(losses, list(net.parameters())), net.recurrent_share(optimizer)))
    (counts, rows, share), (counts_there, rows_there, share_there) = found
    assert counts.tolist() == counts_there.tolist() == [0.25] * 4
    torch.testing.assert_close(rows_there, rows, **ROUNDING[dtype])
    assert share > 1e-4  # cut along time it is zero
    assert share_there == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("samples", [12, 10], ids=["equal parts", "ragged"])
def test_chunks_of_a_time_major_batch_have_its_gradient_and_whole_sequences(samples):
    x, y = drawn(5, samples, dtype=torch.float64)
    net = Tagger(nn.GRU, batch_first=False).double()
    seen: list[tuple[int, ...]] = []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        seen.append(tuple(y.shape))
        return net.loss(x, y)

    total = backward_in_chunks(loss, x, y, chunks=4, batch_dim=1)
    expected = net.loss(x, y)
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    for p, gradient in zip(net.parameters(), torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(p.grad, gradient, **ROUNDING[torch.float64])
    assert seen == ([(5, 3)] * 4 if samples == 12 else [(5, 5)] * 2)


def test_cut_along_time_where_time_equals_samples_is_said_with_the_way_out():
    x, y = drawn(12, 12)
    net = Tagger(nn.LSTM, batch_first=False)
    for batch_dim in (0, 1):
        optimizer = NSGD(net.parameters(), lr=0.01, k=2, solver="gradients", refresh_every=1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                losses = sample_losses(net.loss, x, y, module=net, batch_dim=batch_dim)
                optimizer.backward(net.loss(x, y), curvature=losses)
                optimizer.step()
        own = [str(w.message) for w in said if "no share" in str(w.message)]
        assert len(own) == (1 if batch_dim == 0 else 0)
        assert all("batch_dim" in message and "'cells.weight_hh_l0'" in message for message in own)


def test_a_mean_that_is_another_names_batch_dim():
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    x, y = torch.randn(8, 8, 6), torch.randint(3, (8, 8))
    weight = torch.logspace(-3, 0, 8)  # of each time: a mean over samples that only the right cut has

    def loss(x: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        return (each * weight[:, None][: len(y)]).mean()

    for batch_dim in (0, 1):
        optimizer = NSGD(net.parameters(), lr=0.0, k=2, solver="gradients", refresh_every=1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.backward(loss(x, y), curvature=sample_losses(loss, x, y, batch_dim=batch_dim))
                optimizer.step()
        messages = [str(w.message) for w in said if "another mean" in str(w.message)]
        assert len(messages) == (1 if batch_dim == 0 else 0)
        assert all("batch_dim" in message for message in messages)


def test_what_cannot_be_cut_names_the_ways_out():
    net = nn.EmbeddingBag(9, 3)
    tokens, offsets, labels = torch.arange(8), torch.arange(8), torch.arange(8) % 3
    losses = sample_losses(lambda t, o, y: F.cross_entropy(net(t, o), y), tokens, offsets, labels)
    before = net.weight.clone()
    with pytest.raises(RuntimeError, match="offsets") as caught:
        NSGD(net.parameters(), lr=0.1, k=2, solver="gradients").refresh(losses)
    (note,) = caught.value.__notes__
    assert "batch_dim" in note
    assert "(1,), (1,), (1,)" in note
    assert "training gradients" in note
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("take", [sample_losses, backward_in_chunks])
@pytest.mark.parametrize(
    ("batch_dim", "message"),
    [
        (1, r"dimension 1 that counts samples, got number 1 of shape \(12,\); pass batch_dim with one dimension for"),
        ((1, -2), r"dimension -2 that counts samples, got number 1 of shape \(12,\)"),
        (0, r"expected tensors of one length, .*got lengths \[5, 12\]; batch_dim says"),
        ((1, 0, 0), "expected a batch_dim for each of 2 tensors, got 3"),
        ((), "expected batch_dim to be the dimension that counts samples, or one for each tensor, got"),
        (True, "expected batch_dim to be the dimension that counts samples, or one for each tensor, got True"),
        ("1", "expected batch_dim to be .*got '1'; batch-first is 0, time-major 1"),
        (1.0, "expected batch_dim to be .*got 1.0"),
    ],
)
def test_a_batch_dim_that_does_not_fit_is_one_sentence(take, batch_dim, message):
    x, y = drawn(5, 12, whole=True)
    with pytest.raises(ValueError, match=message):
        take(lambda x, y: x.sum(), x, y, batch_dim=batch_dim)
