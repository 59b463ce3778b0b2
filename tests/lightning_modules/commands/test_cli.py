"""The `nsgd` command: what each command leaves, and bad input in one sentence with nothing overwritten."""

from __future__ import annotations

import csv
import re
import runpy
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_modules import Digits
from lightning_modules.commands.main import main
from lightning_modules.study.runs import tables
from lightning_modules.support.files import read_csv

TINY = [
    *("--data.batch_size", "50", "--data.limit", "300", "--epochs", "1", "--seeds", "2", "--lr", "0.2"),
    *("--nsgd.k", "2", "--nsgd.refresh_every", "2", "--nsgd.samples", "16", "--methods", "[sgd,nsgd]"),
]
SHORT = [
    *("--trainer.max_epochs", "2", "--data.batch_size", "100"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
FIGURES = ("training-loss", "validation-accuracy", "eigenvalues")
NSGD = ["--optimizer", "NSGD", "--optimizer.lr", "0.2", "--optimizer.k", "3", "--optimizer.refresh_every", "4"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands write below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def code_of(*args: str) -> int:
    """The exit code, whether returned or raised."""
    try:
        return main(list(args))
    except SystemExit as exit_:
        return int(exit_.code or 0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["-h"], []])
def test_help_names_every_command(capsys, args):
    assert code_of(*args) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in ("compare", "fit", "validate", "test", "predict"))
    assert "Nudged SGD" in out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "compare",
            [
                "--out",
                "--seeds",
                "--lr",
                "--threads",
                "--nsgd.k",
                "--nsgd.solver",
                "--tune",
                "--help all",
            ],
        ),
        ("fit", ["--optimizer", "--model.net", "--data", "--damp", "--refresh.samples", "--ckpt_path", "--help all"]),
    ],
)
def test_help_of_a_command_shows_its_options(capsys, command, options):
    assert code_of(command, "--help") == 0
    out = capsys.readouterr().out
    assert all(option in out for option in options)


def test_the_command_is_installed_and_the_package_runs_as_a_module(capsys, monkeypatch):
    (script,) = entry_points(group="console_scripts", name="nsgd")
    assert script.load() is main
    monkeypatch.setattr(sys, "argv", ["lightning_modules", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("lightning_modules", run_name="__main__")
    assert not exit_.value.code
    assert "compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (
            ["compare"],
            2,
            "nsgd: expected the extra lightning, which the commands need, got no package rich; install it",
        ),
        (["fit", "--lr", "3"], 2, "nsgd: expected the extra lightning"),
        (["--print-completion", "bash"], 2, "nsgd: expected the extra lightning"),
        (["frobnicate"], 2, "nsgd: expected a command among compare, fit"),
        (["--version"], 0, "nsgd "),
        (["compare", "--help"], 0, "usage: nsgd compare"),
    ],
)
def test_without_the_extra_the_commands_say_so_in_one_sentence(tmp_path, args, code, words):
    """As after ``pip install .``: Python finds none of the packages."""
    packages = [
        "rich",
        "yaml",
        "jsonargparse",
        "pytorch_lightning",
        "lightning_fabric",
        "jinja2",
        "matplotlib",
        "sklearn",
    ]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({packages})); "
        f"from lightning_modules.commands.main import main; sys.exit(main({args}))"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
    text = ran.stderr if code else ran.stdout
    assert text.startswith(words)
    assert not code or len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# -- compare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compare", "escape", "fit"])
def test_short_help_names_options_that_there_are_and_imports_nothing_slow(capsys, command):
    assert code_of(command, "--help", "all") == 0
    everything = capsys.readouterr().out
    assert code_of(command, "--help") == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 45
    named = set(re.findall(r"--[a-z_]+(?:\.[a-z_]+)?", short))
    of_classes = ("--data.", "--model.", "--optimizer.", "--lr_scheduler.", "--damp.")
    assert all(name in everything for name in named if not name.startswith(of_classes))
    code = (
        "import sys; from lightning_modules.commands.main import main; "
        f"main([{command!r}, '--help']); assert not {{'torch', 'pytorch_lightning', 'sklearn'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_piped_study_says_what_it_found_and_nothing_of_lightnings(here):
    command = [sys.executable, "-m", "lightning_modules", "compare", *TINY]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    assert not [line for line in ran.stdout.splitlines() if "available" in line or "Tip" in line or "Warning" in line]
    assert len(ran.stdout.splitlines()) <= 40


def test_compare_writes_its_folder_and_prints_the_table(capsys, here):
    assert code_of("compare", *TINY) == 0
    folder = here / "nsgd-compare"
    assert {p.name for p in folder.iterdir()} == {
        *("results.csv", "times.csv", "summary.csv", "target.csv", "target-times.csv", "report.html", "runs"),
        *("config.yaml", "methods.yaml", "environment.yaml", "settled.yaml"),
        *(
            f"{name}.{kind}"
            for name in ("training-loss", "validation-accuracy", "final-values", "eigenvalues")
            for kind in ("png", "pdf")
        ),
    }
    out = capsys.readouterr().out
    for said in (
        "Test accuracy, %",
        "NSGD",
        "last",
        "EMA",
        "SWA",
        "4 runs to make, 1 at a time: about",
        "step 16 of 16",
        "report.html",
    ):
        assert said in out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["nsgd"]["k"] == 2
    assert config["threads"] == 1
    assert config["data"]["init_args"]["limit"] == 300
    first = (folder / "results.csv").read_bytes()
    assert code_of("compare", *TINY) == 0  # again: all runs are kept, and so are their numbers
    assert (folder / "results.csv").read_bytes() == first


def test_compare_takes_every_option_of_refreshes_and_repeats_its_config(capsys, here):
    options = {"refresh_every": "auto", "overhead": 0.5, "decay": 0.8, "group_size": 2, "solver": "gradients"}
    args = [text for name, value in options.items() for text in (f"--nsgd.{name}", str(value))]
    assert code_of("compare", *TINY, *args, "--out", "a") == 0
    assert code_of("compare", "--config", "a/config.yaml", "--out", "b") == 0
    for folder in ("a", "b"):
        found = yaml.safe_load((here / folder / "config.yaml").read_text())["nsgd"]
        assert {name: found[name] for name in options} == options
    a, b = (read_csv(here / n / "results.csv") for n in "ab")
    assert a == b
    assert all(row["hvps"] == 0 for row in a)
    assert code_of("compare", *TINY, "--nsgd.group_size", "null", "--out", "c") == 0


def test_the_printed_config_of_compare_repeats_the_study(capsys, here):
    assert code_of("compare", *TINY, "--out", "a", "--print_config") == 0
    text = capsys.readouterr().out
    assert not (here / "a").exists()
    (here / "study.yaml").write_text(text)
    assert code_of("compare", "--config", "study.yaml") == 0
    assert code_of("compare", "--config", "study.yaml", "--out", "b") == 0
    assert (here / "a" / "config.yaml").read_text() == (here / "b" / "config.yaml").read_text()
    a, b = (read_csv(here / n / "results.csv") for n in "ab")
    assert a == b


def test_a_study_goes_by_its_name_or_file_and_options_after_it_count(capsys, here):
    assert code_of("compare", "digits", "--seeds", "2", "--print_config") == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["seeds"], found["epochs"], found["settings"]["sgd"]["lr"]) == (2, 40, 0.3273)
    (here / "mine.yaml").write_text("seeds: 3\nlr: 0.25\n")
    assert code_of("compare", "mine.yaml", "--epochs", "7", "--print_config") == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["seeds"], found["lr"], found["epochs"], found["settings"]) == (3, 0.25, 7, {})
    assert code_of("compare", "--net", "mlp", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["settings"] == {}  # what was tuned on digits is for digits
    assert "got 'imagenet', which is neither" in complaint(capsys, here, "compare", "imagenet")


# -- fit, validate, test, predict ------------------------------------------------------------------------------------


def last(path: Path, column: str) -> float:
    return float([row[column] for row in rows(path) if row.get(column)][-1])


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # of checkpoints, to the new version's folder
def test_fit_validate_test_and_predict_agree_on_one_checkpoint(here):
    assert code_of("fit", *SHORT, *NSGD, "--optimizer.solver", "gradients") == 0
    logs = here / "lightning_logs"
    metrics = logs / "version_0" / "metrics.csv"
    wanted = {"nsgd/weight_1", "nsgd/weight_sum", "nsgd/hvps", "nsgd/overlap", "train_loss", "val_loss"}
    assert wanted <= set(rows(metrics)[0])
    assert not any(name.startswith("nsgd/lambda") for name in rows(metrics)[0])  # there are no products
    logged = [int(row["step"]) for row in rows(metrics) if row["nsgd/weight_1"]]
    assert logged == [0, 8, 16]  # of refreshes every 4 of 22 steps, 5 or more apart
    (checkpoint,) = (logs / "version_0" / "checkpoints").iterdir()
    assert code_of("validate", *SHORT, "--ckpt_path", str(checkpoint)) == 0
    assert code_of("test", *SHORT, "--ckpt_path", str(checkpoint)) == 0
    assert last(logs / "version_1" / "metrics.csv", "val_loss") == pytest.approx(last(metrics, "val_loss"), rel=1e-5)
    assert code_of("predict", *SHORT, "--ckpt_path", str(checkpoint), "--predictions.path", "p.csv") == 0
    predicted = read_csv(here / "p.csv")
    assert [row["index"] for row in predicted] == list(range(360))
    table = np.array([[row[f"p_{i}"] for i in range(10)] for row in predicted])
    assert np.abs(table.sum(1) - 1).max() < 1e-4  # six digits each
    chosen = np.array([row["class"] for row in predicted])
    assert (chosen == table.argmax(1)).all()
    correct = float((chosen == Digits().splits["test"].labels.numpy()).mean())
    assert correct == pytest.approx(last(logs / "version_2" / "metrics.csv", "test_accuracy"), abs=1e-6)
    assert correct > 0.5


def test_fit_takes_an_optimizer_without_directions_and_a_scheduler(here):
    schedule = ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"]
    assert code_of("fit", *SHORT, "--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.2", *schedule) == 0
    found = rows(here / "lightning_logs" / "version_0" / "metrics.csv")
    assert not any(name.startswith("nsgd/") for name in found[0])
    assert last(here / "lightning_logs" / "version_0" / "metrics.csv", "val_accuracy") > 0.3


def test_fit_without_an_optimizer_trains_with_nsgd(here):
    assert code_of("fit", *SHORT) == 0
    assert any(row["nsgd/weight_sum"] for row in rows(here / "lightning_logs" / "version_0" / "metrics.csv"))


@pytest.mark.parametrize("from_log", [False, True], ids=["printed", "saved"])
def test_a_config_repeats_a_fit(capsys, here, from_log):
    assert code_of("fit", *SHORT, *NSGD, "--seed_everything", "4") == 0
    config = here / "lightning_logs" / "version_0" / "config.yaml"
    if not from_log:
        capsys.readouterr()
        assert code_of("fit", *SHORT, *NSGD, "--seed_everything", "4", "--print_config") == 0
        config = here / "printed.yaml"
        config.write_text(capsys.readouterr().out)
    assert code_of("fit", "--config", str(config)) == 0
    first, second = (rows(here / "lightning_logs" / f"version_{i}" / "metrics.csv") for i in (0, 1))
    assert first == second


# -- bad input -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folders(here: Path) -> None:
    """What bad input points to: an empty folder, one of text, another study's, a stranger's, and a data set."""
    (here / "empty").mkdir()
    (here / "text").mkdir()
    (here / "text" / "notes.txt").write_text("no image\n")
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.tex").write_text("x")
    (here / "other").mkdir()
    (here / "other" / "config.yaml").write_text("epochs: 3\n")
    (here / "a-file").write_text("x")
    for i in range(12):
        image = pytest.importorskip("PIL.Image", reason="needs the extra nsgd[data]")
        for split in ("train", "test"):
            path = here / "pictures" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(path)


def complaint(capsys: Any, here: Path, *args: str) -> str:
    """What a bad command line says: exit code 2, one line on stderr, and every file as it was."""
    before = contents(here)
    capsys.readouterr()
    path = list(sys.path)
    assert code_of(*args) == 2
    assert sys.path == path
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("nsgd: ")
    assert "Traceback" not in said.out + said.err
    after = contents(here)
    assert {path: after.get(path) for path in before} == before
    if args[0] == "compare":
        assert after == before
    return lines[0]


HF = ["--data", "HuggingFace", "--data.batch_size", "4", "--data.path"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--nsgd.k", "0"], "expected k to be a whole number of at least 1, got 0"),
        (["--lr", "-0.1"], "got -0.1"),
        (["--lr", "best"], "lr"),
        (["--lr", ".inf"], "lr"),
        (["--settings", "{sgd: {momentum: -1}}"], "expected settings.sgd.momentum >= 0 and below 1, got -1"),
        (["--settings", "{sgd: {gamma: 1}}"], "expected settings of sgd to be among lr, momentum, weight_decay, got"),
        (["--tune", "-1"], "expected tune of at least 0, got -1"),
        (["--sweep", "gamma"], "--sweep"),
        (["--jobs", "0"], "expected --jobs of at least 1, got 0"),
        (["--run", "15"], "expected --run to be from 0 to 14, the runs of this study, got 15"),
        (["--launcher", "slurm"], "expected --launcher to be 'local', 'ray', got 'slurm'"),
        (["--target", "95"], "expected target to be an accuracy between 0 and 1, got 95"),
        (["--nsgd.gamma", "-1"], "expected gamma to be a finite number >= 0"),
        (["--nsgd.refresh_every", "0"], "expected refresh_every to be 'auto' or a whole number of at least 1, got 0"),
        (["--nsgd.refresh_every", "often"], "refresh_every"),
        (["--nsgd.overhead", "0"], "expected overhead to be a number above 0"),
        (["--nsgd.overhead", ".nan"], "expected overhead to be a number above 0"),
        (["--nsgd.overhead", "some"], "overhead"),
        (["--nsgd.decay", "1"], "expected decay to be a number >= 0 and below 1, got 1"),
        (["--nsgd.decay", "-0.1"], "expected decay to be a number >= 0 and below 1, got -0.1"),
        (
            ["--nsgd.group_size", "0"],
            "expected group_size to be None for the default, or a whole number of at least 1, got 0",
        ),
        (["--nsgd.group_size", "1.5"], "group_size"),
        (["--nsgd.solver", "power"], "'auto', 'differences', 'gradients', 'lanczos', 'arpack'"),
        (["--nsgd.samples", "0"], "expected samples to be None for the default, or a whole number of at least 1"),
        (["--methods", "[sgd,adam]"], "got 'adam'; did you mean adamw?"),
        (["--methods", "sgd,nsgd"], "got 'sgd,nsgd'; write a list as '[sgd,nsgd]'"),
        (
            ["--settings", "{sgd: {lr: fast}}"],
            "expected --settings to be a mapping of names to mappings of names to",
        ),
        (["--nsgd", "3"], "expected options one by one, as --nsgd.OPTION VALUE, or a YAML file of them, got --nsgd 3"),
        (["--epochs"], "expected a value after --epochs, got none; give one"),
        (["--gamma", "0.1"], "did you mean --nsgd.gamma?"),
        (["--nsgd.gama", "0.1"], "got --nsgd.gama; did you mean --nsgd.gamma?"),
        (["--nsgd.foo", "1"], "got --nsgd.foo; --nsgd has k, gamma, refresh_every, "),
        (["--nsgd", "{foo: 1}"], "got nsgd.foo; nsgd has k, gamma, refresh_every, "),
        (["digts"], "which is neither; did you mean digits?"),
        (["--methods", "[]"], "methods"),
        (["--seeds", "0"], "expected seeds of at least 1, got 0"),
        (["--epochs", "zero"], "zero"),
        (["--threads", "0"], "expected threads of at least 1, got 0"),
        (["--net", "simple-cnm"], "or module:name of your own, got 'simple-cnm'; did you mean simple-cnn?"),
        (["--net", "no_such_module:net"], "expected net to name a module that can be imported"),
        (["--data", "Mnist"], "expected --data to be a class"),
        (["--data.batch_size", "0"], "expected batch_size of at least 1, got 0"),
        (["--data.batch_size", "5000"], "expected batch_size of at most 1149"),
        (["--data", "HuggingFace"], "expected --data.path, which HuggingFace needs, got none; give it"),
        (["--data", "HugingFace"], "did you mean HuggingFace?"),
        ([*HF, "missing"], "'missing'"),
        ([*HF, "nobody/no-such-data"], "nobody/no-such-data"),
        ([*HF, "empty"], "got an empty folder"),
        ([*HF, "text"], "text"),
        ([*HF, "pictures", "--data.image_column", "picture"], "expected image_column to be one of image, label"),
        ([*HF, "pictures", "--data.label_column", "class"], "expected label_column to be one of image, label"),
        (["--out", "other"], "other holds another study"),
        (["--out", "other", "--seeds", "2"], "other holds another study"),
        (["--out", "thesis"], "thesis holds files but no study"),
        (["--out", "thesis", "--seeds", "2"], "thesis holds files but no study"),
        (["--out", "a-file"], "a-file"),
        (["--config", "missing.yaml"], "expected --config to be a YAML file, got 'missing.yaml', which does not exist"),
        (["--bogus", "1"], "--bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_to_compare_is_one_sentence_and_writes_nothing(capsys, here, folders, args, said):
    assert said in complaint(capsys, here, "compare", *args)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--optimizer", "NSGD", "--optimizer.k", "0"], "expected k to be a whole number of at least 1, got 0"),
        (["--optimizer", "NSGD", "--optimizer.lr", "-0.1"], "-0.1"),
        (["--optimizer", "NSGD", "--optimizer.gamma", "-1"], "expected gamma to be a finite number >= 0"),
        (["--optimizer", "NSGD", "--optimizer.refresh_every", "0"], "expected refresh_every"),
        (
            ["--optimizer", "NSGD", "--optimizer.solver", "power"],
            "'auto', 'differences', 'gradients', 'lanczos', 'arpack'",
        ),
        (["--optimizer", "NSGD", "--optimizer.overhead", "0"], "expected overhead to be a number above 0"),
        (["--optimizer", "NSGD", "--optimizer.decay", "1"], "expected decay to be a number >= 0 and below 1"),
        (["--optimizer", "Nonsense"], "Nonsense"),
        (["--refresh.samples", "0"], "expected samples to be None for the default, or a whole number of at least 1"),
        (
            ["--refresh.group_size", "0"],
            "expected group_size to be None for the default, or a whole number of at least 1",
        ),
        (
            ["--optimizer", "NSGD", "--optimizer.solver", "gradients", "--refresh.optimizer", "3"],
            "expected optimizer to be an index into 1, got 3",
        ),
        (["--model.net", "resnet"], "resnet"),
        (["--data", "Mnist"], "Mnist"),
        (["--data.batch_size", "0"], "expected batch_size of at least 1, got 0"),
        (["--data.batch_size", "5000"], "expected batch_size of at most 1149"),
        ([*HF, "missing"], "'missing'"),
        ([*HF, "empty"], "got an empty folder"),
        ([*HF, "pictures", "--data.label_column", "class"], "expected label_column to be one of image, label"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt"),
        (["--bogus", "1"], "--bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_to_fit_is_one_sentence_and_overwrites_nothing(capsys, here, folders, args, said):
    assert said in complaint(capsys, here, "fit", *SHORT[:2], *SHORT[4:], *args)


def test_predictions_are_not_overwritten(capsys, here):
    assert code_of("fit", *SHORT) == 0
    (trained,) = here.rglob("*.ckpt")
    capsys.readouterr()
    (here / "predictions.csv").write_text("mine")
    assert code_of("predict", *SHORT, "--ckpt_path", str(trained)) == 2
    assert "predictions.csv exists" in capsys.readouterr().err
    assert (here / "predictions.csv").read_text() == "mine"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_is_asked_for_and_has_to_fit(capsys, here, folders, command):
    assert f"expected --ckpt_path, the checkpoint to {command}" in complaint(capsys, here, command, *SHORT)
    assert code_of("fit", *SHORT) == 0
    (trained,) = here.rglob("*.ckpt")
    capsys.readouterr()
    other = ("--data", "HuggingFace", "--data.path", "pictures", "--data.batch_size", "2")
    assert code_of(command, *SHORT[:2], *other, "--ckpt_path", str(trained)) == 2
    assert "the checkpoint is of another network or data set" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_sentence(capsys, here):
    assert code_of("fit", *SHORT) == 0
    (trained,) = here.rglob("*.ckpt")
    whole = torch.load(trained, weights_only=False)
    (here / "cut.ckpt").write_bytes(trained.read_bytes()[: trained.stat().st_size // 2])
    (here / "empty.ckpt").write_bytes(b"")
    (here / "text.ckpt").write_text("no checkpoint\n")
    torch.save([1, 2], here / "list.ckpt")
    torch.save({name: value for name, value in whole.items() if name != "state_dict"}, here / "bare.ckpt")
    for name in ("cut", "empty", "text", "list", "bare"):
        capsys.readouterr()
        assert code_of("test", *SHORT, "--ckpt_path", f"{name}.ckpt") == 2, name
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nsgd: ")]
        assert line.startswith(
            "nsgd: expected --ckpt_path to be a checkpoint of nsgd fit, got a file that cannot be read"
        )
    whole["optimizer_states"][0]["param_groups"][0]["nsgd_counts"] = "{"
    torch.save(whole, here / "counts.ckpt")
    assert code_of("fit", *SHORT, "--trainer.max_epochs", "2", "--ckpt_path", "counts.ckpt") == 2
    assert "expected nsgd_counts of the checkpoint to be a JSON object, got '{'" in capsys.readouterr().err


def test_fit_measures_on_the_way_and_draws_what_it_measured(capsys, here):
    assert code_of("fit", *SHORT, "--measure", "valley, quadratic", "--trainer.max_epochs", "4") == 0
    folder = here / "lightning_logs" / "version_0"
    out = capsys.readouterr().out
    assert "Measurements: " in out
    assert (folder / "measurements.html").exists()
    assert {path.stem for path in folder.glob("*.png")} == {"valley", "quadratic"}
    assert {row["quantity"] for row in rows(folder / "valley.csv")} >= {"loss", "position", "predicted position"}


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_a_second_run_in_one_folder_has_a_page_of_its_own_numbers(capsys, here):
    pages = []
    for lr in ("0.05", "0.31"):
        options = ("--measure", "quadratic", "--measure_overhead", "3", "--optimizer", "SGD", "--optimizer.lr", lr)
        assert code_of("fit", *SHORT, "--trainer.logger", "false", *options) == 0
        out = capsys.readouterr().out
        pages.append(Path(next(line for line in out.splitlines() if line.startswith("Measurements: "))[14:]))
    for page, table, lr in zip(pages, ("quadratic.csv", "quadratic-1.csv"), (0.05, 0.31), strict=True):
        written = read_csv(here / table)
        assert {row["value"] for row in written if row["quantity"] == "lr"} == {lr}
        ratio = np.median([row["value"] for row in written if row["quantity"] == "best rate"]) / lr
        text = page.read_text()
        assert f"its best rate is {ratio:.3g} times lr (median of " in text
        assert f"lr: {lr}" in text  # in the configuration
        for picture in re.findall(r'href="([^"]*\.png)"', text):
            assert (page.parent / picture).stem == Path(table).stem
    assert pages[0] != pages[1]


def test_measuring_what_is_unknown_is_one_sentence(capsys, here):
    said = complaint(capsys, here, "fit", *SHORT, "--measure", "slope")
    assert "expected measurements to be different ones of sharpness, valley" in said
    said = complaint(capsys, here, "compare", *TINY, "--measure", "[slope]")
    assert "expected measurements to be different ones of sharpness, valley" in said


@pytest.mark.parametrize(
    ("args", "mend"), [(["train"], "--help"), (["--seeds", "3"], "--help"), (["Compare"], "did you mean compare?")]
)
def test_an_unknown_command_is_one_sentence(capsys, here, args, mend):
    said = complaint(capsys, here, *args)
    assert "expected a command among compare, fit, validate, test, predict" in said
    assert mend in said


def test_a_fault_of_a_library_is_not_passed_off_as_bad_input(monkeypatch):
    """It keeps its traceback, for a bug report."""

    broken = eval(
        compile("lambda *_: np.array([1, 2]).reshape(3)", tables.__file__, "eval"), {"np": np}
    )  # a line of ours
    monkeypatch.setattr(tables, "summarise", broken)
    with pytest.raises(ValueError, match="reshape"):
        main(["compare", *TINY])


def test_an_interrupted_study_says_so_and_its_folders_config_starts_it_again(capsys, here, monkeypatch):
    from lightning_modules.commands import compare

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_study", interrupted)
    assert main(["compare"]) == 130
    assert capsys.readouterr().err.strip() == (
        "nsgd: interrupted; the same command keeps the finished runs and goes on"
    )
    monkeypatch.undo()
    monkeypatch.chdir(here)
    short = ["--epochs", "1", "--seeds", "1", "--methods", "[sgd]", "--data.limit", "300"]
    assert main(["compare", *short, "--out", "first"]) == 0
    assert main(["compare", "--config", "first/config.yaml", "--out", "second"]) == 0
    assert (here / "second" / "config.yaml").read_text() == (here / "first" / "config.yaml").read_text()
