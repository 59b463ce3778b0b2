"""`nsgd fit` on modules and data of users, who know nothing of this project: by YAML or options alone."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_modules.callbacks.write_averages import WriteAverages
from lightning_modules.commands.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

# As Lightning's own examples are written: nothing in it is ours.
MODULE = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loader(classes=3):
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :classes].argmax(1)), batch_size=32)


class Net(pl.LightningModule):
    def __init__(self, width: int = 16, num_classes: int = 3, lr: float = 0.3, dropout: float = 0.2):
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        hidden = nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)
        self.net = nn.Sequential(*hidden, nn.Linear(width, num_classes))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class WithData(Net):
    def train_dataloader(self):
        return loader()

    val_dataloader = test_dataloader = train_dataloader


class Formless(WithData):
    def forward(self, x, y):
        raise NotImplementedError


class Picky(WithData):
    def training_step(self, batch, batch_idx):
        if len(batch[0]) < 8:
            raise RuntimeError("eight or nothing")
        return super().training_step(batch, batch_idx)


class Needs(Net):
    def __init__(self, num_classes: int):
        super().__init__(num_classes=num_classes)

    def predict_step(self, batch, batch_idx):
        return {"logits": self(batch[0])}


class Data(pl.LightningDataModule):
    def __init__(self, classes: int = 4):
        super().__init__()
        self.num_classes = classes

    def train_dataloader(self):
        return loader(self.num_classes)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Silent(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(2)
"""
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
BORING = "pytorch_lightning.demos.boring_classes."
_numbers = itertools.count()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The name of a user's module in the working directory."""
    monkeypatch.chdir(tmp_path)
    name = f"users_module_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


def fit(*args: str, epochs: int = 2) -> None:
    assert main(["fit", *args, *QUIET, "--trainer.max_epochs", str(epochs)]) == 0


def logs(version: int = 0) -> Path:
    return Path("lightning_logs") / f"version_{version}"


def metrics(version: int = 0) -> dict[str, list[float]]:
    with (logs(version) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def checkpoint(version: int = 0) -> dict[str, Any]:
    (path,) = (logs(version) / "checkpoints").iterdir()
    return torch.load(path, weights_only=True)


# -- by YAML alone ---------------------------------------------------------------------------------------------------


def test_a_users_module_trains_with_nsgd_a_monitor_and_averages_by_yaml_alone(own):
    config = {
        "model": f"{own}.WithData",
        "optimizer": {"class_path": "nsgd.NSGD", "init_args": {"lr": 0.1, "k": 3}},
        "trainer": {"callbacks": [{"class_path": "SharpnessMonitor"}, {"class_path": "WriteAverages"}]},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    fit("--config", "mine.yaml", epochs=4)
    found = metrics()
    weights = zip(found["nsgd/weight_1"], found["nsgd/weight_sum"], strict=True)
    assert all(0 < first <= every for first, every in weights)
    assert (logs() / "sharpness.csv").exists()
    names = ["last", "ema", "swa", "two-point"]
    assert {path.stem for path in (logs() / "averages").iterdir()} == set(names)
    for name in names:
        path = str(logs() / "averages" / f"{name}.ckpt")
        assert main(["validate", "--config", str(logs() / "config.yaml"), "--ckpt_path", path]) == 0
    again = [metrics(version)["val_loss"][-1] for version in range(1, 5)]
    assert again == pytest.approx([found[f"{name}/val_loss"][-1] for name in names], rel=1e-6)
    assert len(set(again)) == 4


def test_two_lines_of_yaml_are_enough_for_nsgd(own):
    Path("mine.yaml").write_text(f"model: {own}.WithData\n")
    fit("--config", "mine.yaml")
    Path("mine.yaml").write_text(f"model: {own}.WithData\ndamp:\n  gamma: 0.1\n")
    fit("--config", "mine.yaml")
    plain, damped = (checkpoint(version) for version in (0, 1))
    (group,) = damped["optimizer_states"][0]["param_groups"]
    assert group["gamma"] == 0.1
    assert "gamma" not in plain["optimizer_states"][0]["param_groups"][0]
    # The user's own optimizer and its schedule are still there.
    assert (group["momentum"], group["lr"]) == (0.9, pytest.approx(0.3 * 0.5**2))
    assert any(not torch.equal(plain["state_dict"][name], value) for name, value in damped["state_dict"].items())


@pytest.mark.parametrize("solver", ["auto", "gradients"])
def test_gamma_one_is_the_users_own_training_bit_for_bit(own, solver):
    fit("--model", f"{own}.WithData")
    fit("--model", f"{own}.WithData", "--damp.gamma", "1", "--damp.solver", solver)
    plain, damped = (checkpoint(version)["state_dict"] for version in (0, 1))
    assert all(torch.equal(plain[name], value) for name, value in damped.items())
    assert metrics(1)["nsgd/weight_1"]


@pytest.mark.parametrize("name", ["AdamW", "torch.optim.AdamW"])
def test_any_optimizer_is_damped_and_resumes_where_it_was(own, name):
    adam = ["--model", f"{own}.WithData", "--optimizer", name, "--optimizer.lr", "0.01", "--damp.k", "4"]
    adam += ["--model.dropout", "0"]  # whose masks a resumed run draws anew
    fit(*adam, epochs=4)
    fit(*adam, epochs=2)
    (half,) = (logs(1) / "checkpoints").iterdir()
    fit(*adam, "--ckpt_path", str(half), epochs=4)
    whole, resumed = checkpoint(0), checkpoint(2)
    assert all(torch.equal(whole["state_dict"][key], value) for key, value in resumed["state_dict"].items())
    state = resumed["optimizer_states"][0]["state"][0]
    assert {"exp_avg", "directions"} <= set(state)
    assert state["directions"].shape == (4, 16, 6)


def test_damping_what_is_damped_says_so(own, capsys):
    assert main(["fit", *QUIET, "--damp.gamma", "0.1"]) == 2
    assert "--damp expected an optimizer without directions, got NSGD" in capsys.readouterr().err


# -- any module, any data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--model", BORING + "BoringModel", "--optimizer", "NSGD", "--optimizer.lr", "0.01"],
        ["--model", BORING + "ManualOptimBoringModel", "--damp.k", "3"],
        ["--model", BORING + "DemoModel", "--data", BORING + "BoringDataModule", "--damp", "{}"],
        ["--model", "LanguageModel", "--model.dim", "8", "--trainer.limit_train_batches", "3"],
    ],
    ids=lambda args: args[1].rpartition(".")[2],
)
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no:UserWarning")
def test_lightnings_examples_and_the_language_model_train(own, args):
    fit(*args, "--trainer.limit_val_batches", "2", epochs=1)
    assert any(name.startswith("nsgd/weight") for name in metrics())


@pytest.mark.parametrize(
    ("args", "classes"),
    [
        (["--model", "Needs", "--data", "Data"], 4),
        (["--model", "Needs", "--data", "Data", "--data.classes", "5"], 5),
        (["--model", "Needs", "--data", "Silent", "--model.num_classes", "2"], 2),
        (["--model", "Net", "--data", "Silent"], 3),  # the default stays
        (["--model", "Net", "--data", "Data", "--model.num_classes", "6"], 6),  # by hand
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_a_model_learns_of_its_data_what_both_know(own, args, classes):
    fit(*[f"{own}.{word}" if word in ("Needs", "Net", "Data", "Silent") else word for word in args], epochs=1)
    assert len(checkpoint()["state_dict"]["net.4.bias"]) == classes


def test_a_class_of_ones_own_gets_no_options_of_the_default_one(own):
    """Classifier has lr=0.1 by default, which jsonargparse would hand on to any class that has an lr."""
    fit("--model", f"{own}.WithData", epochs=1)
    assert checkpoint()["hyper_parameters"]["lr"] == 0.3


def test_a_config_repeats_the_fit_of_a_users_module(own):
    fit("--model", f"{own}.Needs", "--data", f"{own}.Data", "--optimizer", "NSGD", "--optimizer.k", "2")
    assert main(["fit", "--config", str(logs() / "config.yaml")]) == 0
    assert metrics(0) == metrics(1)


def test_predictions_that_are_no_table_are_written_as_they_are(own, capsys):
    module = ["--model", f"{own}.Needs", "--data", f"{own}.Data"]
    fit(*module, epochs=1)
    (trained,) = (logs() / "checkpoints").iterdir()
    predict = ["predict", *module, *QUIET, "--ckpt_path", str(trained)]
    assert main(predict) == 2
    assert "expected predict_step to return a tensor (batch, classes)" in capsys.readouterr().err
    assert main([*predict, "--predictions.path", "found.pt"]) == 0
    found = torch.load("found.pt", weights_only=True)
    assert [batch["logits"].shape for batch in found] == [(32, 4)] * 3


# -- averages --------------------------------------------------------------------------------------------------------


def test_writing_averages_leaves_training_bit_identical(own):
    fit("--model", f"{own}.WithData", epochs=3)
    fit("--model", f"{own}.WithData", "--trainer.callbacks+", "WriteAverages", epochs=3)
    plain, averaged = (checkpoint(version)["state_dict"] for version in (0, 1))
    assert all(torch.equal(plain[name], value) for name, value in averaged.items())
    assert metrics(0)["val_loss"] == metrics(1)["val_loss"]
    last = torch.load(logs(1) / "averages" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(last["net.0.weight"], plain["net.0.weight"])


def test_averages_that_cannot_be_calibrated_are_refused_before_training(own, capsys):
    args = ["fit", "--model", f"{own}.Picky", *QUIET, "--trainer.callbacks+", "WriteAverages"]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "WriteAverages expected the module to have a training loss for two samples of its training set" in said
    assert "got RuntimeError: eight or nothing; take WriteAverages out" in said
    assert not list(Path().rglob("*.ckpt"))


def test_averages_of_a_module_without_forward_are_those_of_one_with_it(own):
    for model in ("WithData", "Formless"):
        fit("--model", f"{own}.{model}", "--trainer.callbacks+", "WriteAverages", epochs=3)
    for name in ("last", "ema", "swa", "two-point"):
        one, other = (torch.load(logs(v) / "averages" / f"{name}.ckpt", weights_only=True) for v in (0, 1))
        assert all(torch.equal(other["state_dict"][key], value) for key, value in one["state_dict"].items())


@pytest.mark.parametrize("calibration", [1, 0])
def test_one_sample_calibrates_nothing(calibration):
    with pytest.raises(ValueError, match=f"expected calibration of at least 2 samples, got {calibration}"):
        WriteAverages(calibration=calibration)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "null"], "expected --model, got none; give it"),
        (["--model", "Nonsense"], "expected --model to be a class by its import path"),
        (["--model", "nomodule.Net"], "got 'nomodule.Net': No module named 'nomodule'"),
        (["--model", "OWN.Nonsense"], "has no attribute 'Nonsense'"),
        (["--model", "OWN.Net"], "expected --data, as Net has no train_dataloader of its own, got none"),
        (["--model", "OWN.Needs"], "expected --model.num_classes, which Needs needs, got none"),
        (["--model", "OWN.Needs", "--data", "OWN.Silent"], "as Silent has no num_classes, got none"),
        (["--model", "OWN.Net", "--data.batch_size", "3"], "expected --data CLASS before an option of it"),
        (["--model.wdith", "3"], "expected an option of Classifier, got --model.wdith"),
        (["--modle.net", "mlp"], "did you mean --model.net?"),
        (["--trainer.max_epoch", "3"], "did you mean --trainer.max_epochs?"),
        (["--gamma", "0.3"], "did you mean --optimizer.gamma?"),
        (["--optimizer", "NSDG"], "did you mean NSGD?"),
        (["--optimizer", "torch.optim.Adagrda"], "has no attribute 'Adagrda'; did you mean Adagrad?"),
        (["--optimizer", "collections.OrderedDict"], "expected --optimizer to be an Optimizer, got 'collections.Order"),
        (["--trainer.callbacks+", "SharpnesMonitor"], "did you mean SharpnessMonitor?"),
        (["--trainer.logger", "CsvLogger"], "to be a Logger or a list of Loggers or true or false, got 'CsvLogger'"),
        (["--measure", "escape"], "expected measurements to be different ones of sharpness, valley"),
        (["--trainer.max_epochs", "three"], "expected --trainer.max_epochs to be a whole number, got 'three'"),
        (["--trainer.accelerator", "quantum"], "bad --trainer options"),
        (["--trainer.barebones", "true"], "`Trainer(barebones=True, logger=CSVLogger)` was passed"),
        (["--trainer.logger", "WandbLogger"], "expected a package that is not installed"),
        (["--trainer.callbacks", "Nonsense"], "expected --trainer.callbacks to be a class"),
        (["--optimizer", "nsgd.Nonsense"], "module 'nsgd' has no attribute 'Nonsense'"),
        (
            ["--optimizer", "NSGD", "--optimizer.gama", "0.1"],
            "expected an option of NSGD, got --optimizer.gama; did you mean --optimizer.gamma?",
        ),
        (["--optimizer", "NSGD", "--optimizer.lr", "fast"], "expected --optimizer.lr to be a number, got 'fast'"),
        (
            ["--optimizer", "NSGD", "--optimizer.basis_dtype", "{}"],
            "expected --optimizer.basis_dtype to be a precision by its name, such as bfloat16, got '{}'",
        ),
        (["--optimizer.lr", "0.1"], "expected --optimizer CLASS before an option of it"),
        (["--lr_scheduler", "StepLR"], "expected --lr_scheduler.step_size, which StepLR needs"),
        (["--damp.gama", "0.1"], "expected options of --damp among k, gamma"),
        (["--damp", "3"], "expected --damp to be a mapping, got '3'; give its options as --damp.OPTION VALUE"),
        (["--damp", "--trainer.max_epochs", "1"], "expected a value after --damp, got none; give one, or '{}' for"),
        (
            ["--optimizer", "AdamW", "--optimizer.lr", "-1"],
            "the optimizer refuses an option: Invalid learning rate: -1",
        ),
        (["--data", "HuggingFace"], "expected --data.path, which HuggingFace needs, got none"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "OWN.py"], "expected a config in YAML"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(own, capsys, args, said):
    before = {path.name for path in Path().iterdir()}
    assert main(["fit", *QUIET, *[word.replace("OWN", own) for word in args]]) == 2
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nsgd: ")]
    assert len(found) == 1
    assert said in found[0]
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == before


def test_a_checkpoint_of_another_module_asks_for_its_config(own, capsys):
    fit("--model", f"{own}.WithData", epochs=1)
    (trained,) = (logs() / "checkpoints").iterdir()
    assert main(["test", *QUIET, "--ckpt_path", str(trained)]) == 2
    assert f"the checkpoint is of {own}.WithData; give the options" in capsys.readouterr().err


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_short_help_fits_a_screen_and_names_options_that_there_are(own, capsys, command):
    assert main([command, "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 40
    with pytest.raises(SystemExit):
        main([command, "--help", "all"])
    everything = capsys.readouterr().out
    named = {line.split()[0].rstrip("+") for line in short.splitlines() if line.startswith("  --")}
    assert len(named) >= 4
    groups = {f"--{name}.OPTION" for name in ("trainer", "data", "model", "optimizer", "damp")}
    assert all(re.search(rf"{re.escape(name)}\b", everything) or name in groups for name in named), named


# -- optimizers with two sets of weights -------------------------------------------------------------------------------

SWITCHED = (
    MODULE
    + """

from pytorch_optimizer import ScheduleFreeAdamW


class Switched(WithData):
    def configure_optimizers(self):
        return ScheduleFreeAdamW(self.parameters(), lr=0.05)

    def mode(self, name):
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.log(name, float(optimizer.param_groups[0]["train_mode"]), on_epoch=True, on_step=False)

    def training_step(self, batch, batch_idx):
        self.mode("at_trained")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.mode("at_validated")
        self.log("val_sum", sum(p.double().sum() for p in self.parameters()))
"""
)


def test_schedule_free_is_validated_at_its_averaged_weights_and_ends_there(own, tmp_path):
    (tmp_path / f"{own}.py").write_text(SWITCHED)
    fit("--model", f"{own}.Switched", "--trainer.callbacks+", "WriteAverages", "--trainer.num_sanity_val_steps", "0")
    found = metrics()
    assert found["at_trained"] == [1.0, 1.0]
    assert found["at_validated"] == [0.0, 0.0]
    last = torch.load(logs() / "averages" / "last.ckpt", weights_only=True)["state_dict"]
    ends = sum(value.double().sum().item() for name, value in last.items() if name.endswith(("weight", "bias")))
    assert found["val_sum"][-1] == pytest.approx(ends, rel=1e-6)  # both at the end of the last epoch
    assert found["last/val_sum"] == pytest.approx([ends], rel=1e-6)  # validated again, afterwards, as it was written


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_precision_is_given_by_its_name(capsys, name):
    with pytest.raises(SystemExit):
        main(["fit", "--optimizer", "NSGD", "--optimizer.basis_dtype", name, "--print_config"])
    options = yaml.safe_load(capsys.readouterr().out)["optimizer"]["init_args"]
    assert options["basis_dtype"] == "torch.bfloat16"
