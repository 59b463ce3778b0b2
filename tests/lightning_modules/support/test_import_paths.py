"""Files of 0.1.0 name classes by modules that have moved: they are read, and new ones record the public path."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from studies import finished, silent, study

import lightning_modules
from lightning_modules import Classifier, Digits, LanguageModel
from lightning_modules.commands.main import main
from lightning_modules.models.nets.named import make_net
from lightning_modules.study.compare import run_study
from lightning_modules.support.import_paths import public_path

DIGITS = Path(__file__).parents[3] / "benchmarks" / "results" / "digits"  # a study of 0.1.0
NEW = {"side": None}  # options of its data that came later

OLD = [  # path in 0.1.0, and module that the class is in now
    ("averages.ReadOuts", "callbacks.averages"),
    ("callbacks.AveragingExperiment", "callbacks.measurements.averaging"),
    ("callbacks.SharpnessMonitor", "callbacks.measurements.sharpness"),
    ("callbacks.averaging.AveragingExperiment", "callbacks.measurements.averaging"),
    ("callbacks.measurement.Plan", "callbacks.measurements.budget"),
    ("callbacks.predictions.WritePredictions", "callbacks.predictions"),
    ("callbacks.quadratic.BatchQuadratic", "callbacks.measurements.quadratic"),
    ("callbacks.record.RecordSteps", "callbacks.record"),
    ("callbacks.refresh.RefreshDirections", "callbacks.refresh"),
    ("callbacks.sharpness.SharpnessMonitor", "callbacks.measurements.sharpness"),
    ("callbacks.valley.ValleyWalk", "callbacks.measurements.valley"),
    ("callbacks.write_averages.WriteAverages", "callbacks.write_averages"),
    ("classifier.Classifier", "models.classifier"),
    ("data.Digits", "data.digits"),
    ("data.EpochBatches", "data.batches"),
    ("data.HuggingFace", "data.hugging_face"),
    ("data.ImageData", "data.images"),
    ("data.Images", "data.images"),
    ("language.Characters", "data.characters"),
    ("language.LanguageModel", "models.language"),
    ("nets._Residual", "models.nets.resnet"),
    ("sharpness_aware.SharpnessAware", "models.sharpness_aware"),
    ("stages.Stages", "models.base"),
    ("transformers._Causal", "models.nets.transformers"),
]


@pytest.mark.parametrize(("path", "home"), OLD)
def test_a_class_is_found_by_its_old_path(path, home):
    module, _, name = f"lightning_modules.{path}".rpartition(".")
    kind = getattr(import_module(module), name)
    assert inspect.isclass(kind)
    assert (kind.__module__, kind.__name__) == (f"lightning_modules.{home}", name)
    assert pickle.loads(f"c{module}\n{name}\n.".encode()) is kind  # protocol 0: a class by its module and name
    if name in lightning_modules.__all__:
        assert public_path(f"lightning_modules.{path}") == f"lightning_modules.{name}"
        assert getattr(lightning_modules, name) is kind


def test_paths_of_others_are_left_as_they_are():
    for path in (
        "Digits",
        "mine.Digits",
        "torch.optim.SGD",
        "lightning_modules.data.ImageDataset",
        "lightning_modules",
    ):
        assert public_path(path) == path


def test_what_the_old_modules_did_not_hold_is_said_to_be_missing():
    with pytest.raises(ImportError, match=r"cannot import name 'Nothing' from 'lightning_modules\.classifier'"):
        from lightning_modules.classifier import Nothing
    with pytest.raises(ImportError, match=r"cannot import name 'Nothing' from 'lightning_modules\.data'"):
        from lightning_modules.data import Nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"lightning_modules\.nothing"):
        import_module("lightning_modules.nothing")


def test_to_register_the_old_paths_imports_neither_lightning_nor_torch():
    code = (
        "import sys, lightning_modules, lightning_modules.data, lightning_modules.callbacks; "
        "assert not {'torch', 'pytorch_lightning'} & set(sys.modules); import lightning_modules.classifier; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_network_that_was_pickled_whole_is_read():
    net = make_net("resnet-20", (1, 8, 8), 10, {"widths": [2, 4], "depth": 6})
    now = pickle.dumps(net, protocol=0)
    old = now.replace(b"lightning_modules.models.nets.resnet\n", b"lightning_modules.nets\n")
    assert old != now
    read = pickle.loads(old)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read.eval()(images), net.eval()(images))


def test_the_data_of_the_committed_study_are_built_from_its_config():
    written = yaml.safe_load((DIGITS / "config.yaml").read_text())["data"]
    assert written["class_path"] == "lightning_modules.data.Digits"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": written})).data
    assert type(data) is Digits
    assert dict(data.hparams) == {**written["init_args"], **NEW}


def test_the_committed_study_is_run_from_its_config_and_records_the_public_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--methods", "[sgd]", "--seeds", "1", "--epochs", "1", "--out", "out", "--run", "0"]
    assert main(["compare", str(DIGITS / "config.yaml"), *short]) == 0
    old, new = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (DIGITS, tmp_path / "out"))
    init_args = {**old["data"]["init_args"], **NEW}
    assert new["data"] == {"class_path": "lightning_modules.Digits", "init_args": init_args}


def test_a_study_folder_of_old_goes_on_and_keeps_its_config(tmp_path):
    out = finished(tmp_path / "out", seeds=1, epochs=1)
    config = out / "config.yaml"
    new = config.read_text()
    assert "class_path: lightning_modules.Digits\n" in new
    config.write_text(new.replace("lightning_modules.Digits", "lightning_modules.data.Digits"))
    (out / "runs" / "nsgd-0" / "results.csv").unlink()
    kept = config.read_bytes()
    run_study(study(seeds=1, epochs=1), out, silent)
    assert (out / "runs" / "nsgd-0" / "results.csv").exists()
    assert config.read_bytes() == kept
    config.write_text(new.replace("lightning_modules.Digits", "lightning_modules.data.HuggingFace"))
    with pytest.raises(
        ValueError, match=r"data.class_path was lightning_modules.HuggingFace, now lightning_modules.Dig"
    ):
        run_study(study(seeds=1, epochs=1), out, silent)


@pytest.mark.parametrize(
    ("model", "data", "options"),
    [
        ("classifier.Classifier", "data.Digits", {"net": "mlp"}),
        ("classifier.Classifier", None, {"net": "mlp"}),  # whose data are the model's own
        ("language.LanguageModel", "language.Characters", {"dim": 8, "depth": 1}),
    ],
)
def test_fit_takes_a_config_of_old_and_its_checkpoint(tmp_path, monkeypatch, model, data, options):
    monkeypatch.chdir(tmp_path)
    written: dict[str, Any] = {
        "model": {"class_path": f"lightning_modules.{model}", "init_args": options},
        "trainer": {
            "max_steps": 1,
            "limit_val_batches": 1,
            "callbacks": [{"class_path": "lightning_modules.callbacks.write_averages.WriteAverages"}],
        },
    }
    if data is not None:
        written["data"] = {"class_path": f"lightning_modules.{data}"}
    Path("old.yaml").write_text(yaml.safe_dump(written))
    assert main(["fit", "--config", "old.yaml"]) == 0
    folder = Path("lightning_logs/version_0")
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    kind = {"classifier.Classifier": Classifier, "language.LanguageModel": LanguageModel}[model]
    own = {Classifier: "Digits", LanguageModel: "Characters"}[kind]
    assert recorded["model"]["class_path"] == f"lightning_modules.{kind.__name__}"
    assert recorded["data"]["class_path"] == f"lightning_modules.{own}"
    assert recorded["trainer"]["callbacks"][0]["class_path"] == "lightning_modules.WriteAverages"
    checkpoint = folder / "averages" / "last.ckpt"
    assert type(kind.load_from_checkpoint(checkpoint)) is kind
    if kind is Classifier:  # the class is in the checkpoint, where a config is not given
        held = torch.load(checkpoint, weights_only=True)
        held["hyper_parameters"]["_class_path"] = "lightning_modules.classifier.Classifier"
        torch.save(held, "old.ckpt")
        assert main(["validate", "--ckpt_path", "old.ckpt", "--trainer.limit_val_batches", "1"]) == 0
