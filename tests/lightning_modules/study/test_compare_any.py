"""A study of modules and data that are not ours: what they log is what is compared, and any method trains them."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from studies import OPTIONS, silent
from torch import nn

from lightning_modules.commands.main import main
from lightning_modules.report.study.report import write_report
from lightning_modules.study.compare import run_study
from lightning_modules.study.methods import NSGDOptions
from lightning_modules.study.options import Study
from lightning_modules.study.runs.plan import plan_runs
from lightning_modules.study.runs.subject import Subject
from lightning_modules.support.files import read_csv

MODULE = '''
from pathlib import Path
from statistics import fmean
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

def samples(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x @ torch.tensor([1.0, -1.0, 0.5, 2.0]) + x[:, 0] * x[:, 1])[:, None])

class Mine(pl.LightningModule):
    def __init__(self, width: int = 8, dropout: float = 0.2):
        super().__init__()
        hidden = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout)
        self.body = nn.Sequential(*hidden, nn.Linear(width, 1))
        self.calls = 0

    def training_step(self, batch):
        self.calls += 1
        loss = nn.functional.mse_loss(self.body(batch[0]), batch[1])
        self.log("loss", loss)
        return {"loss": loss, "other": 1}

    def judge(self, batch, stage):
        error = nn.functional.mse_loss(self.body(batch[0]), batch[1])
        self.log_dict({f"{stage}/error": error, f"{stage}/r2": 1 - error / 7.0}, batch_size=len(batch[0]))

    def validation_step(self, batch, batch_idx):
        self.judge(batch, "val")

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

class Tested(Mine):
    def test_step(self, batch, batch_idx):
        self.judge(batch, "test")

class Data(pl.LightningDataModule):
    def __init__(self, batch: int = 10, count: int = 50):
        super().__init__()
        self.batch, self.count = batch, count

    def setup(self, stage):
        if stage in ("fit", "test"):  # as many do, nothing for "validate"
            self.train, self.held_out = samples(self.count, 0), samples(30, 1)

    def train_dataloader(self):
        return DataLoader(self.train, self.batch, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.held_out, 8)

    test_dataloader = val_dataloader

class Alone(Mine):
    def train_dataloader(self):
        return DataLoader(samples(50, 0), 10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(samples(30, 1), 8)

class Manual(Mine):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

class Reading(Mine):
    def training_step(self, batch, batch_idx):
        found = super().training_step(batch)
        self.seen = float(found["loss"])  # which torch.func.vmap does not do
        return found


class Normless(Mine):
    def __init__(self, dropout: float = 0.0):
        super().__init__(dropout=dropout)
        self.body[1] = nn.Identity()

class Frozen(Mine):
    """Its BatchNorm stays as it was pretrained, and a second network has one that training never runs."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.BatchNorm1d(1)
        for norm in (self.body[1], self.teacher):
            norm.running_mean.fill_(3.0)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.body[1].eval()
        return self

    def judge(self, batch, stage):
        super().judge(batch, stage)
        self.log(f"{stage}_loss", self.body[1].running_mean.mean() + 10 * self.teacher.running_mean.mean())

class Named(Mine):
    """With attributes that SAM's options are called too, a loss that goes by the batch's number, and a logger."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.momentum, self.rho = 0.996, "mine"

    @property
    def lr(self):
        return 1e-9

    def training_step(self, batch, batch_idx):
        assert (self.momentum, self.rho) == (0.996, "mine")
        self.logger.experiment.add_scalar("x", 1.0)
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        factor = (1 + batch_idx) * (1 + self.trainer.current_epoch)
        return factor * nn.functional.mse_loss(self.body(batch[0]), batch[1])

class Both(Mine):
    """The same name in validation and test, and names that are the study's own."""

    def judge(self, batch, stage):
        self.log("acc", {"val": 0.25, "test": 0.75}[stage], logger=False)
        self.log_dict({"train_loss": 777.0, "lr": 5.0, "seed": 9.0})

    def test_step(self, batch, batch_idx):
        self.judge(batch, "test")

class Stopping(Mine):
    def configure_callbacks(self):
        return [pl.callbacks.EarlyStopping("val/error", min_delta=1e9, patience=0), pl.callbacks.LearningRateMonitor()]

class WarmUp(Mine):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)

class Skips(Mine):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch)

class OwnSetup(Mine):
    def prepare_data(self):
        self.prepared = True

    def setup(self, stage):
        self.data = samples(50, 0), samples(30, 1)

    def train_dataloader(self):
        return DataLoader(self.data[0], 10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data[1], 8)

class Typed(Mine):
    def __init__(self, path: Path = Path("a"), activation: type[nn.Module] = nn.ReLU, more: nn.Module | None = None):
        super().__init__()
        assert isinstance(path, Path) and activation is nn.Sigmoid and isinstance(more, nn.Identity)

class SplitsAnew(Data):
    """At every setup, without a generator of its own."""

    def setup(self, stage):
        self.train, self.held_out = random_split(samples(80, 0), [50, 30])

class Drawing(Data):
    """A generator of its own, made once, and half of its options saved."""

    def __init__(self, batch: int = 10, count: int = 50):
        super().__init__(batch, count)
        self.save_hyperparameters("batch")
        self.generator = torch.Generator().manual_seed(5)

    def train_dataloader(self):
        return DataLoader(self.train, self.batch, shuffle=True, generator=self.generator)

class OfDicts(Mine):
    def training_step(self, batch):
        return nn.functional.mse_loss(self.body((batch["x"] - 0.5) / 2), batch["y"])

    def judge(self, batch, stage):
        super().judge(((batch["x"] - 0.5) / 2, batch["y"]), stage)

class Consumes(OfDicts):
    """The same, and of its batch nothing is left as it was: one part is taken out, the other normalised in place."""

    def training_step(self, batch):
        y = batch.pop("y")
        return nn.functional.mse_loss(self.body(batch["x"].sub_(0.5).div_(2)), y)

class Dicts(Data):
    def setup(self, stage):
        super().setup(stage)
        self.train, self.held_out = ([{"x": x, "y": y} for x, y in part] for part in (self.train, self.held_out))

class Stream(IterableDataset):
    def __iter__(self):
        yield from samples(50, 0)

class Endless(Data):
    def train_dataloader(self):
        return DataLoader(Stream(), 10)

class Empty(pl.LightningDataModule):
    pass
'''
_numbers = itertools.count()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a user, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("COLUMNS", "200")
    name = f"somebodys_module_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


def study(own: str, model: str = "Mine", **options: Any) -> Study:
    module = __import__(own)
    data = module.Data()
    data.save_hyperparameters({"batch": 10, "count": 50})
    config = {"class_path": f"{own}.{model}", "init_args": options.pop("init_args", {})}
    given = {"data": data, "monitor": "val/error", "methods": ["sgd", "nsgd"], "seeds": 1, "epochs": 2, "lr": 0.05}
    return Study(**{**given, "model": config, "nsgd": OPTIONS, **options})


def ran(folder: Path, chosen: Study) -> Path:
    assert run_study(chosen, folder, silent) == []
    return folder


# -- what is compared ------------------------------------------------------------------------------------------------


def test_scores_are_the_modules_own_and_the_training_loss_is_without_dropout(own, tmp_path):
    """Against a plain loop: the same seed, loader and steps, evaluated by hand."""
    folder = ran(tmp_path / "out", study(own, methods=["sgd"]))
    pl.seed_everything(0, verbose=False)
    module = __import__(own)
    net, train, held_out = module.Mine().body, module.samples(50, 0), module.samples(30, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses, data = [], module.Data()
    data.setup("fit")
    for _ in range(2):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        for _ in data.val_dataloader():  # draws from the global random state, as any loader does
            pass
    assert [row["loss"] for row in read_csv(folder / "runs" / "sgd-0" / "metrics.csv")] == losses
    last = read_csv(folder / "results.csv")[0]
    # One calibration batch holds all 50: statistics are its own.
    mean, variance = net[0](train.tensors[0]).mean(0), net[0](train.tensors[0]).var(0)
    net[1].running_mean, net[1].running_var = mean.detach(), variance.detach()
    net.eval()
    for name, part in (("train_loss", train), ("val/error", held_out)):
        x, y = part.tensors
        assert last[name] == pytest.approx(nn.functional.mse_loss(net(x), y).item(), rel=1e-4)
    measures = [row["measure"] for row in read_csv(folder / "summary.csv") if row["read_out"] == "last"]
    assert measures == ["val/error", "train_loss"]  # there is no test_step
    assert [row["val/error"] for row in read_csv(folder / "runs" / "sgd-0" / "metrics.csv") if "val/error" in row]


def test_a_test_is_made_where_there_is_one(own, tmp_path):
    folder = ran(tmp_path / "out", study(own, "Tested", methods=["sgd"]))
    row = read_csv(folder / "results.csv")[0]
    assert row["test/error"] == pytest.approx(row["val/error"])  # the same data
    measures = [row["measure"] for row in read_csv(folder / "summary.csv") if row["read_out"] == "last"]
    assert measures == ["test/error", "val/error", "train_loss"]


@pytest.mark.parametrize("monitor", ["val/error", "val/r2"])
def test_trials_are_chosen_by_what_is_monitored_where_no_validation_loss_is_logged(own, tmp_path, monitor):
    chosen = study(own, tune=3, lr=None, monitor=monitor, mode="max" if monitor == "val/r2" else "min")
    folder = ran(tmp_path / "out", chosen)
    trials = [row for row in read_csv(folder / "tuning.csv") if row["method"] == "sgd"]
    means = {lr: fmean(row[monitor] for row in trials if row["lr"] == lr) for lr in {row["lr"] for row in trials}}
    best = (max if monitor == "val/r2" else min)(means, key=means.__getitem__)
    settled = yaml.safe_load((folder / "settled.yaml").read_text())
    assert (len(trials), settled["settings"]["sgd"]["lr"]) == (9, best)
    assert settled["target"] == pytest.approx(means[best], rel=1e-12)
    assert {row["reached"] for row in read_csv(folder / "target.csv")} <= {0, 1}


# -- every method on any module --------------------------------------------------------------------------------------


def test_runs_are_paired_so_that_gamma_one_and_rho_zero_are_sgd(own, tmp_path):
    """With dropout, BatchNorm and a loader that shuffles by the global random state."""
    settings = {"sam": {"rho": 0.0, "momentum": 0.0}}
    options = NSGDOptions(k=2, gamma=1.0, refresh_every=2, samples=8, group_size=4, solver="gradients")
    folder = ran(
        tmp_path / "out",
        study(own, methods=["sgd", "nsgd", "random", "sam"], nsgd=options, settings=settings),
    )
    sgd, *others = (read_csv(folder / "runs" / f"{m}-0" / "metrics.csv") for m in ("sgd", "nsgd", "random", "sam"))
    rows = {(row["method"], row["read_out"]): row for row in read_csv(folder / "results.csv")}
    for run in (others[0], others[2]):
        assert [row["loss"] for row in run] == [row["loss"] for row in sgd]
    for read_out in ("last", "ema", "swa", "two-point"):
        assert rows["nsgd", read_out]["val/error"] == rows["sgd", read_out]["val/error"]
        assert rows["sam", read_out]["val/error"] == rows["sgd", read_out]["val/error"]
    assert rows["sam", "last"]["gradients"] == 2 * rows["sgd", "last"]["gradients"]


@pytest.mark.parametrize("model", ["Mine", "Reading"])
def test_a_run_notes_that_samples_were_taken_one_by_one(own, tmp_path, model):
    options = NSGDOptions(k=2, refresh_every=2, samples=8, group_size=4, solver="gradients")
    folder = ran(tmp_path / "out", study(own, model, nsgd=options))
    noted = {m: (folder / "runs" / f"{m}-0" / "run.yaml").read_text() for m in ("sgd", "nsgd")}
    found = {method: "samples_one_by_one: true" in text for method, text in noted.items()}
    assert found == {"sgd": False, "nsgd": model == "Reading"}
    assert ("taken one by one" in write_report(folder).read_text()) == found["nsgd"]


def test_sam_on_any_module_moves_and_leaves_its_counters(own, tmp_path):
    folder = ran(tmp_path / "out", study(own, methods=["sgd", "sam"], settings={"sam": {"rho": 0.5, "momentum": 0.0}}))
    sgd, sam = (read_csv(folder / "runs" / f"{m}-0" / "metrics.csv") for m in ("sgd", "sam"))
    assert sgd[0]["loss"] == sam[0]["loss"]
    assert sgd[1]["loss"] != sam[1]["loss"]


def test_a_module_with_loaders_of_its_own_needs_no_data(own, tmp_path):
    with_data = ran(tmp_path / "with", study(own))
    alone = ran(tmp_path / "alone", study(own, "Alone", data=None))
    rows = [read_csv(folder / "results.csv") for folder in (with_data, alone)]
    assert rows[0] == rows[1]
    assert yaml.safe_load((alone / "config.yaml").read_text())["data"] is None


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_layers_that_training_leaves_alone_keep_their_statistics(own, tmp_path):
    folder = ran(tmp_path / "out", study(own, "Frozen", methods=["sgd"]))
    assert {row["val_loss"] for row in read_csv(folder / "results.csv")} == {33.0}  # in each read-out


def test_sam_leaves_attributes_of_the_module_alone_and_takes_the_losses_of_its_step(own, tmp_path):
    settings = {"sam": {"rho": 0.0, "momentum": 0.0}}
    folder = ran(tmp_path / "out", study(own, "Named", methods=["sgd", "sam"], settings=settings))
    sgd, sam = (read_csv(folder / "runs" / f"{m}-0" / "metrics.csv") for m in ("sgd", "sam"))
    assert [row["loss"] for row in sam] == [row["loss"] for row in sgd]
    assert sgd[-1]["loss"] != sgd[0]["loss"]
    rows = {(row["method"], row["read_out"]): row for row in read_csv(folder / "results.csv")}
    for read_out in ("last", "ema", "swa", "two-point"):
        assert rows["sgd", read_out]["train_loss"] == rows["sam", read_out]["train_loss"]
    # All read-outs at the same epoch: the average of the last steps is near the last one, not half of it.
    assert rows["sgd", "two-point"]["train_loss"] == pytest.approx(rows["sgd", "last"]["train_loss"], rel=0.3)


@pytest.mark.parametrize("solver", ["differences", "gradients", "lanczos"])
def test_a_step_that_consumes_its_batch_is_compared_like_one_that_does_not(own, tmp_path, solver):
    """Each read-out takes its training loss and its BatchNorm statistics from the same batches as the one before."""
    options = replace(OPTIONS, solver=solver, group_size=4)
    given: dict[str, Any] = {"data": __import__(own).Dicts(), "data_config": {"class_path": f"{own}.Dicts"}}
    given |= {"methods": ["sgd", "nsgd", "sam"], "nsgd": options}
    folders = {name: ran(tmp_path / name, study(own, name, **given)) for name in ("OfDicts", "Consumes")}
    rows = read_csv(folders["OfDicts"] / "results.csv")
    assert len({row["train_loss"] for row in rows}) == len({row["val/error"] for row in rows}) == 3 * 4  # read-outs
    assert read_csv(folders["Consumes"] / "results.csv") == rows
    for method in ("sgd", "nsgd", "sam"):
        losses = [
            [row["loss"] for row in read_csv(folder / "runs" / f"{method}-0" / "metrics.csv")]
            for folder in folders.values()
        ]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 10


def test_names_of_validation_test_and_the_study_do_not_get_mixed_up(own, tmp_path):
    (row, *_) = read_csv(ran(tmp_path / "out", study(own, "Both", methods=["sgd"], monitor="acc")) / "results.csv")
    assert (row["acc"], row["test_acc"], row["seed"], row["lr"]) == (0.25, 0.75, 0, 0.05)
    assert row["train_loss"] < 100


def test_callbacks_of_the_module_do_not_end_its_runs(own, tmp_path):
    rows = read_csv(ran(tmp_path / "out", study(own, "Stopping", methods=["sgd"], epochs=3)) / "results.csv")
    assert [row["step"] for row in rows] == [15] * 4


def test_a_batch_that_is_passed_over_has_no_loss(own, tmp_path):
    folder = ran(tmp_path / "out", study(own, "Skips", methods=["sgd"]))
    losses = [row["loss"] for row in read_csv(folder / "runs" / "sgd-0" / "metrics.csv")]
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False, False] * 2


def test_a_module_that_sets_up_its_own_loaders_is_set_up(own, tmp_path):
    rows = read_csv(ran(tmp_path / "out", study(own, "OwnSetup", data=None, methods=["sgd"])) / "results.csv")
    assert rows == read_csv(ran(tmp_path / "with", study(own, methods=["sgd"])) / "results.csv")


def test_data_that_split_at_random_whenever_they_are_set_up_are_split_once_for_a_run(own, tmp_path):
    """The last weights score what the last validation in training said: on the same samples."""
    data = __import__(own).SplitsAnew()
    config = {"class_path": f"{own}.SplitsAnew"}
    folder = ran(tmp_path / "out", study(own, "Normless", data=data, data_config=config, methods=["sgd"]))
    steps = read_csv(folder / "runs" / "sgd-0" / "metrics.csv")
    assert read_csv(folder / "results.csv")[0]["val/error"] == steps[-1]["val/error"]


def test_every_run_finds_the_data_as_the_first_one_did(own, tmp_path):
    """A generator that a data module makes once goes on from run to run otherwise."""
    data = __import__(own).Drawing()
    config, options = (
        {"class_path": f"{own}.Drawing"},
        NSGDOptions(k=2, gamma=1.0, samples=8, group_size=4, solver="gradients"),
    )
    folder = ran(tmp_path / "out", study(own, data=data, data_config=config, nsgd=options))
    sgd, nsgd = (read_csv(folder / "runs" / f"{m}-0" / "metrics.csv") for m in ("sgd", "nsgd"))
    assert [row["loss"] for row in nsgd] == [row["loss"] for row in sgd]


def test_a_run_that_something_ends_early_dies(own, tmp_path, monkeypatch):
    class Stop(pl.Callback):
        seconds = 0.0

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 3

    monkeypatch.setattr("lightning_modules.study.runs.train.make_measurements", lambda *_, **__: [Stop()])
    said: list[str] = []
    with pytest.raises(ValueError, match="no run of the study survived"):
        run_study(study(own, methods=["sgd"]), tmp_path / "out", silent, say=said.append)
    assert any("expected 10 steps, 3 were made" in words for words in said)


def test_a_module_that_breaks_is_said_and_does_not_end_the_study_of_others(own, tmp_path, monkeypatch):
    def broken(self: Any, batch: Any) -> Any:
        raise ZeroDivisionError("as planned")

    chosen = study(own, methods=["sgd"])
    monkeypatch.setattr(__import__(own).Mine, "training_step", broken)
    said: list[str] = []
    with pytest.raises(ValueError, match="no run of the study survived"):
        run_study(chosen, tmp_path / "out", silent, say=said.append)
    assert said[0] == (
        "1 run to make, 1 at a time: no time is predicted, for a first step ended with ZeroDivisionError: as planned"
    )


# -- the command -----------------------------------------------------------------------------------------------------

MINE = ["--model", "{}.Mine", "--data", "{}.Data"]
SMALL = ["--methods", "[sgd-momentum,nsgd-momentum]", "--seeds", "2", "--epochs", "2", "--nsgd.samples", "8"]


def results(folder: str) -> list[bytes]:
    return [Path(folder, name).read_bytes() for name in ("config.yaml", "results.csv", "summary.csv")]


def test_the_command_trains_a_users_module_in_processes_and_by_its_config(own, capsys):
    """Options reach model and data, also those of data that keep no hyperparameters, in every process."""
    args = ["--model", f"{own}.Tested", "--model.width", "5", "--data", f"{own}.Data", "--data.batch", "25", *SMALL]
    assert main(["compare", *args, "--monitor", "val/error", "--jobs", "2", "--out", "two"]) == 0
    out = capsys.readouterr().out
    assert "on Data: Tested, 2 epochs, 2 seeds" in out
    assert "difference in test error" in out or "test of test error" in out
    assert "a significant" not in out
    assert main(["compare", *args, "--monitor", "val/error", "--out", "one"]) == 0
    assert results("two") == results("one")
    config = yaml.safe_load(Path("two/config.yaml").read_text())
    assert config["model"] == {"class_path": f"{own}.Tested", "init_args": {"width": 5, "dropout": 0.2}}
    assert config["data"]["init_args"] == {"batch": 25, "count": 50}
    assert (config["monitor"], config["mode"]) == ("val/error", "min")
    assert read_csv(Path("two/results.csv"))[0]["step"] == 4
    assert main(["compare", "two/config.yaml", "--out", "again"]) == 0
    assert results("again") == results("one")
    page = Path("two/report.html").read_text()
    assert "Test error" in page
    assert "validation-error" in {path.stem for path in Path("two").glob("*.png")}


def test_a_language_model_takes_its_vocabulary_from_its_data(own, capsys):
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 80)
    args = ["--model", "LanguageModel", "--model.dim", "8", "--model.depth", "1", "--model.context", "16"]
    args += ["--data.path", "text.txt", "--data.context", "16", "--data.batch_size", "32", *SMALL]
    assert main(["compare", *args, "--data", "Characters", "--out", "a"]) == 0
    assert main(["compare", *args, "--out", "b"]) == 0  # characters are its data
    assert results("a") == results("b")
    assert "Test loss, mean over" in capsys.readouterr().out
    assert yaml.safe_load(Path("a/config.yaml").read_text())["model"]["init_args"]["vocabulary"] == 29


@pytest.mark.slow
def test_options_of_any_type_reach_every_process(own):
    """Paths, classes and modules in modules; and all options of data that saved some of them only."""
    typed = ["--model.path", "b", "--model.activation", "torch.nn.Sigmoid", "--model.more", "torch.nn.Identity"]
    args = ["--model", f"{own}.Typed", *typed, "--data", f"{own}.Drawing", "--data.count", "20", *SMALL]
    args += ["--monitor", "val/error"]
    assert main(["compare", *args, "--out", "one"]) == 0
    assert main(["compare", *args, "--out", "two", "--jobs", "2"]) == 0
    assert results("one") == results("two")
    assert read_csv(Path("one/results.csv"))[0]["step"] == 4


def printed_config(args: list[str], capsys: Any) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *args, "--print_config"])
    assert not ended.value.code
    return yaml.safe_load(capsys.readouterr().out)


def test_options_come_after_a_config_however_it_is_given(own, capsys):
    written = {"model": {"class_path": f"{own}.Mine"}, "data": {"class_path": f"{own}.Data"}, "epochs": 3}
    Path("study.yaml").write_text(yaml.safe_dump(written))
    for config in (["study.yaml"], ["--config", "study.yaml"], ["--config=study.yaml"]):
        found = printed_config([*config, f"--model={own}.Tested", "--model.width=5"], capsys)
        assert found["model"]["class_path"] == f"{own}.Tested"
        assert (found["model"]["init_args"]["width"], found["epochs"]) == (5, 3)


def test_a_misspelt_name_in_a_file_and_a_file_that_is_not_there(capsys, own):
    Path("study.yaml").write_text("monitr: val_acc\n")
    assert main(["compare", "study.yaml"]) == 2
    assert "expected an option of nsgd compare, got monitr; did you mean monitor?" in capsys.readouterr().err
    assert main(["compare", "nothing.yaml"]) == 2
    assert "got 'nothing.yaml', which does not exist" in capsys.readouterr().err


def test_a_run_by_its_number_says_where_it_lies_and_what_is_next(own, capsys):
    args = ["compare", *(word.format(own) for word in MINE), *SMALL, "--monitor", "val/error", "--out", "out"]
    assert main([*args, "--run", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "out/runs/nsgd-momentum-0 is finished; without --run the same command makes the others" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (MINE, "expected Mine to log val_loss in validation, got val/error, val/r2; name what it logs"),
        ([*MINE, "--monitor", "val/f1"], "expected Mine to log val/f1 in validation, got val/error, val/r2"),
        ([*MINE, "--mode", "least"], "expected --mode to be"),
        ([*MINE, "--monitor", "val/error", "--target", ".inf"], "target to be finite"),
        ([*MINE, "--model.depth", "3"], "expected an option of Mine, got --model.depth"),
        ([*MINE, "--model.width", "wide"], "expected --model.width to be a whole number, got 'wide'"),
        (["--model", "{}.Manual", "--data", "{}.Data"], "got Manual, which takes its own optimizer steps"),
        (["--model", "{}.WarmUp", "--data", "{}.Data"], "got WarmUp, which overrides optimizer_step"),
        ([*MINE, "--monitor", "loss"], "expected --monitor to be logged in validation under a name of its own"),
        ([*MINE, "--monitor", "energy"], "expected --mode min or max with --monitor energy"),
        ([*MINE, "--sizes", "{{depth: 3}}"], "expected no sizes with a model, whose options are its own"),
        ([*MINE, "--seed", "3"], "expected an option of nsgd compare, got --seed; did you mean --seeds?"),
        (["--model", "{}.Mine"], "expected data with a train_dataloader, got none; give --data, or the model one"),
        (["--model", "{}.Mine", "--data", "{}.Empty"], "expected data with a train_dataloader, got none"),
        (["--model", "{}.Mine", "--data", "{}.Endless"], "over a data set with a length, got an IterableDataset"),
        (["--data", "{}.Data"], "expected data with input_shape and num_classes for the network mlp, got Data"),
        (["--model", "{}.Nothing"], "expected --model to be a class that can be imported and made"),
        (["--model", "LanguageModel", "--data", "Digits"], "expected --model.vocabulary, as Digits has no vocabulary"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_writes_nothing(own, capsys, args, said):
    before = sorted(Path().rglob("*"))
    assert main(["compare", *(word.format(own) for word in args), "--methods", "[sgd]"]) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint.count("\n") == 0
    assert said.format(own) in complaint
    assert [path for path in sorted(Path().rglob("*")) if "__pycache__" not in str(path)] == before


def test_every_run_of_a_users_module_is_a_command(own):
    chosen = study(own)
    assert [run.name for run in plan_runs(chosen)] == ["runs/sgd-0", "runs/nsgd-0"]
    assert Subject(chosen).steps("sgd") == 10
    assert not Subject(chosen).is_tested
    assert Subject(study(own, "Tested")).is_tested
