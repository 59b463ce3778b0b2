"""When measurements are taken, at what cost, and what they leave: files, checkpoints, one sentence for bad input."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from measured import EACH, FREQUENT, MAKERS, SGD, Counted, Stream, Tally, all_four
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from strangers import Adversarial, ManualSmooth, Smooth, loader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import RefreshDirections
from lightning_modules.callbacks.measurements.averaging import AveragingExperiment
from lightning_modules.callbacks.measurements.budget import plan
from lightning_modules.callbacks.measurements.measurement import Measurement
from lightning_modules.callbacks.measurements.quadratic import BatchQuadratic
from lightning_modules.callbacks.measurements.sharpness import SharpnessMonitor
from lightning_modules.callbacks.measurements.valley import ValleyWalk
from lightning_modules.support import quantities
from nsgd import NSGD

# -- when, and at what cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("samples", [7, 40])  # one graph, kept; three batches of 16, 16 and 8, rebuilt
@EACH
def test_the_cost_is_that_of_the_forward_passes_and_gradients_taken(
    make_trainer, monkeypatch, name, samples, accumulate
):
    tally = Tally(monkeypatch)
    options = {} if name == "quadratic" else {"samples": samples}
    callback = tally.around(FREQUENT[name](**options))
    monkeypatch.setattr(Counted, "tally", tally)
    make_trainer(callbacks=[callback], accumulate_grad_batches=accumulate).fit(
        Counted(SGD), loader(samples=112, features=2, number=2)
    )
    assert callback.gradients > 2
    assert callback.gradients == pytest.approx(tally.work / (16 * accumulate), rel=1e-12)
    assert callback.seconds > 0


def test_the_cost_of_damped_directions_is_counted(make_trainer, monkeypatch):
    tally = Tally(monkeypatch)
    callback = tally.around(SharpnessMonitor(samples=7, every=3, k=2, products=6))
    monkeypatch.setattr(Counted, "tally", tally)
    module = Counted(partial(NSGD, lr=0.1, k=2, gamma=0.1, refresh_every=2))
    make_trainer(callbacks=[callback, RefreshDirections(4)]).fit(module, loader(samples=112, features=2, number=2))
    assert any(r["quantity"] == "felt sharpness" for r in callback.rows)
    assert callback.gradients == pytest.approx(tally.work / 16, rel=1e-12)


def images(samples: int = 1437) -> DataLoader[Any]:
    """As large as the digits."""
    return DataLoader(TensorDataset(torch.rand(samples, 64), torch.arange(samples) % 10), batch_size=128)


class Digitlike(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(64, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_at_their_defaults_each_costs_about_the_overhead(make_trainer):
    steps = 320
    callbacks = [make() for make in MAKERS.values()]
    make_trainer(callbacks=callbacks, max_steps=steps, max_epochs=-1).fit(Digitlike(), images())
    for callback in callbacks:
        assert 0.05 * steps < callback.gradients <= 0.2 * steps, type(callback).__name__
        starts = sorted({r["measurement"] for r in callback.rows})
        assert starts == list(range(1, len(starts) + 1))
    valley, quadratic, sharpness, averaging = callbacks
    assert {r["step"] for r in averaging.rows} == {steps}
    for callback in (valley, quadratic, sharpness):
        first, last = (end({r["step"] for r in callback.rows}) for end in (min, max))
        once = len({r["measurement"] for r in callback.rows}) == 1
        middle = (steps - callback.length) // 2
        assert (first, last) == ((middle, middle + callback.length - 1) if once else (0, steps - 1))
    assert len({r["measurement"] for r in quadratic.rows}) == 4  # at 11 gradients each, of 0.15 x 320
    assert len({r["measurement"] for r in sharpness.rows}) >= 3


@pytest.mark.parametrize("overhead", [0.05, 0.15, 1.0])
@pytest.mark.parametrize("samples", [None, 20, 300])
@pytest.mark.parametrize("steps", [200, 5000])
@EACH
def test_a_plan_costs_no_more_than_the_overhead_and_is_spread(name, steps, samples, overhead):
    callback, batch = MAKERS[name](), 128
    found = plan(
        steps=steps,
        price=callback.price(2),
        fixed=callback.fixed_price(),
        samples=0 if name == "quadratic" else samples,
        times=callback.times,
        length=callback.length,
        overhead=overhead,
        batch=batch,
        most=batch,
    )
    cost = callback.fixed_price() + callback.price(2) * found.samples / batch
    if len(found.starts) > 1:
        assert len(found.starts) * cost <= overhead * steps
        gaps = [b - a for a, b in zip(found.starts, found.starts[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1
        assert (found.starts[0], found.starts[-1]) == (0, steps - callback.length)
    assert 1 <= len(found.starts) <= callback.times
    assert found.samples == samples or name == "quadratic" or (samples is None and 16 <= found.samples <= batch)


@pytest.mark.parametrize("name", ["valley", "quadratic", "sharpness"])
def test_a_short_run_is_measured_once_in_its_middle(make_trainer, name):
    options = {"length": 3, "points": 2} if name == "valley" else {}
    callback = MAKERS[name](overhead=1e-6, **options)
    make_trainer(callbacks=[callback], max_epochs=2).fit(Smooth(SGD), loader(features=2, number=2, samples=128))
    first = 6 if name == "valley" else 7  # of 16 steps
    assert {r["measurement"] for r in callback.rows} == {1}
    assert {r["step"] for r in callback.rows} == ({6, 7, 8} if name == "valley" else {first})
    if name != "quadratic":
        assert sum(n for _, n in callback.evaluation.parts) == 16


def test_every_says_when_and_samples_how_many(make_trainer):
    callbacks = [BatchQuadratic(every=3), SharpnessMonitor(samples=20, every=4, k=1, products=2, batches=1)]
    trainer = make_trainer(callbacks=callbacks, accumulate_grad_batches=2, max_epochs=3)
    trainer.fit(Smooth(SGD), loader(features=2, number=2, samples=96))
    assert trainer.global_step == 9
    assert sorted({r["step"] for r in callbacks[0].rows}) == [0, 3, 6]
    assert sorted({r["step"] for r in callbacks[1].rows}) == [0, 4, 8]
    assert [n for _, n in callbacks[1].evaluation.parts] == [10, 10]  # no batch is short
    assert [max(r["measurement"] for r in c.rows) for c in callbacks] == [3, 3]  # not again at every micro-batch


def test_every_takes_as_many_samples_as_the_overhead_pays(make_trainer):
    """Of the steps between two measurements, and 16 at least, as where measurements are spread over the run."""
    cheap = partial(SharpnessMonitor, k=1, brief=True, products=5)
    callbacks = [cheap(every=4), cheap(every=40, seed=1), cheap(every=4, overhead=100.0)]
    make_trainer(callbacks=callbacks, max_steps=41, max_epochs=-1).fit(Digitlike(), images())
    counts = [sum(n for _, n in callback.evaluation.parts) for callback in callbacks]
    assert counts == [16, int(0.15 * 40 / (1 + 2 * 5) * 128), 128]


def test_every_needs_no_number_of_steps(make_trainer):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 10

    callback = BatchQuadratic(every=4)
    make_trainer(callbacks=[callback, Stop()], max_epochs=-1).fit(Smooth(SGD), loader(features=2, number=2))
    assert sorted({r["step"] for r in callback.rows}) == [0, 4, 8]


def test_nothing_as_large_as_the_parameters_is_kept_between_measurements(make_trainer):
    class Look(pl.Callback):
        def __init__(self) -> None:
            self.kept: list[dict[str, list[str]]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            size = 12
            self.kept.append(
                {
                    c.name: [
                        k
                        for holder in (c, c.budget, c.evaluation, c.table)
                        for k, v in vars(holder).items()
                        if isinstance(v, Tensor) and v.numel() >= size
                    ]
                    for c in trainer.callbacks
                    if isinstance(c, Measurement)
                }
            )

    look = Look()
    make_trainer(callbacks=[*all_four(), look]).fit(Smooth(SGD), loader(features=2, number=2, samples=128))
    burst, between = look.kept[1], look.kept[3]  # three steps of every four
    assert sorted(burst.pop("valley")) == ["_gradient", "_last", "_start"]
    assert between.pop("valley") == ["_start"]
    assert not any(burst.values())
    assert not any(between.values())


@EACH
def test_every_quantity_has_its_name_in_the_module_that_reports_share(make_trainer, name):
    callback = FREQUENT[name]()
    make_trainer(callbacks=[callback]).fit(Smooth(SGD), loader(features=2, number=2, samples=112))
    names = {value for value in vars(quantities).values() if isinstance(value, str)}
    assert {row["quantity"] for row in callback.rows} <= names
    assert callback.name in quantities.MEASUREMENTS


# -- files and checkpoints -------------------------------------------------------------------------------------------


@EACH
def test_the_file_holds_the_rows(make_trainer, tmp_path, name):
    callback = FREQUENT[name]()
    make_trainer(callbacks=[callback]).fit(Smooth(SGD), loader(features=2, number=2, samples=112))
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["measurement", "step", "quantity", "of", "at", "value"]
        found = list(reader)
    assert found == [{key: str(value) for key, value in row.items()} for row in callback.rows]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.csv"}


def test_a_second_run_overwrites_nothing_and_begins_anew(make_trainer, tmp_path):
    callback = BatchQuadratic(every=3)
    texts = []
    for i in range(3):
        again = callback if i < 2 else BatchQuadratic(every=3)
        make_trainer(callbacks=[again]).fit(Smooth(SGD), loader(features=2, number=2))
        texts.append([(r["measurement"], r["step"], r["value"]) for r in again.rows])
        cost = again.gradients
    assert texts[0] == texts[1] == texts[2]
    assert cost == callback.gradients
    files = [(tmp_path / f"{stem}.csv").read_text() for stem in ("quadratic", "quadratic-1", "quadratic-2")]
    assert files[0] == files[1] == files[2] != ""


def test_a_path_is_taken_and_an_existing_file_left(make_trainer, tmp_path):
    path = tmp_path / "a" / "b.results.csv"
    for _ in range(2):
        make_trainer(callbacks=[BatchQuadratic(every=3, path=str(path))]).fit(Smooth(SGD), loader(features=2, number=2))
    assert {p.name for p in path.parent.iterdir()} == {"b.results.csv", "b.results-1.csv"}


def test_the_file_lies_in_the_folder_of_the_logger(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path / "logs", name="run")
    make_trainer(callbacks=all_four(), logger=logger).fit(Smooth(SGD), loader(features=2, number=2, samples=112))
    found = {path.name for path in Path(logger.log_dir).glob("*.csv")}
    assert {"valley.csv", "quadratic.csv", "sharpness.csv", "averaging.csv"} <= found
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_a_resumed_run_has_the_rows_of_the_uninterrupted_one(make_trainer, tmp_path):
    data = partial(loader, features=2, number=2, samples=96)  # six steps an epoch

    def callbacks() -> list[Any]:
        spread = [SharpnessMonitor(k=1, products=3, batches=1, overhead=10.0), BatchQuadratic(overhead=3.0)]
        return [ValleyWalk(samples=8, every=6, length=5, points=2), *spread, AveragingExperiment(steps=8)]

    whole = callbacks()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    make_trainer(callbacks=[*whole, checkpoint], max_epochs=4, enable_checkpointing=True).fit(Smooth(SGD), data())
    for epoch in (0, 2):
        again = callbacks()
        trainer = make_trainer(callbacks=[*again, checkpoint], max_epochs=4, enable_checkpointing=True)
        trainer.fit(Smooth(SGD), data(), ckpt_path=tmp_path / "checkpoints" / f"epoch={epoch}.ckpt")
        for one, other in zip(whole, again, strict=True):
            assert len({r["measurement"] for r in one.rows}) >= 3 or one.name == "averaging"
            assert [repr(r) for r in other.rows] == [repr(r) for r in one.rows], one.name  # NaN equals NaN
            assert other.gradients == pytest.approx(one.gradients)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(ValleyWalk, samples=0),
            "expected samples to be None for the default, or a whole number of at least 1, got 0",
        ),
        (
            partial(SharpnessMonitor, samples=True),
            "expected samples to be None for the default, or a whole number of at least 1.*got True",
        ),
        (
            partial(SharpnessMonitor, samples=2.0),
            "expected samples to be None for the default, or a whole number of at least 1.*got 2.0",
        ),
        (
            partial(BatchQuadratic, every=0),
            "expected every to be None for the default, or a whole number of at least 1, got 0",
        ),
        (partial(BatchQuadratic, overhead=0.0), "expected overhead to be a finite number above 0, got 0.0"),
        (partial(BatchQuadratic, overhead=math.nan), "expected overhead to be a finite number above 0, got nan"),
        (partial(AveragingExperiment, overhead=math.inf), "expected overhead to be a finite number above 0, got inf"),
        (partial(ValleyWalk, length=0), "expected length to be a whole number of at least 1, got 0"),
        (partial(ValleyWalk, points=1), "expected points to be a whole number of at least 2, got 1"),
        (partial(ValleyWalk, every=39), "expected every of at least 40, the steps of a burst, got 39"),
        (partial(SharpnessMonitor, k=0), "expected k to be a whole number of at least 1, got 0"),
        (partial(SharpnessMonitor, k=5, products=5), "expected products to be a whole number of at least 6, got 5"),
        (partial(SharpnessMonitor, batches=0), "expected batches to be a whole number of at least 1, got 0"),
        (partial(AveragingExperiment, steps=7), "expected steps to be a whole number of at least 8, got 7"),
        (partial(AveragingExperiment, lr=0.0), "expected lr to be a finite number above 0, or None, got 0.0"),
        (partial(AveragingExperiment, lr=math.inf), "expected lr to be a finite number above 0, or None, got inf"),
    ],
)
def test_bad_options_are_said_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_of_other_libraries_are_taken():
    callback = SharpnessMonitor(samples=np.int64(7), every=torch.tensor(3), k=np.int32(2), products=np.int64(6))
    assert (callback.samples, callback.budget.every, callback.k, callback.products) == (7, 3, 2, 6)
    assert {type(count) for count in (callback.samples, callback.budget.every, callback.k, callback.products)} == {int}


@EACH
def test_an_unknown_number_of_steps_is_said(make_trainer, name):
    with pytest.raises(ValueError, match=r"number of steps is not known; give every=, or the trainer max_steps="):
        make_trainer(callbacks=[MAKERS[name]()], max_epochs=-1).fit(Smooth(SGD), loader(features=2, number=2))


@EACH
def test_a_stream_is_refused(make_trainer, name):
    with pytest.raises(ValueError, match=f"DataLoader over an IterableDataset; take {MAKERS[name].__name__} out"):
        make_trainer(callbacks=[FREQUENT[name]()], max_steps=3).fit(Smooth(SGD), DataLoader(Stream(), batch_size=4))


@pytest.mark.parametrize("module", [ManualSmooth, partial(Adversarial, toggle=True)], ids=["own loop", "GAN"])
@EACH
def test_manual_optimization_without_a_curvature_loss_is_refused(make_trainer, name, module):
    features = 2 if module is ManualSmooth else 6
    with pytest.raises(ValueError, match="define curvature_loss"):
        make_trainer(callbacks=[FREQUENT[name]()]).fit(module(SGD), loader(features=features, number=2))


@pytest.mark.parametrize(("name", "batches"), [("quadratic", 2), ("sharpness", 2)])
def test_a_training_set_of_fewer_batches_is_refused(make_trainer, name, batches):
    callback = MAKERS[name](**({"batches": batches} if name == "sharpness" else {}))
    with pytest.raises(
        ValueError, match=rf"training set of {batches} batches or more, got 48 samples for batches of 4"
    ):
        make_trainer(callbacks=[callback]).fit(Smooth(SGD), loader(40, features=2, number=2))


def test_an_evaluation_set_takes_what_there_is(make_trainer):
    callback = ValleyWalk(samples=500, length=2)
    make_trainer(callbacks=[callback]).fit(Smooth(SGD), loader(features=2, number=2))
    assert [n for _, n in callback.evaluation.parts] == [16, 16, 16]


@pytest.mark.filterwarnings("ignore:SharpnessMonitor at step .* above the limit of stable steps:UserWarning")
@pytest.mark.parametrize("lr", [30.0, 1e4])
@EACH
def test_a_diverging_run_is_not_ended(make_trainer, name, lr):
    """The losses go through all magnitudes up to infinity, and to NaN."""

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - 1).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=lr)

    torch.manual_seed(0)
    options = {"lr": lr} if name == "averaging" else {}
    callback, module = FREQUENT[name](**options), Line()
    steps = 2 if name == "averaging" else 24
    trainer = make_trainer(callbacks=[callback], max_steps=steps)
    trainer.fit(module, loader(8, features=2, samples=192))
    assert trainer.global_step == steps
    assert callback.rows
    assert all(bool(p.isfinite().all()) for p in module.parameters()) == (name == "averaging")
