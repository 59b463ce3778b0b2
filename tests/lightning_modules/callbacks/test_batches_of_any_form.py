"""Batches whose samples do not lie along the first dimension, and batches that cannot be cut into samples at all."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_modules import RefreshDirections
from lightning_modules.callbacks import refresh
from nsgd import NSGD

STEPS, SAMPLES = 3, 12
OPTIONS: dict[str, Any] = {"lr": 0.05, "k": 3, "refresh_every": 1}


class Tagger(pl.LightningModule):
    """A recurrent network on batches that are time-major, or not."""

    def __init__(self, make: Any, *, time_major: bool = True, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.make, self.time_major = make, time_major
        torch.manual_seed(0)
        self.cells, self.head = kind(6, 4, batch_first=not time_major), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch.pop("x"), batch.pop("y")) if isinstance(batch, dict) else batch  # which consumes it
        out = self.cells(x)[0]
        if y.ndim == 1:
            return F.cross_entropy(self.head(out[-1] if self.time_major else out[:, -1]), y)
        return F.cross_entropy(self.head(out).flatten(0, 1), y.reshape(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


class Graph(Tagger):
    """Nodes are no samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        edges, x, y = batch
        return F.cross_entropy(edges @ self.head(torch.tanh(edges @ x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.head.parameters())


class Bag(Tagger):
    """Tokens of all sentences end to end."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.bag = nn.EmbeddingBag(20, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, offsets, y = batch
        return F.cross_entropy(self.head(self.bag(tokens, offsets)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make([*self.bag.parameters(), *self.head.parameters()])


class CTC(Tagger):
    """Targets of all samples end to end."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets, lengths, target_lengths = batch
        return F.ctc_loss(self.head(x).log_softmax(-1).transpose(0, 1), targets, lengths, target_lengths)


def sequences(step: int, time: int, *, whole: bool) -> tuple[Tensor, Tensor]:
    """A batch with samples first."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, time, 6, generator=generator)
    return x, torch.randint(3, (SAMPLES,) if whole else (SAMPLES, time), generator=generator)


def time_major(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = batch
    return x.transpose(0, 1).contiguous(), y.T.contiguous() if y.ndim == 2 else y


def whole_batches(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)


@pytest.fixture
def said(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(refresh, "rank_zero_info", found.append)
    return found


def trained(make_trainer, module: pl.LightningModule, data: Any, callback: RefreshDirections | None) -> Any:
    """The optimizer after training, and its directions along all parameters."""
    trainer = make_trainer(callbacks=[] if callback is None else [callback])
    trainer.fit(module, data)
    (optimizer,) = trainer.optimizers
    return optimizer, optimizer.directions([p for g in optimizer.param_groups for p in g["params"]])


def same_span(one: Tensor, other: Tensor) -> bool:
    return bool(torch.linalg.matrix_norm(one.T @ one - other.T @ other) < 1e-3)  # float32


@pytest.mark.parametrize(("kind", "of_dict"), [(nn.GRU, False), (nn.LSTM, False), (nn.GRU, True)])
@pytest.mark.parametrize("time", [5, SAMPLES], ids=["", "time == samples"])
@pytest.mark.parametrize("whole", [False, True], ids=["labels in time", "a label each"])
def test_a_time_major_batch_has_the_directions_of_its_batch_first_twin(make_trainer, said, kind, of_dict, time, whole):
    found = []
    for turned in (False, True):
        batches: list[Any] = [sequences(i, time, whole=whole) for i in range(STEPS)]
        if turned:
            batches = [time_major(batch) for batch in batches]
        if of_dict:
            batches = [{"x": x, "y": y} for x, y in batches]
        module = Tagger(partial(NSGD, **OPTIONS), time_major=turned, kind=kind)
        dims = (1, 0) if whole else 1
        callback = RefreshDirections(samples=10, group_size=2, batch_dim=dims if turned else 0)
        found.append(trained(make_trainer, module, whole_batches(batches), callback))
    (optimizer, directions), (turned_optimizer, turned_directions) = found
    assert (optimizer.refreshes, optimizer.hvps) == (turned_optimizer.refreshes, turned_optimizer.hvps) == (STEPS, 0)
    assert turned_optimizer.cost_gradients == pytest.approx(optimizer.cost_gradients, rel=0.05)
    assert same_span(directions, turned_directions)
    assert len(set(said)) <= 1  # that a GRU's are taken one by one
    assert kind is nn.GRU or not said


def test_samples_of_the_training_set_are_collated_along_any_dimension(make_trainer):
    x, y = (torch.cat(column) for column in zip(*(sequences(i, 5, whole=False) for i in range(STEPS)), strict=True))
    found = []
    for turned in (False, True):
        pairs = list(zip(x, y, strict=True))

        def collate(items: Any, turned: bool = turned) -> Any:
            batch = torch.stack([one for one, _ in items]), torch.stack([other for _, other in items])
            return time_major(batch) if turned else batch

        module = Tagger(partial(NSGD, **OPTIONS), time_major=turned, kind=nn.LSTM)
        callback = RefreshDirections(samples=8, source="train", batch_dim=int(turned))
        found.append(trained(make_trainer, module, DataLoader(pairs, batch_size=12, collate_fn=collate), callback))
    (_, directions), (optimizer, turned_directions) = found
    assert (optimizer.refreshes, optimizer.hvps) == (STEPS, 0)
    assert same_span(directions, turned_directions)


def graphs() -> list[Any]:
    draws = [torch.Generator().manual_seed(i) for i in range(STEPS)]
    return [
        (
            torch.softmax(torch.randn(8, 8, generator=g), 1),
            torch.randn(8, 4, generator=g),
            torch.randint(3, (8,), generator=g),
        )
        for g in draws
    ]


@pytest.mark.parametrize(
    ("kind", "batches"),
    [
        (Tagger, [time_major(sequences(i, SAMPLES, whole=True)) for i in range(STEPS)]),
        (Graph, graphs()),
    ],
    ids=["time == samples", "dense graph"],
)
def test_a_batch_whose_samples_alone_have_no_loss_gives_products_and_says_so(make_trainer, said, kind, batches):
    module = kind(partial(NSGD, **OPTIONS))
    optimizer, directions = trained(make_trainer, module, whole_batches(batches), RefreshDirections())
    assert optimizer.refreshes == STEPS
    assert optimizer.hvps > 0
    expected = kind(partial(NSGD, **OPTIONS, solver="lanczos"))
    _, exact = trained(make_trainer, expected, whole_batches(batches), RefreshDirections(samples=None))
    assert torch.equal(directions, exact)
    (message,) = (text for text in said if "products of the whole loss" in text)
    assert "batch_dim" in message
    assert "source='train'" in message


BAGS = [(torch.randint(20, (8,)), torch.arange(8), torch.randint(3, (8,))) for _ in range(12)]
LONGER_BAGS = [(torch.randint(20, (24,)), torch.arange(0, 24, 3), torch.randint(3, (8,))) for _ in range(12)]
SPELLED = [
    (torch.randn(8, 12, 4), torch.randint(1, 3, (24,)), torch.full((8,), 12), torch.full((8,), 3)) for _ in range(12)
]


@pytest.mark.parametrize(
    ("kind", "batches"),
    [(Bag, BAGS), (Bag, LONGER_BAGS), (CTC, SPELLED)],
    ids=["EmbeddingBag, as many tokens", "EmbeddingBag, more", "CTC"],
)
def test_a_loss_without_samples_and_products_trains_as_without_the_callback(make_trainer, said, kind, batches):
    ends = []
    for callback in (RefreshDirections(), None):
        module = kind(partial(NSGD, **OPTIONS))
        optimizer, _ = trained(make_trainer, module, whole_batches(batches), callback)
        assert optimizer.from_training_gradients
        assert optimizer.weights
        ends.append([p.detach().clone() for p in module.parameters()])
    assert all(map(torch.equal, *ends))
    (message,) = (text for text in said if "gradients of training" in text)
    assert "batch_dim" in message


@pytest.mark.parametrize(
    ("kind", "batches", "error"),
    [
        (Tagger, [time_major(sequences(0, SAMPLES, whole=True))], "Expected input batch_size"),
        (Bag, BAGS[:1], "offsets"),
        (Bag, LONGER_BAGS[:1], "expected a batch that can be cut into samples; batch_dim of RefreshDirections"),
        (CTC, SPELLED[:1], "expected a batch that can be cut into samples; batch_dim of RefreshDirections"),
        (Graph, graphs()[:1], "shapes cannot be multiplied"),
    ],
    ids=["time == samples", "EmbeddingBag, as many tokens", "EmbeddingBag, more", "CTC", "dense graph"],
)
def test_where_samples_are_asked_for_the_error_names_the_ways_out(make_trainer, kind, batches, error):
    module = kind(partial(NSGD, **OPTIONS, solver="gradients"))
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises((ValueError, RuntimeError), match=error) as caught:
        trained(make_trainer, module, whole_batches(batches), RefreshDirections())
    whole = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "batch_dim" in whole
    assert "source='train'" in whole
    assert all(map(torch.equal, before, module.parameters()))


def test_a_batch_without_that_dimension_is_refused(make_trainer):
    module = Tagger(partial(NSGD, **OPTIONS))
    data = whole_batches([time_major(sequences(0, 5, whole=True))])
    with pytest.raises(ValueError, match=r"dimension 1 that counts samples, got number 1 of shape \(12,\)"):
        trained(make_trainer, module, data, RefreshDirections(batch_dim=1))
    with pytest.raises(ValueError, match="expected tensors of one length"):
        trained(make_trainer, module, data, RefreshDirections(batch_dim=(0, 0)))
    with pytest.raises(ValueError, match="expected batch_dim to be the dimension that counts samples"):
        RefreshDirections(batch_dim="1")
