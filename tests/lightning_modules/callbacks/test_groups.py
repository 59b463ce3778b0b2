"""Directions from the gradients of groups of samples: the right groups, the right moment, and nothing left behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import strangers
import torch
from strangers import Emulated16, Everything, Memory, Smooth, classes, loader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_modules import RefreshDirections
from lightning_modules.callbacks import curvature_batches
from lightning_modules.data.cutting import some_samples
from lightning_modules.data.training_samples import training_samples
from lightning_modules.models.batch_loss import batch_loss, batch_losses
from nsgd import NSGD

pytestmark = pytest.mark.usefixtures("averaging_is_free")  # costs are those of the samples

ALONE = {"lr": 0.1, "k": 5, "refresh_every": 1, "decay": 0.0}  # every refresh on its own


@dataclass
class Pair:
    x: Tensor
    y: Tensor


class Seen(torch.autograd.Function):
    """Keeps the tensors of every call, on the class: a list of one, or of all groups that vmap makes the call for."""

    calls: ClassVar[list[list[tuple[Tensor, ...]]]] = []

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        Seen.calls.append([tensors])
        return torch.zeros(())

    @staticmethod
    def setup_context(*_: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, None]:
        columns = [tensor.movedim(dim, 0) for tensor, dim in zip(tensors, in_dims, strict=True)]
        Seen.calls.append(list(zip(*columns, strict=True)))
        return torch.zeros(()), None

    @classmethod
    def groups(cls) -> list[tuple[Tensor, ...]]:
        return list(itertools.chain(*cls.calls))


class Notes(pl.LightningModule):
    """A classifier whose every batch is kept in ``Seen``, also those for directions alone."""

    def __init__(self, make: Any, *norm: nn.Module, one_by_one: bool = False) -> None:
        super().__init__()
        self.make, self.one_by_one = make, one_by_one
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), *norm, nn.Tanh(), nn.Linear(5, 3))
        Seen.calls.clear()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch.x, batch.y) if isinstance(batch, Pair) else batch
        if self.one_by_one:
            x.sum().item()  # which vmap cannot
        Seen.apply(x, y)
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def groups_of(make_trainer: Any, data: Any, refresh: RefreshDirections, *norm: nn.Module, **options: Any) -> Any:
    """The tensors of the groups that one refresh sees, and the optimizer."""
    trainer = make_trainer(callbacks=[refresh], limit_train_batches=1)
    trainer.fit(Notes(partial(NSGD, **{**ALONE, "k": 2}), *norm, **options), data)
    return Seen.groups()[1:], trainer.optimizers[0]


WAYS = pytest.mark.parametrize("one_by_one", [False, True], ids=["at once", "one by one"])


# -- the groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "batch_size", "sizes"),
    [
        ({}, 16, [1] * 16),  # fewer than the default samples: all
        ({}, 40, [1] * 32),
        ({"samples": 7}, 16, [1] * 7),
        ({"samples": 2}, 16, [1, 1]),
        ({"samples": None}, 40, [1] * 40),
        ({"samples": 100}, 16, [1] * 16),
        ({"samples": 7, "group_size": 3}, 16, [3, 3, 1]),
        ({"samples": 100, "group_size": 5}, 16, [5, 5, 5, 1]),
        ({"samples": None, "group_size": 8}, 16, [8, 8]),
        ({"samples": 9, "group_size": 8}, 16, [8, 1]),
    ],
)
@WAYS
def test_a_batch_is_cut_into_groups_in_its_own_order(make_trainer, options, batch_size, sizes, one_by_one):
    data, refresh = classes(48), RefreshDirections(**options)
    seen, optimizer = groups_of(make_trainer, DataLoader(data, batch_size), refresh, one_by_one=one_by_one)
    assert [len(x) for x, _ in seen] == sizes
    assert len(Seen.calls) == 1 + (len(sizes) if one_by_one else len(set(sizes)))  # a smaller last group on its own
    for part, whole in zip(zip(*seen, strict=True), data.tensors, strict=True):
        assert torch.equal(torch.cat(part), whole[: sum(sizes)])
    assert (optimizer.refreshes, optimizer.hvps, optimizer.eigenvalues) == (1, 0, ())
    assert 1 <= len(optimizer.weights) <= 2


@pytest.mark.parametrize("deep", [False, True], ids=["at the top", "deeper"])
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [8, 8, 8, 8]),
        ({"samples": 20}, [8, 8, 4]),
        ({"samples": 20, "group_size": 5}, [5] * 4),
        ({"samples": None}, [8] * 5),
        ({"samples": 20, "source": "train"}, [8, 8, 4]),
    ],
)
@WAYS
def test_with_batch_norm_a_group_has_eight_samples(make_trainer, options, sizes, deep, one_by_one):
    norm = nn.Sequential(nn.Identity(), nn.BatchNorm1d(5)) if deep else nn.BatchNorm1d(5)
    seen, optimizer = groups_of(make_trainer, loader(40), RefreshDirections(**options), norm, one_by_one=one_by_one)
    assert [len(x) for x, _ in seen] == sizes
    assert optimizer.hvps == 0


def test_layer_norm_needs_no_larger_groups(make_trainer):
    seen, _ = groups_of(make_trainer, loader(16), RefreshDirections(), nn.LayerNorm(5))
    assert [len(x) for x, _ in seen] == [1] * 16


@pytest.mark.parametrize("source", ["batch", "train"])
@pytest.mark.parametrize(("batch_size", "samples"), [(17, 32), (25, 32), (32, 9), (32, 17)])
def test_batch_norm_never_meets_a_group_of_one(make_trainer, batch_size, samples, source):
    """Training goes on with any last batch; BatchNorm has no statistics of one sample."""
    seen, optimizer = groups_of(
        make_trainer, loader(batch_size), RefreshDirections(samples, source=source), nn.BatchNorm1d(5)
    )
    assert optimizer.refreshes == 1
    assert min(len(x) for x, _ in seen) > 1


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"samples": 10, "group_size": 4}, [4, 4, 2]),
        ({"samples": 10}, [1] * 10),
        ({}, [1] * 32),
        ({"samples": None}, [1] * 48),  # all there are, up to 2,560
        ({"samples": 100, "group_size": 20}, [20, 20, 8]),
    ],
)
@WAYS
def test_groups_of_the_training_set_are_distinct_samples_with_their_labels(make_trainer, options, sizes, one_by_one):
    data, refresh = classes(48), RefreshDirections(source="train", **options)
    seen, optimizer = groups_of(make_trainer, DataLoader(data, 16), refresh, one_by_one=one_by_one)
    assert [len(x) for x, _ in seen] == sizes
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    found = (x[:, None] == data.tensors[0]).all(2)  # (n, 48)
    assert found.sum(1).tolist() == [1] * len(x)
    rows = found.int().argmax(1)
    assert len(set(rows.tolist())) == len(x)
    assert torch.equal(y, data.tensors[1][rows])
    assert optimizer.cost_gradients == pytest.approx(sum(sizes) / 16)
    assert optimizer.hvps == 0


def test_every_refresh_draws_other_samples_of_the_training_set(make_trainer, monkeypatch):
    drawn = []

    def draw(*args: Any, **options: Any) -> Any:
        parts = training_samples(*args, **options)
        drawn.append(torch.cat([x for (x, _), _ in parts]))
        return parts

    monkeypatch.setattr(curvature_batches, "training_samples", draw)
    trainer = make_trainer(callbacks=[RefreshDirections(8, source="train")])
    trainer.fit(Notes(partial(NSGD, **ALONE)), loader(16))
    assert len(drawn) == 3
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(drawn))


def collated(rows: Any) -> Pair:
    return Pair(*map(torch.stack, zip(*rows, strict=True)))


@pytest.mark.parametrize("source", ["batch", "train"])
def test_a_batch_may_be_a_dataclass(make_trainer, source):
    data = DataLoader(classes(32), batch_size=16, collate_fn=collated)
    seen, optimizer = groups_of(make_trainer, data, RefreshDirections(6, 2, source=source))
    assert [(len(x), len(y)) for x, y in seen] == [(2, 2)] * 3
    assert optimizer.hvps == 0


@pytest.mark.parametrize("source", ["batch", "train"])
def test_a_batch_may_be_a_dictionary_with_a_name_for_every_sample(make_trainer, source):
    seen: list[dict[str, Any]] = []

    class Looks(strangers.Regression):
        def training_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            seen.append(batch)
            return super().training_step(batch)

    rows = strangers.Rows(32)
    trainer = make_trainer(callbacks=[RefreshDirections(5, 2, source=source)], limit_train_batches=1)
    trainer.fit(Looks(partial(NSGD, **ALONE)), DataLoader(rows, batch_size=16))
    assert [len(part["name"]) for part in seen[1:]] == [2, 2, 1]
    for part in seen[1:]:
        indices = [int(name.removeprefix("row ")) for name in part["name"]]
        assert torch.equal(part["x"], rows.x[indices])
        assert torch.equal(part["y"], rows.y[indices])
    assert trainer.optimizers[0].hvps == 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(*classes(40).tensors, strict=True)


@WAYS
def test_an_iterable_data_set_gives_groups_of_its_batches(make_trainer, one_by_one):
    trainer = make_trainer(callbacks=[RefreshDirections()])
    trainer.fit(Notes(partial(NSGD, **ALONE), one_by_one=one_by_one), DataLoader(Stream(), batch_size=16))  # 16, 16, 8
    assert [len(x) for x, _ in Seen.groups()] == [16, *[1] * 16, 16, *[1] * 16, 8, *[1] * 8]
    assert trainer.optimizers[0].cost_gradients == 2.5  # the last batch is half of one


@pytest.mark.parametrize("sizes", [[16, 16, 8], [8, 16, 16], [8, 4, 16]], ids=str)
@pytest.mark.parametrize(
    ("refresh", "products"),
    [({"samples": None}, 0), ({"samples": 4}, 0), ({"samples": 3}, 2), ({"samples": None}, 2)],
    ids=str,
)
def test_samples_are_counted_against_the_largest_batch_so_far(make_trainer, sizes, refresh, products):
    x, y = classes(sum(sizes), 2, 2).tensors
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    counted: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            optimizer = trainer.optimizers[0]
            counted.append((optimizer.cost_gradients, optimizer.refreshes + products * optimizer.hvps))

    module = Smooth(partial(NSGD, **{**ALONE, "solver": "lanczos" if products else "auto"}))
    trainer = make_trainer(callbacks=[RefreshDirections(**refresh), Watch()])
    trainer.fit(module, DataLoader(batches, batch_size=None))
    largest = list(itertools.accumulate(sizes, max))
    spent = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise([(0.0, 0), *counted])]
    assert [cost for cost, _ in spent] == pytest.approx(
        [
            units * min(refresh["samples"] or n, n) / most
            for (_, units), n, most in zip(spent, sizes, largest, strict=True)
        ]
    )


def test_batches_of_one_give_products_of_their_loss(make_trainer):
    """There is nothing to cut."""
    trainer = make_trainer(callbacks=[RefreshDirections()])
    trainer.fit(Notes(partial(NSGD, **ALONE)), DataLoader(classes(3), batch_size=1))
    optimizer = trainer.optimizers[0]
    assert optimizer.refreshes == 3
    assert optimizer.hvps > 0
    assert len(optimizer.eigenvalues) == 5


def test_a_last_batch_of_one_leaves_the_average_alone(make_trainer):
    """Products of it would drive out what the whole batches gave, and cost the budget of hundreds of steps."""
    trainer = make_trainer(callbacks=[RefreshDirections()])
    trainer.fit(Notes(partial(NSGD, **ALONE)), DataLoader(classes(17), batch_size=16))
    optimizer = trainer.optimizers[0]
    assert (optimizer.refreshes, optimizer.hvps, optimizer.cost_gradients) == (1, 0, 1.0)
    assert trainer.global_step == 2


def test_a_last_batch_of_one_does_not_end_training_by_gradients(make_trainer):
    """It comes once an epoch wherever the data set's length asks for it, and training steps on it all the same."""
    trainer = make_trainer(callbacks=[RefreshDirections()])
    trainer.fit(Notes(partial(NSGD, **ALONE, solver="gradients")), DataLoader(classes(17), batch_size=16))
    assert trainer.optimizers[0].refreshes >= 1
    assert trainer.global_step == 2


class Detections(torch.utils.data.Dataset[Any]):
    """Images of several sizes, each with boxes of its own number."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        draw = torch.Generator().manual_seed(i)
        return torch.rand(3, 8 + i, 8, generator=draw), {"boxes": torch.rand(1 + i % 3, 4, generator=draw)}


class Detector(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 2, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pairs = list(zip(*batch, strict=True))  # one target an image
        return torch.stack([(self.net(x[None]).mean() - t["boxes"].mean()).square() for x, t in pairs]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return NSGD(self.parameters(), lr=0.1, k=2, refresh_every=1)


@pytest.mark.parametrize("stacked", [False, True], ids=["list of images", "tensor of images"])
def test_a_batch_that_cannot_be_cut_by_its_first_lengths_is_used_whole(make_trainer, stacked):
    """As in torchvision's detection models: lists with a tensor or a dictionary for every sample."""

    def collate(rows: Any) -> Any:
        images, targets = zip(*rows, strict=True)
        return (torch.stack([x[:, :8] for x in images]) if stacked else images), targets

    trainer = make_trainer(callbacks=[RefreshDirections()])
    trainer.fit(Detector(), DataLoader(Detections(), batch_size=4, collate_fn=collate))
    assert trainer.optimizers[0].refreshes == 2


# -- the covariance --------------------------------------------------------------------------------------------------


def covariance(module: Smooth, x: Tensor, y: Tensor, sizes: list[int]) -> Tensor:
    """The covariance (P, P) of the gradients of groups, weighted by their sizes, in float64 by torch.func."""
    named = {name: p.detach().double() for name, p in module.net.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(module.net, values, (x,)), y)

    rows = []
    for part_x, part_y in zip(x.double().split(sizes), y.split(sizes), strict=True):
        found = torch.func.grad(loss)(named, part_x, part_y)
        rows.append(torch.cat([found[name].reshape(-1) for name in named]))
    return torch.cov(torch.stack(rows).T, aweights=torch.tensor(sizes, dtype=torch.float64))


@pytest.mark.parametrize(
    ("refresh", "options", "sizes"),
    [
        ({}, {}, [1] * 16),
        ({"samples": 7}, {}, [1] * 7),
        ({"samples": 7, "group_size": 3}, {}, [3, 3, 1]),
        ({"samples": None, "group_size": 4}, {"accumulate_grad_batches": 3}, [4] * 4),
        ({"samples": 100, "source": "train"}, {"accumulate_grad_batches": 3}, [1] * 40),  # the order does not matter
        ({"samples": 7}, {"gradient_clip_val": 1e-3}, [1] * 7),
        ({"samples": 9}, {"plugins": [Emulated16(1.0)]}, [1] * 9),
        ({"samples": 9}, {"plugins": [Emulated16()]}, [1] * 9),
        ({"samples": 9}, {"plugins": [Emulated16()], "accumulate_grad_batches": 2}, [1] * 9),
    ],
)
@pytest.mark.parametrize("module_class", [Smooth, strangers.ManualWithCurvature])
def test_the_weights_are_those_of_the_covariance_by_hand(make_trainer, module_class, refresh, options, sizes):
    refused = {"accumulate_grad_batches", "gradient_clip_val"} & set(options)
    if module_class is strangers.ManualWithCurvature and refused:
        pytest.skip("Lightning refuses these for manual optimization")
    module = module_class(partial(NSGD, **{**ALONE, "lr": 1e-30}))
    data = classes(40, 2, 2)
    expected = covariance(module, *(t[: sum(sizes)] for t in data.tensors), sizes)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(expected))
    k = min(5, len(sizes) - 1)
    trainer = make_trainer(callbacks=[RefreshDirections(**refresh)], limit_train_batches=1, **options)
    trainer.fit(module, DataLoader(data, batch_size=16))
    optimizer = trainer.optimizers[0]
    # Gradients in float32, eps 1e-7, or in fp16, eps 1e-3.
    rough = 1e-2 if "plugins" in options else 1e-5
    found = torch.tensor(optimizer.weights, dtype=torch.float64)
    assert len(found) == k
    assert (found - values[:k]).abs().max() < rough * values[0]
    basis = optimizer.directions(module.parameters()).double()  # (k, P)
    assert basis @ basis.T == pytest.approx(torch.eye(k), abs=1e-4)  # float32, where the last is small beside the first
    assert (basis @ expected @ basis.T - torch.diag(values[:k])).abs().max() < rough * values[0]
    assert abs(float(basis[0] @ vectors[:, 0])) == pytest.approx(1, abs=10 * rough)  # the first stands well apart
    assert optimizer.cost_gradients == pytest.approx(
        sum(sizes) / (16 * options.get("accumulate_grad_batches", 1)) if options or refresh else 1
    )


def test_estimates_are_averaged_over_refreshes(make_trainer):
    """With k = P nothing is cut off, so that the average is exact; the third estimate of four is cut to twice the mean
    trace."""
    module = Smooth(partial(NSGD, lr=1e-30, k=12, refresh_every=1, decay=0.7))
    x, y = classes(64, 2, 2).tensors
    x[32:48] *= 30.0
    y[32:48] = 1 - y[32:48]
    average, trace, clips = 0.0, 0.0, []
    for i, share in enumerate((0.0, 1 / 2, 2 / 3, 0.7)):
        new = covariance(module, x[16 * i :][:16], y[16 * i :][:16], [1] * 16)
        clips.append(bool(i and new.trace() > 2 * trace))
        new = new * (2 * trace / new.trace() if clips[-1] else 1.0)
        average, trace = share * average + (1 - share) * new, share * trace + (1 - share) * float(new.trace())
    assert clips == [False, False, True, False]
    trainer = make_trainer(callbacks=[RefreshDirections()])
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
    expected = torch.linalg.eigvalsh(average).flip(0)
    weights = trainer.optimizers[0].weights
    assert torch.tensor(weights) == pytest.approx(expected[: len(weights)], abs=1e-5 * float(expected[0]))  # float32
    assert expected[len(weights) :].abs().sum() < 1e-5 * expected[0]


@pytest.mark.filterwarnings("ignore:the gradients of the samples are all zero or alike")
def test_groups_draw_dropout_masks_of_their_own(make_trainer):
    """As the samples of a batch do: gradients of equal samples differ."""

    class Drops(Smooth):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(F.dropout(self.net(batch[0]), 0.5), batch[1])

    data = TensorDataset(torch.ones(16, 2), torch.zeros(16, dtype=torch.long))
    ranks = []
    for module_class in (Drops, Smooth):
        trainer = make_trainer(callbacks=[RefreshDirections()])
        trainer.fit(module_class(partial(NSGD, **ALONE)), DataLoader(data, batch_size=16))
        ranks.append(len(trainer.optimizers[0].weights))
    assert ranks[0] > ranks[1] == 0


# -- where there are no groups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 7, 32])
def test_a_manual_module_without_a_curvature_loss_gives_products_of_its_loss(make_trainer, samples):
    x, y = classes(16, 2, 2).tensors
    module = strangers.ManualSmooth(partial(NSGD, **ALONE))
    named = dict(module.net.named_parameters())
    flat = torch.cat([p.detach().double().reshape(-1) for p in named.values()])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module.net, values, (x.double(),)), y)

    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).flip(0)[:3]
    trainer = make_trainer(callbacks=[RefreshDirections(samples)])
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
    optimizer = trainer.optimizers[0]
    assert optimizer.hvps > 0
    found = torch.tensor(optimizer.eigenvalues[:3], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-5 * expected[0]  # float32 products
    assert optimizer.weights == pytest.approx(optimizer.eigenvalues)
    assert optimizer.cost_gradients == 1 + 2 * optimizer.hvps


def test_gradients_of_a_manual_module_without_a_curvature_loss_are_refused(make_trainer):
    trainer = make_trainer(callbacks=[RefreshDirections()])
    with pytest.raises(ValueError, match="groups of samples"):
        trainer.fit(strangers.ManualSmooth(partial(NSGD, **ALONE, solver="gradients")), loader(features=2, number=2))


@pytest.mark.filterwarnings("ignore:the gradients of the samples are all zero or alike")
def test_a_gan_with_a_curvature_loss_takes_groups_for_both_networks(make_trainer):
    class WithLoss(strangers.Adversarial):
        def curvature_loss(self, batch: list[Tensor]) -> Tensor:
            return sum(self.losses(batch[0]))

    trainer = make_trainer(callbacks=[RefreshDirections(6)])
    trainer.fit(WithLoss(partial(NSGD, lr=0.01, k=3, refresh_every=1), toggle=True), loader(samples=16))
    # The generator sees the same noise with every group: one gradient, and nothing in which they differ.
    assert [(o.refreshes, o.hvps, len(o.weights)) for o in trainer.optimizers] == [(1, 0, 0), (1, 0, 3)]


@pytest.mark.parametrize("refresh", [{"samples": 16, "group_size": 16}, {"samples": 4, "group_size": 8}])
def test_products_on_one_group_of_the_training_set_are_of_one_fixed_loss(make_trainer, refresh):
    """The module is put back after every product, so that one that counts its calls gives the same loss each time."""

    class Counts(Smooth):
        calls = 0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.calls += 1
            return self.calls * super().training_step(batch, batch_idx)

    found = []
    for options in ({"solver": "lanczos"}, {}):
        callback = RefreshDirections(source="train", **refresh)
        trainer = make_trainer(callbacks=[callback], limit_train_batches=1)
        trainer.fit(Counts(partial(NSGD, **ALONE, **options)), loader(features=2, number=2))
        assert trainer.optimizers[0].hvps > 0
        found.append(trainer.optimizers[0].eigenvalues)
    assert found[0] == found[1]


@pytest.mark.parametrize("solver", ["auto", "lanczos"])
@pytest.mark.filterwarnings("ignore:the gradients of the samples are all zero")
def test_a_loss_without_any_gradient_ends_nothing(make_trainer, solver):
    """As of samples that are fitted to the last bit, of a hinge, or of one sample in a contrastive loss."""

    class Flat(Smooth):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.relu(-self.net(batch[0]).square()).mean()

    module = Flat(partial(NSGD, lr=0.1, k=2, refresh_every=1, solver=solver))
    before = [p.tolist() for p in module.parameters()]
    trainer = make_trainer(callbacks=[RefreshDirections()])
    trainer.fit(module, loader(features=2, number=2))
    assert trainer.global_step == 3
    assert [p.tolist() for p in module.parameters()] == before


class Unknown(Notes):
    """Has a loss of its own choosing for one sample alone."""

    value, sample = torch.nan, classes(48).tensors[0][18]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        chosen = (batch[0] == self.sample).all() & (len(batch[0]) == 1)
        return loss * torch.where(chosen, self.value, 1.0)


@WAYS
def test_an_infinite_group_skips_the_refresh_and_no_step(make_trainer, one_by_one):
    module = Unknown(partial(NSGD, **ALONE), one_by_one=one_by_one)
    module.value = torch.inf
    trainer = make_trainer(callbacks=[RefreshDirections()])
    with pytest.warns(UserWarning, match="refresh skipped at step 1"):
        trainer.fit(module, loader(16))
    optimizer = trainer.optimizers[0]
    assert (optimizer.refreshes, optimizer.skipped_refreshes, optimizer.cost_gradients) == (2, 1, 3.0)
    assert trainer.global_step == 3


@WAYS
@pytest.mark.filterwarnings("ignore:the loss of one sample or more is NaN")
def test_a_group_without_a_known_loss_is_left_out(make_trainer, one_by_one):
    module = Unknown(partial(NSGD, **{**ALONE, "lr": 1e-30}), one_by_one=one_by_one)
    x, y = (column[[16, 17, *range(19, 32)]] for column in classes(48).tensors)
    found: list[Any] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            found.append(trainer.optimizers[0].weights)

    trainer = make_trainer(callbacks=[RefreshDirections(), Watch()])
    trainer.fit(module, loader(16))
    optimizer = trainer.optimizers[0]
    assert (optimizer.refreshes, optimizer.skipped_refreshes, optimizer.cost_gradients) == (3, 0, 3.0)
    expected = torch.linalg.eigvalsh(covariance(module, x, y, [1] * 15)).flip(0)[:5]
    assert torch.tensor(found[1]) == pytest.approx(expected, abs=1e-5 * float(expected[0]))  # float32


def test_gradients_that_overflow_under_loss_scaling_skip_the_refresh(make_trainer):
    module = Smooth(partial(NSGD, **ALONE))
    trainer = make_trainer(callbacks=[RefreshDirections()], plugins=[Emulated16(2.0**40)], max_epochs=4)
    with pytest.warns(UserWarning, match="refresh skipped at step 0"):
        trainer.fit(module, loader(features=2, number=2))
    assert trainer.optimizers[0].skipped_refreshes >= 1
    assert all(bool(p.isfinite().all()) for p in module.parameters())


# -- nothing is left behind --------------------------------------------------------------------------------------------


SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
TRAINERS = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


def trained(make_trainer: Any, random_state: Any, module: Any, data: Any, refresh: Any, options: Any) -> Any:
    torch.manual_seed(11)
    logger = Memory()
    trainer = make_trainer(max_epochs=2, logger=logger, callbacks=refresh, **options)
    trainer.fit(module, data)
    state = trainer.optimizers[0].state
    return trainer.optimizers[0], {
        "parameters": {name: value.tolist() for name, value in module.state_dict().items()},
        "momentum": [state[p]["momentum_buffer"].tolist() for p in module.net.parameters()],
        "logged": logger.without_nsgd(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "plain state": module.plain_state() if isinstance(module, Everything) else None,
        "random": random_state(),
    }


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize(
    "refresh", [{}, {"samples": 6, "group_size": 2}, {"samples": 12, "group_size": 3, "source": "train"}]
)
@pytest.mark.parametrize("kind", ["dropout and BatchNorm", "dictionaries"])
def test_groups_leave_training_bit_identical(make_trainer, random_state, kind, options, refresh):
    def made(make: Any) -> Any:
        if kind == "dictionaries":
            return strangers.Regression(make), DataLoader(strangers.Rows(64), batch_size=16, shuffle=True)
        return Everything(make), loader(shuffle=True, samples=64)

    observed = partial(NSGD, **SETTINGS, k=3, gamma=1.0, refresh_every=1)
    _, plain = trained(make_trainer, random_state, *made(partial(torch.optim.SGD, **SETTINGS)), [], options)
    optimizer, watched = trained(make_trainer, random_state, *made(observed), [RefreshDirections(**refresh)], options)
    assert (optimizer.refreshes, optimizer.hvps) == (4 if "accumulate_grad_batches" in options else 8, 0)
    assert plain["logged"] or "accumulate_grad_batches" in options
    for what, value in plain.items():
        assert watched[what] == value, what


class Snapshot(pl.Callback):
    """All that a module, its trainer and the process hold, before and after the callbacks between."""

    def __init__(self, random_state: Callable[[], Any], into: list[Any]) -> None:
        self.random_state, self.into = random_state, into

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.into.append(everything(trainer, pl_module, self.random_state))


def everything(trainer: pl.Trainer, module: Any, random_state: Callable[[], Any]) -> dict[str, Any]:
    return {
        "plain state": module.plain_state(),
        "buffers": {name: (id(b), b._version, b.tolist()) for name, b in module.named_buffers()},
        "parameters": {name: (id(p), p._version, p.grad) for name, p in module.named_parameters()},
        "modes": [m.training for m in module.modules()],
        "attributes": {(i, name): id(value) for i, m in enumerate(module.modules()) for name, value in vars(m).items()},
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "loggers": [id(logger) for logger in trainer.loggers],
        "hooks": dict(torch.nn.modules.module._global_forward_pre_hooks),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "random": random_state(),
    }


class Fails(Everything):
    """Raises at a call of training_step, counted from 1, having changed its mode and an attribute."""

    at = -1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.calls == self.at:
            self.eval()
            self.surprise = torch.ones(())
            raise RuntimeError("as planned")
        return loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("refresh", [{"samples": 6, "group_size": 2}, {"samples": None}, {"source": "train"}])
def test_a_refresh_by_groups_leaves_everything_as_found(make_trainer, random_state, refresh, precision):
    before: list[Any] = []
    after: list[Any] = []
    callbacks = [Snapshot(random_state, before), RefreshDirections(**refresh), Snapshot(random_state, after)]
    trainer = make_trainer(callbacks=callbacks, logger=Memory(), precision=precision)
    trainer.fit(Everything(partial(NSGD, **ALONE)), loader(16))
    assert (trainer.optimizers[0].refreshes, trainer.optimizers[0].hvps) == (3, 0)
    assert len(before) == len(after) == 3
    for one, other in zip(before, after, strict=True):
        for what, value in one.items():
            assert other[what] == value, what


@pytest.mark.parametrize("at", [2, 3, 4], ids="at group {}".format)
def test_an_exception_in_a_group_leaves_everything_as_found(make_trainer, random_state, at):
    before: list[Any] = []
    module = Fails(partial(NSGD, **ALONE, solver="gradients"))  # "auto" would take products
    module.at = at  # the step itself is the first call
    trainer = make_trainer(callbacks=[Snapshot(random_state, before), RefreshDirections(6, 2)], logger=Memory())
    after: list[Any] = []

    class After(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
            after.append(everything(trainer, pl_module, random_state))

    trainer.callbacks.append(After())
    with pytest.raises(RuntimeError, match="as planned"):
        trainer.fit(module, loader(16))
    (found,), (left,) = before, after
    for one in (found, left):
        one.pop("logged")  # Lightning itself lets go of the results, and notes in which hook it is
        one["attributes"].pop((0, "_current_fx_name"))
    for what in found:
        assert left[what] == found[what], what
    assert not hasattr(module, "surprise")
    assert "log" not in vars(module)


def test_one_guard_serves_for_several_losses(random_state):
    """Each sees what those before it left, as batches of training do; in the end all is put back."""
    module = Everything(partial(torch.optim.SGD, lr=0.1))
    module.log = lambda *_, **__: None
    module.log_dict = lambda *_, **__: None
    data = list(classes(16).tensors)
    before = module.plain_state(), random_state()
    with batch_losses(module) as loss:
        losses = [loss(some_samples(data, slice(i, i + 4)), 0) for i in (0, 4, 8, 8)]
        assert module.calls == 4
        assert module.seen == [value.item() for value in losses]
    assert losses[2].item() != losses[3].item()  # another dropout mask
    assert (module.plain_state(), random_state()) == before
    assert batch_loss(module, some_samples(data, slice(4))).item() == losses[0].item()
    for value in losses:  # graphs outlive the guard
        value.backward()
