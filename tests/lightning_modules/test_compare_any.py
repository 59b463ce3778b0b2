"""A study of modules and data that are not ours: what they log is what is compared, and any method trains them."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from studies import OPTIONS, silent
from torch import nn

from lightning_modules.cli import main
from lightning_modules.compare import run_study
from lightning_modules.methods import NSGDOptions
from lightning_modules.rows import read_csv
from lightning_modules.runs import plan_runs
from lightning_modules.score import Score
from lightning_modules.statistics import times_to_target
from lightning_modules.study import Study

MODULE = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

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

class Stream(IterableDataset):
    def __iter__(self):
        yield from samples(50, 0)

class Endless(Data):
    def train_dataloader(self):
        return DataLoader(Stream(), 10)

class Empty(pl.LightningDataModule):
    pass
"""
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


@pytest.mark.parametrize(
    ("monitor", "tested", "label", "share"),
    [
        ("val_accuracy", "test_accuracy", "validation accuracy", True),
        ("valid_acc", "test_acc", "validation accuracy", True),
        ("val/f1", "test/f1", "validation f1", False),
        ("validation_loss", "test_loss", "validation loss", False),
        ("perplexity", "test_perplexity", "perplexity", False),
    ],
)
def test_a_score_is_called_by_what_it_is(monitor, tested, label, share):
    score = Score(monitor, "max")
    assert (score.tested, score.validation.label, score.is_share) == (tested, label, share)
    assert [m.column for m in score.measures([monitor, "train_loss", "x"])] == [monitor, "train_loss"]
    assert [m.column for m in score.measures({tested, monitor, "train_loss"})] == [tested, monitor, "train_loss"]
    assert score.criterion(["val_loss"]).column == "val_loss"
    assert score.criterion([monitor]).column == monitor
    assert score.validation.title == label.capitalize() + (", %" if share else "")


def test_the_best_row_is_the_least_bad():
    rows = [{"val_r2": 0.5}, {"val_r2": 0.9}, {"val_r2": math.nan}, {}]
    assert min(rows, key=Score("val_r2", "max").validation.badness) == {"val_r2": 0.9}
    assert min(rows, key=Score("val_r2", "min").validation.badness) == {"val_r2": 0.5}


@pytest.mark.parametrize(("mode", "reached"), [("min", [3, 2]), ("max", [1, 1])])
def test_a_target_is_met_from_the_side_of_the_better(mode, reached):
    losses = {"sgd": {0: [0.9, 0.7, 0.5]}, "nsgd": {0: [0.8, 0.5, math.nan]}}
    metrics = {
        m: {seed: [{"step": i, "gradients": i, "seconds": i, "val_x": v} for i, v in enumerate(run, 1)]}
        for m, runs in losses.items()
        for seed, run in runs.items()
    }
    found = times_to_target(metrics, range(1), 0.5, Score("val_x", mode))
    assert [row["step"] for row in found] == reached


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
    assert last["val/r2"] == pytest.approx(1 - last["val/error"] / 7, rel=1e-4)
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
    best = (max if monitor == "val/r2" else min)(trials, key=lambda row: row[monitor])
    settled = yaml.safe_load((folder / "settled.yaml").read_text())
    assert settled["settings"]["sgd"]["lr"] == best["lr"]
    assert settled["target"] == best[monitor]
    assert {row["reached"] for row in read_csv(folder / "target.csv")} <= {0, 1}


# -- every method on any module --------------------------------------------------------------------------------------


def test_runs_are_paired_so_that_gamma_one_and_rho_zero_are_sgd(own, tmp_path):
    """With dropout, BatchNorm and a loader that shuffles by the global random state."""
    settings = {"sam": {"rho": 0.0, "momentum": 0.0}}
    options = NSGDOptions(k=2, gamma=1.0, refresh_every=2, samples=8, group_size=4)
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
    assert "had a test error of" in out
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
    assert "had a test loss of" in capsys.readouterr().out
    assert yaml.safe_load(Path("a/config.yaml").read_text())["model"]["init_args"]["vocabulary"] == 29


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (MINE, "expected Mine to log val_loss in validation, got val/error, val/r2; name what it logs"),
        ([*MINE, "--monitor", "val/f1"], "expected Mine to log val/f1 in validation, got val/error, val/r2"),
        ([*MINE, "--mode", "least"], "expected --mode to be"),
        ([*MINE, "--monitor", "val/error", "--target", ".inf"], "target to be finite"),
        ([*MINE, "--model.depth", "3"], "expected an option of {}.Mine, got --model.depth"),
        ([*MINE, "--model.width", "wide"], "expected --model.width to be a whole number, got 'wide'"),
        (["--model", "{}.Manual", "--data", "{}.Data"], "got Manual, which takes its own optimizer steps"),
        (["--model", "{}.Mine"], "expected data with a train_dataloader, got none; give --data, or the model one"),
        (["--model", "{}.Mine", "--data", "{}.Empty"], "expected data with a train_dataloader, got none"),
        (["--model", "{}.Mine", "--data", "{}.Endless"], "expected a train_dataloader with a length, got DataLoader"),
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
    assert chosen.steps == 10
    assert not chosen.is_tested
    assert study(own, "Tested").is_tested
