"""Files of a stranger execute nothing: YAML is loaded safely wherever it is read, and so are checkpoints."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from dry import PLANTED, UNSAFE, Stopped, stop_before_work

import lightning_modules
import nsgd
from lightning_modules.commands.main import main
from lightning_modules.support.files import read_yaml

ROOMS = [Path(package.__file__ or "").parent for package in (nsgd, lightning_modules)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The sentence that a command line is refused with."""
    assert main(list(argv)) == 2, argv
    assert not Path(PLANTED).exists(), argv
    return capsys.readouterr().err


def test_what_is_planted_would_show(here):
    """Or the tests of this file could not fail."""
    import yaml

    yaml.unsafe_load(UNSAFE)
    assert Path(PLANTED).exists()


@pytest.mark.parametrize(
    "key", ["seeds", "seed", "data", "model", "lr", "settings", "optimizer", "trainer", "potential"]
)
@pytest.mark.parametrize("command", [["compare"], ["compare", "--config"], ["escape", "--config"], ["fit", "--config"]])
def test_a_config_executes_nothing(here, monkeypatch, capsys, command, key):
    stop_before_work(monkeypatch)
    for text in (f"{key}: {UNSAFE}\n", f"{key}: [1, {{a: {UNSAFE}}}]\n", f"{UNSAFE}\n"):
        Path("unsafe.yaml").write_text(text)
        assert "YAML" in refused(capsys, *command, "unsafe.yaml")


@pytest.mark.parametrize(
    "option", ["--data", "--model", "--optimizer", "--lr_scheduler", "--damp", "--trainer.callbacks"]
)
def test_a_file_or_a_value_for_an_option_executes_nothing(here, monkeypatch, capsys, option):
    stop_before_work(monkeypatch)
    Path("unsafe.yaml").write_text(f"class_path: {UNSAFE}\n")
    for value in ("unsafe.yaml", UNSAFE, f"{{class_path: {UNSAFE}}}", f"[{UNSAFE}]"):
        refused(capsys, "fit", option, value)


@pytest.mark.parametrize("command", [["compare", "digits"], ["escape"]])
def test_the_files_of_a_study_folder_execute_nothing(here, monkeypatch, capsys, command):
    stop_before_work(monkeypatch)
    with pytest.raises(Stopped):
        main([*command, "--out", "study"])
    files = sorted(Path("study").rglob("*.yaml"))
    assert {"config.yaml", "environment.yaml"} < {file.name for file in files}
    for file in files:
        text = file.read_text()
        file.write_text(f"{text}more: {UNSAFE}\n")
        assert str(file) in refused(capsys, *command, "--out", "study")
        file.write_text(text)
    with pytest.raises(Stopped):  # it was these lines
        main([*command, "--out", "study"])


def test_every_other_file_is_read_by_the_one_function_which_executes_nothing(here):
    """Settings that a study settled, rehearsals, finalists, the folders of runs, what a report reads."""
    Path("unsafe.yaml").write_text(f"more: {UNSAFE}\n")
    with pytest.raises(ValueError, match="options in YAML"):
        read_yaml(Path("unsafe.yaml"))
    assert not Path(PLANTED).exists()


def test_nothing_in_the_packages_loads_what_it_would_execute():
    seen = set()
    for path in (file for room in ROOMS for file in room.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                if call == "torch.load":
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert given.get("weights_only") == "True", (path, node.lineno)
                    seen.add(call)
                elif call.startswith(("yaml.", "pickle.", "marshal.", "shelve.", "joblib.")):
                    assert call in ("yaml.safe_load", "yaml.safe_dump"), (path, node.lineno, call)
                    seen.add(call)
    assert seen == {"torch.load", "yaml.safe_load", "yaml.safe_dump"}


class Planting:
    """Executes something where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {PLANTED}",)


def test_a_planting_pickle_would_show(here):
    torch.save(Planting(), "planting.ckpt")
    torch.load("planting.ckpt", weights_only=False)
    assert Path(PLANTED).exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "optimizer_states", "callbacks", "a pickle"])
def test_a_checkpoint_executes_nothing(here, capsys, command, place):
    if place == "a pickle":
        Path("planting.ckpt").write_bytes(pickle.dumps({"state_dict": Planting()}))
    else:
        whole = {"hyper_parameters": {}, "state_dict": {}, "optimizer_states": [], "callbacks": {}, "epoch": 0}
        whole |= {"global_step": 0, "pytorch-lightning_version": "2.0.0", place: {"more": Planting()}}
        torch.save(whole, "planting.ckpt")
    quick = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    assert "--ckpt_path" in refused(capsys, command, *quick, "--ckpt_path", "planting.ckpt")
