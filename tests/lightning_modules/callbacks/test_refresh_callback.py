"""RefreshDirections: training as it would have been, and the same curvature whatever the trainer does to the loss."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from strangers import (
    Adversarial,
    Emulated16,
    Everything,
    ManualSmooth,
    ManualWithCurvature,
    Memory,
    Regression,
    Rows,
    Smooth,
    classes,
    loader,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules import Classifier, Digits, RefreshDirections
from lightning_modules.callbacks.curvature_batches import CurvatureBatches
from nsgd import NSGD, damp, top_eigenpairs

pytestmark = pytest.mark.usefixtures("averaging_is_free")  # costs are those of the samples

SOURCES = [{"samples": 5}, {"samples": None}, {"samples": 20, "source": "train"}]
# 2k + 2 products are the whole Krylov space of 12 parameters, and nothing is averaged.
EXACT = {"k": 5, "refresh_every": 1, "lr": 0.1, "solver": "lanczos", "decay": 0.0}
TOP = 3  # of the k: the others are near zero, where the Krylov space ends early


def dense_eigenvalues(module: pl.LightningModule, x: Tensor, y: Tensor) -> Tensor:
    """All eigenvalues of the cross-entropy's Hessian in float64, descending, by another route."""
    named = {name: p.detach().double() for name, p in module.net.named_parameters()}
    theta = torch.cat([p.reshape(-1) for p in named.values()])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module.net, values, (x.double(),)), y)

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta)).flip(0)


# -- training stays bit-identical ----------------------------------------------------------------------------------


def train(make_trainer: Any, random_state: Any, optimizer: Any, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    module, logger = Everything(optimizer), Memory()
    torch.manual_seed(11)
    trainer = make_trainer(max_epochs=2, logger=logger, callbacks=callbacks, **options)
    trainer.fit(module, loader(shuffle=True, samples=64))
    state = trainer.optimizers[0].state
    return {
        "module": module.plain_state(),
        "momentum": [state[p]["momentum_buffer"].tolist() for p in module.net.parameters()],
        "logged": logger.without_nsgd(),
        "callback_metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "modes": [m.training for m in module.modules()],
        "random": random_state(),
        "optimizer": trainer.optimizers[0],
    }


@pytest.mark.parametrize("source", SOURCES, ids=["slice", "whole batch", "training set"])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulated and clipped", "bf16-mixed"],
)
def test_refreshing_leaves_training_bit_identical(make_trainer, random_state, options, source):
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    without = train(make_trainer, random_state, partial(torch.optim.SGD, **settings), [], **options)
    observed = partial(NSGD, **settings, k=3, gamma=1.0, refresh_every=1)
    monitored = train(make_trainer, random_state, observed, [RefreshDirections(**source)], **options)
    assert monitored["optimizer"].refreshes == (4 if "accumulate_grad_batches" in options else 8)
    assert len(without["logged"]) >= 8 or options.get("accumulate_grad_batches")
    for what in ("module", "momentum", "logged", "callback_metrics", "modes", "random"):
        assert monitored[what] == without[what], what


class Jittered(torch.utils.data.Dataset[Any]):
    """Draws from the global generator for every sample, as random transforms do."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = classes(64)[i]
        return x + 0.1 * torch.randn(6), y


def test_random_transforms_of_a_training_sample_leave_the_random_state(make_trainer, random_state):
    found = []
    for make, callbacks in (
        (partial(torch.optim.SGD, lr=0.1), []),
        (partial(NSGD, lr=0.1, k=2, gamma=1.0, refresh_every=2), [RefreshDirections(20, source="train")]),
    ):
        module = Everything(make)
        torch.manual_seed(11)
        make_trainer(callbacks=callbacks).fit(module, DataLoader(Jittered(), batch_size=16))
        found.append((module.plain_state(), random_state()))
    assert found[0] == found[1]


def test_the_directions_do_change_training_where_gamma_is_not_one(make_trainer, random_state):
    """So that the test above compares with something that acts."""
    settings = {"lr": 0.05, "momentum": 0.9}
    plain = train(make_trainer, random_state, partial(torch.optim.SGD, **settings), [])
    nudged = partial(NSGD, **settings, k=3, gamma=0.0, refresh_every=1)
    assert train(make_trainer, random_state, nudged, [RefreshDirections(5)])["module"] != plain["module"]


# -- the same loss, the same eigenvalues -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refresh", "options", "seen"),
    [
        ({"samples": None}, {}, 16),
        ({"samples": 100}, {}, 16),  # more than there are: the whole batch
        ({"samples": 7}, {}, 7),
        ({"samples": None}, {"accumulate_grad_batches": 3}, 16),
        ({"samples": 7}, {"accumulate_grad_batches": 3}, 7),
        ({"samples": 40, "source": "train"}, {}, 40),  # the whole training set, batches of 16, 16 and 8
        ({"samples": None, "source": "train"}, {"accumulate_grad_batches": 3}, 40),
        ({"samples": 7}, {"gradient_clip_val": 1e-3}, 7),
    ],
)
def test_eigenvalues_are_those_of_the_dense_float64_hessian(make_trainer, refresh, options, seen):
    module = Smooth(partial(NSGD, **EXACT))
    data = classes(40, 2, 2)
    x, y = data.tensors
    expected = dense_eigenvalues(module, x[:seen], y[:seen])[:TOP]
    trainer = make_trainer(callbacks=[RefreshDirections(**refresh)], limit_train_batches=1, **options)
    trainer.fit(module, DataLoader(data, batch_size=16))
    found = torch.tensor(trainer.optimizers[0].eigenvalues[:TOP], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-5 * expected[0]  # float32 products


@pytest.mark.parametrize("samples", [None, 7])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_eigenvalues_under_loss_scaling_are_those_of_the_unscaled_loss(make_trainer, accumulate, samples):
    module = Smooth(partial(NSGD, **EXACT))
    data = classes(32, 2, 2)
    x, y = (t[: samples or 16] for t in data.tensors)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(module.net(x), y)
    expected = top_eigenpairs(loss, module.parameters(), k=5, max_hvps=12, repeated=False).eigenvalues[:TOP]
    trainer = make_trainer(
        plugins=[Emulated16()],
        callbacks=[RefreshDirections(samples)],
        limit_train_batches=1,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, DataLoader(data, batch_size=16))
    found = torch.tensor(trainer.optimizers[0].eigenvalues[:TOP])
    # Both run in fp16 with eps 1e-3, at other scales: they round, and underflow, differently.
    assert (found - expected).abs().max() < 1e-2 * expected[0]


class NotesPrecision(Smooth):
    """Keeps the dtype that its layers work in, across calls made for directions alone."""

    noted: ClassVar[list[torch.dtype]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.noted.append(self.net(batch[0]).dtype)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
@pytest.mark.parametrize("source", ["batch", "train"])
@pytest.mark.parametrize("options", [{}, {"solver": "gradients"}], ids=["products", "groups"])
def test_a_sample_runs_in_the_precision_of_the_trainer(make_trainer, precision, dtype, source, options):
    NotesPrecision.noted.clear()
    module = NotesPrecision(partial(NSGD, **{**EXACT, **options}))
    trainer = make_trainer(callbacks=[RefreshDirections(7, source=source)], precision=precision, limit_train_batches=1)
    trainer.fit(module, loader(features=2, number=2))
    assert len(NotesPrecision.noted) >= 2  # the step, and the sample, or all of its groups at once
    assert set(NotesPrecision.noted) == {dtype}


@pytest.mark.parametrize("module_class", [ManualSmooth, ManualWithCurvature])
@pytest.mark.parametrize("samples", [None, 7])
def test_a_manual_module_gives_its_own_loss_or_curvature_loss(make_trainer, module_class, samples):
    module = module_class(partial(NSGD, **EXACT))
    x, y = classes(16, 2, 2).tensors
    seen = samples if samples and module_class is ManualWithCurvature else 16  # without one: the loss itself
    expected = dense_eigenvalues(module, x[:seen], y[:seen])[:TOP]
    trainer = make_trainer(callbacks=[RefreshDirections(samples)], limit_train_batches=1)
    trainer.fit(module, loader(samples=16, features=2, number=2))
    found = torch.tensor(trainer.optimizers[0].eigenvalues[:TOP], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-5 * expected[0]


# -- when ------------------------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """The refresh count after every batch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.counts.append(trainer.optimizers[0].refreshes)


@pytest.mark.parametrize(
    ("accumulate", "every", "warmup", "expected"),
    [
        (1, 1, 0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 3, 0, [1, 1, 1, 2, 2, 2, 3, 3]),
        (2, 1, 0, [1, 1, 2, 2, 3, 3, 4, 4]),
        (2, 2, 0, [1, 1, 1, 1, 2, 2, 2, 2]),
        (2, 2, 1, [0, 0, 1, 1, 1, 1, 2, 2]),
        (3, 1, 0, [1, 1, 1, 2, 2, 2, 3, 3]),  # the last step has two batches
    ],
)
def test_refreshes_are_counted_in_optimizer_steps(make_trainer, accumulate, every, warmup, expected):
    watch = Watch()
    module = Smooth(partial(NSGD, lr=0.1, k=2, refresh_every=every, warmup_steps=warmup))
    trainer = make_trainer(callbacks=[RefreshDirections(4), watch], accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(samples=128, features=2, number=2))
    assert watch.counts == expected


def test_a_nan_loss_keeps_the_directions_and_is_tried_once_a_step(make_trainer):
    module = Smooth(partial(NSGD, lr=1e-30, k=2, refresh_every=1))
    data = classes(64, 2, 2)
    data.tensors[0][16:32] = torch.nan  # the second micro-batch, and second step
    trainer = make_trainer(callbacks=[RefreshDirections(None)], gradient_clip_val=None)
    with pytest.warns(UserWarning, match="refresh skipped at step 1"):
        trainer.fit(module, DataLoader(data, batch_size=16))
    optimizer = trainer.optimizers[0]
    assert (optimizer.refreshes, optimizer.skipped_refreshes) == (1, 3)  # all later losses are NaN as well


# -- several optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toggle", [False, True])
def test_each_optimizer_of_a_gan_gets_the_directions_of_its_own_loss(make_trainer, toggle):
    module = Adversarial(partial(NSGD, lr=0.0, k=3, refresh_every=2), toggle=toggle)
    real = classes(16).tensors[0]
    discriminator, generator = module.losses(real)
    expected = [
        top_eigenpairs(loss, net.parameters(), k=3, max_hvps=8, repeated=False).eigenvalues
        for loss, net in ((generator, module.generator), (discriminator, module.discriminator))
    ]
    trainer = make_trainer(callbacks=[RefreshDirections(None)])
    trainer.fit(module, loader(samples=16))
    for optimizer, values in zip(trainer.optimizers, expected, strict=True):
        assert optimizer.refreshes == 1
        assert torch.tensor(optimizer.eigenvalues) == pytest.approx(values, rel=1e-4)  # float32


class TwoParts(ManualSmooth):
    """Two optimizers; the loss reaches the first net only, and of the second one weight."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.other = nn.Linear(2, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]) @ self.other.weight, batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.make(self.net.parameters()), self.make(self.other.parameters())]


@pytest.mark.parametrize(
    ("index", "refreshed"), [(None, [1, 0]), (0, [1, 0]), (1, [0, 1])], ids=["whole", "first", "partly reached"]
)
def test_of_several_optimizers_those_reached_whole_or_the_one_named(make_trainer, index, refreshed):
    module = TwoParts(partial(NSGD, lr=0.1, k=2))
    trainer = make_trainer(callbacks=[RefreshDirections(None, optimizer=index)])
    trainer.fit(module, loader(samples=16, features=2, number=2))
    assert [o.refreshes for o in trainer.optimizers] == refreshed


def test_a_loss_that_reaches_no_damped_optimizer_whole_is_passed_over(make_trainer):
    def make(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        return NSGD(params, lr=0.1, k=2) if len(params) == 2 else torch.optim.SGD(params, lr=0.1)

    trainer = make_trainer(callbacks=[RefreshDirections(None)])
    trainer.fit(TwoParts(make), loader(samples=16, features=2, number=2))
    assert sum(o.refreshes for o in trainer.optimizers if isinstance(o, NSGD)) == 0


@pytest.mark.parametrize("damped", [(True, False), (False, True), (True, True)], ids=["first", "second", "both"])
@pytest.mark.parametrize("named", [False, True])
def test_networks_with_losses_of_their_own_are_refreshed_by_these(make_trainer, damped, named):
    class Apart(TwoParts):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            losses = (F.cross_entropy(self.net(batch[0]), batch[1]), F.cross_entropy(self.other(batch[0]), batch[1]))
            for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            kinds = [partial(NSGD, k=2) if d else torch.optim.SGD for d in damped]
            parts = (self.net, self.other)
            return [kind(part.parameters(), lr=0.1) for kind, part in zip(kinds, parts, strict=True)]

    indices = [i for i, d in enumerate(damped) if d] if named else [None]
    trainer = make_trainer(callbacks=[RefreshDirections(None, optimizer=i) for i in indices])
    trainer.fit(Apart(None), loader(samples=16, features=2, number=2))
    assert [getattr(o, "refreshes", 0) for o in trainer.optimizers] == [int(d) for d in damped]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (partial(torch.optim.Adam, lr=0.1), {}, "expected an NSGD or damped optimizer, got Adam; return nsgd.NSGD"),
        (partial(NSGD, lr=0.1, k=2), {"optimizer": 1}, "expected optimizer to be an index into 1, got 1"),
        (partial(NSGD, lr=0.1, k=2), {"optimizer": -1}, "expected optimizer to be an index into 1, got -1"),
    ],
)
def test_wrong_optimizers_are_refused_before_the_first_step(make_trainer, make, options, message):
    module = Smooth(make)
    before = [p.tolist() for p in module.parameters()]
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(callbacks=[RefreshDirections(**options)]).fit(module, loader(features=2, number=2))
    assert [p.tolist() for p in module.parameters()] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "got 0"),
        ({"source": "test"}, "got 'test'"),
        ({"group_size": 0}, "group_size to be None for the default, or a whole number of at least 1, got 0"),
        ({"group_size": -3}, "group_size to be None for the default, or a whole number of at least 1, got -3"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RefreshDirections(**options)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("reduction", "count"), [("mean", 0), ("sum", 1)])
def test_samples_whose_loss_is_not_the_batches_are_said_once(make_trainer, recwarn, reduction, count, accumulate):
    class Reduced(Smooth):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1], reduction=reduction)

    trainer = make_trainer(callbacks=[RefreshDirections(16)], accumulate_grad_batches=accumulate)
    make = partial(NSGD, lr=0.01, k=2, refresh_every=1, solver="gradients")
    trainer.fit(Reduced(make), loader(features=2, number=2, samples=96))
    assert sum("have another mean" in str(w.message) for w in recwarn) == count


def test_counts_of_other_libraries_are_taken():
    callback = RefreshDirections(np.int64(4), torch.tensor(2), chunk_size=np.int32(1))
    assert callback._batches == CurvatureBatches(4, 2, "batch", 0)
    assert callback.chunk_size == 1


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return zip(*classes(32, 2, 2).tensors, strict=True)


def test_a_training_set_without_a_length_cannot_be_sampled(make_trainer):
    trainer = make_trainer(callbacks=[RefreshDirections(8, source="train")])
    with pytest.raises(ValueError, match="use source='batch'"):
        trainer.fit(Smooth(partial(NSGD, lr=0.1, k=2)), DataLoader(Endless(), batch_size=8))


# -- other people's modules and batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [partial(NSGD, lr=0.1, k=3, refresh_every=3), lambda p: damp(torch.optim.AdamW(p, lr=0.01), k=3, refresh_every=3)],
    ids=["NSGD", "damp(AdamW)"],
)
@pytest.mark.parametrize("source", SOURCES)
def test_a_strangers_module_trains_unchanged(make_trainer, make, source):
    module, logger = Regression(make), Memory()
    trainer = make_trainer(max_epochs=8, callbacks=[RefreshDirections(**source)], logger=logger)
    trainer.fit(module, DataLoader(Rows(), batch_size=32))
    optimizer = trainer.optimizers[0]
    losses = [row["mse"] for _, row in logger.rows if "mse" in row]
    assert optimizer.refreshes == 8  # of 24 steps
    assert losses[-3] < 0.9 * losses[0]  # the same batch
    assert optimizer.param_groups[0]["lr"] < 0.1  # and its scheduler ran
    assert 0 < optimizer.alignment <= 1 + 1e-6


@dataclass
class Pair:
    """A batch as a dataclass, which Lightning moves to devices too."""

    x: Tensor
    y: Tensor


class OfPairs(Smooth):
    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch.x), batch.y)


def test_the_loss_itself_needs_no_particular_kind_of_batch(make_trainer):
    data = DataLoader(
        classes(32, 2, 2), batch_size=16, collate_fn=lambda rows: Pair(*map(torch.stack, zip(*rows, strict=True)))
    )
    trainer = make_trainer(callbacks=[RefreshDirections(samples=None)])
    trainer.fit(OfPairs(partial(NSGD, lr=0.1, k=2, refresh_every=1)), data)
    assert trainer.optimizers[0].refreshes == 2


class Fails(Everything):
    """Raises at a call of training_step, counted from 1."""

    at = 3

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.calls == self.at:
            raise RuntimeError("as planned")
        return loss


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_leaves_no_hook_and_no_mode_behind(make_trainer, at):
    """Whether in the training step itself or, as calls made for directions alone count as well, inside a refresh."""
    module = Fails(partial(NSGD, lr=0.1, k=2, refresh_every=1))
    module.at = at
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    before = dict(hooks)
    with pytest.raises(RuntimeError, match="as planned"):
        make_trainer(callbacks=[RefreshDirections(5)]).fit(module, loader())
    assert dict(hooks) == before
    assert all(m.training for m in module.modules())
    assert "log" not in vars(module)


# -- what is logged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["gradients", "lanczos"])
def test_weights_eigenvalues_alignment_overlap_and_cost_are_logged_at_each_refresh(make_trainer, tmp_path, solver):
    module = Regression(partial(NSGD, lr=0.05, k=2, refresh_every=2, solver=solver))
    logger = CSVLogger(tmp_path)
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            o = trainer.optimizers[0]
            seen.append((o.weights, o.eigenvalues, o.overlap, o.alignment, o.hvps, o.cost_gradients))

    trainer = make_trainer(callbacks=[RefreshDirections(8), Look()], logger=logger, max_epochs=2)
    trainer.fit(module, DataLoader(Rows(), batch_size=32))  # 6 steps
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["nsgd/weight_1"]]
    wanted = {"weight_1", "weight_sum", "hvps", "cost_gradients", "cost_per_step", "overlap", "alignment"}
    wanted |= {"lambda_1", "lambda_sum"} if solver == "lanczos" else set()
    assert {name for name in rows[0] if name.startswith("nsgd/")} == {f"nsgd/{name}" for name in wanted}
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    for row, i in zip(rows, (0, 2, 4), strict=True):
        weights, values, overlap, _, hvps, cost = seen[i]
        for name, logged in (("weight", weights), ("lambda", values)):
            if logged:
                found = float(row[f"nsgd/{name}_1"]), float(row[f"nsgd/{name}_sum"])
                assert found == pytest.approx((max(logged), sum(logged)))
        assert (float(row["nsgd/hvps"]), float(row["nsgd/cost_gradients"])) == pytest.approx((hvps, cost))
        assert float(row["nsgd/cost_per_step"]) == pytest.approx(cost / (i + 1))
        if i == 0:  # nothing to compare with yet
            assert (row["nsgd/overlap"], row["nsgd/alignment"]) == ("", "")
        else:
            assert float(row["nsgd/overlap"]) == pytest.approx(overlap)
            assert float(row["nsgd/alignment"]) == pytest.approx(seen[i - 1][3])


@pytest.mark.parametrize("several", [False, True])
def test_the_cost_of_refreshes_is_in_the_progress_bar(make_trainer, several):
    module = (TwoParts if several else Regression)(partial(NSGD, lr=0.05, k=2, refresh_every=2))
    data = loader(samples=96, features=2, number=2) if several else DataLoader(Rows(), batch_size=16)
    seen: list[dict[str, Any]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(dict(trainer.progress_bar_metrics))

    trainer = make_trainer(callbacks=[RefreshDirections(None if several else 8), Look()], log_every_n_steps=3)
    trainer.fit(module, data)  # 6 steps of each optimizer, refreshes at 0, 2, 4
    each = trainer.optimizers[0].cost_gradients / 3
    name = "nsgd-0/cost_per_step" if several else "nsgd/cost_per_step"
    assert [list(metrics) for metrics in seen] == [[name]] * 6
    assert [metrics[name] for metrics in seen] == pytest.approx([each * -(-n // 2) / n for n in range(1, 7)])
    assert not trainer.callback_metrics.keys() & {name}


@pytest.mark.parametrize(
    ("refresh", "accumulate", "product", "fraction"),
    [
        ({"samples": 8}, 1, 2, 8 / 32),
        ({"samples": 8}, 2, 2, 8 / 64),
        ({"samples": None}, 1, 2, 1),
        ({"samples": None}, 2, 2, 1 / 2),
        ({"samples": 48, "source": "train"}, 1, 3, 48 / 32),
        ({"samples": 48, "source": "train"}, 2, 3, 48 / 64),
        ({"samples": 8}, 1, 0, 8 / 32),
        ({"samples": 8}, 2, 0, 8 / 64),
        ({"samples": 8, "group_size": 3}, 2, 0, 8 / 64),
        ({"samples": None}, 1, 0, 1),
        ({"samples": None}, 2, 0, 1 / 2),
        ({"samples": 100}, 2, 0, 1 / 2),  # more than there are
        ({"samples": 48, "source": "train"}, 1, 0, 48 / 32),
        ({"samples": 48, "source": "train"}, 2, 0, 48 / 64),
    ],
)
def test_cost_is_counted_in_gradients_of_a_training_batch(make_trainer, refresh, accumulate, product, fraction):
    """On n of B samples a refresh of m products is (1 + 2m) n/B gradients, 3m where the graph is rebuilt; of groups,
    n/B."""
    solver = "lanczos" if product else "gradients"
    module = Regression(partial(NSGD, lr=0.05, k=2, refresh_every=1, solver=solver))
    trainer = make_trainer(callbacks=[RefreshDirections(**refresh)], accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(Rows(128), batch_size=32))
    optimizer = trainer.optimizers[0]
    assert optimizer.refreshes == 4 // accumulate
    assert (optimizer.hvps > 0) == (product > 0)
    assert optimizer.cost_gradients == pytest.approx((optimizer.refreshes + product * optimizer.hvps) * fraction)


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=["slice", "whole batch", "training set"])
@pytest.mark.parametrize("solver", ["auto", "lanczos"])
@pytest.mark.parametrize("save_basis", [True, False])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_resuming_at_an_epoch_boundary_is_bitwise_uninterrupted(make_trainer, tmp_path, source, save_basis, solver):
    # Without the basis the next step refreshes in any case, once an epoch of 4 steps, and there is nothing to average.
    options = {"refresh_every": 3} if save_basis else {"refresh_every": 4, "decay": 0.0}

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = NSGD(
                self.parameters(), lr=0.1, momentum=0.9, k=3, gamma=0.1, save_basis=save_basis, solver=solver, **options
            )
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    def fit(epochs: int, resume: str | None = None) -> pl.Trainer:
        pl.seed_everything(3, verbose=False)
        saves = [ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)] if resume is None else []
        trainer = make_trainer(
            max_epochs=epochs, callbacks=[RefreshDirections(**source), *saves], enable_checkpointing=bool(saves)
        )
        trainer.fit(Scheduled(), datamodule=Digits(batch_size=50, limit=250), ckpt_path=resume)
        return trainer

    whole, resumed = fit(4), fit(4, str(tmp_path / "epoch=1.ckpt"))
    check_resumed(whole, resumed)
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.7**4)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_resuming_at_the_defaults_is_bitwise_uninterrupted(make_trainer, tmp_path, epoch):
    """When the next refresh is due, with refresh_every="auto", depends on what a checkpoint has to hold."""

    class Plain(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return NSGD(self.parameters(), lr=0.5, k=3)

    def fit(resume: str | None = None) -> pl.Trainer:
        pl.seed_everything(3, verbose=False)
        saves = [ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)] if resume is None else []
        trainer = make_trainer(max_epochs=5, callbacks=[RefreshDirections(), *saves], enable_checkpointing=bool(saves))
        trainer.fit(Plain(), datamodule=Digits(batch_size=50, limit=250), ckpt_path=resume)
        return trainer

    check_resumed(fit(), fit(str(tmp_path / f"epoch={epoch}.ckpt")))


def check_resumed(whole: pl.Trainer, resumed: pl.Trainer) -> None:
    """Parameters and optimizer state are the same to the bit."""
    ours, theirs = (t.lightning_module.state_dict() for t in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (t.optimizers[0].state_dict() for t in (resumed, whole))
    assert str(ours["param_groups"]) == str(theirs["param_groups"])  # counters, weights; NaN is not equal to itself
    assert all(torch.equal(ours["state"][i][n], v) for i, s in theirs["state"].items() for n, v in s.items())
