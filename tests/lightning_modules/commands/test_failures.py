"""What is no fault of ours ends in one sentence, with its cause and an exit code; what is keeps its traceback."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules import Digits
from lightning_modules.commands.failures import BAD_INPUT, FAILED, sentence_on
from lightning_modules.commands.main import main
from lightning_modules.support import whole_files
from lightning_modules.support.files import read_csv

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available:UserWarning"),
]

QUIET = [
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
TINY = [
    *("--data.batch_size", "50", "--data.limit", "300", "--epochs", "1", "--seeds", "1", "--lr", "0.2"),
    *("--methods", "[sgd,sgd-momentum]"),
]
FOREIGN = """
import torch, pytorch_lightning as pl
from torch.utils.data import DataLoader, TensorDataset


class Dicts(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"a": torch.ones(3), "b": 1}] * 8, 4)


class Rows(pl.LightningDataModule):
    input_shape, num_classes = (1, 8, 8), 10

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 5), torch.zeros(8, dtype=torch.long)), 4)


class Floats(Rows):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.randn(8)), 4)


class Far(Rows):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.full((8,), 10)), 4)


class Own(pl.LightningModule):
    def __init__(self, fault: str = ""):
        super().__init__()
        self.net, self.fault = torch.nn.Linear(4, 3), fault
        if fault == "made":
            raise LookupError("not today")

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def loss(self, batch):
        if self.fault == "step":
            {}["b"]
        if self.fault == "shape":
            self.net(batch[0][:, :2])
        if self.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 4)), 4)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a-file").write_text("x")
    return tmp_path


@pytest.fixture
def foreign(here: Path) -> str:
    """A module of the user's, under a name of its own, since Python keeps modules."""
    foreign.number += 1
    name = f"foreign_{foreign.number}"
    (here / f"{name}.py").write_text(FOREIGN)
    return name


foreign.number = 0


def said(capsys: Any, code: int, *args: str) -> str:
    """The one sentence that a command line ends with, and no traceback."""
    capsys.readouterr()
    assert main(list(args)) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("nsgd: ")]
    return line.removeprefix("nsgd: ")


def trained(optimizer: str) -> str:
    """A checkpoint of one short training."""
    assert main(["fit", *QUIET, "--optimizer", optimizer, "--optimizer.lr", "0.1"]) == 0
    return str(max(Path().rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns))


# -- options that Lightning and torch refuse -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trainer.accumulate_grad_batches", "0"], "expected --trainer.accumulate_grad_batches above 0, got 0"),
        (["--trainer.check_val_every_n_epoch", "0"], "expected --trainer.check_val_every_n_epoch above 0, got 0"),
        (["--trainer.val_check_interval", "0"], "expected --trainer.val_check_interval above 0, got 0"),
        (["--trainer.gradient_clip_val", "-1"], "expected --trainer.gradient_clip_val of at least 0, got -1"),
        (["--trainer.devices", "-2"], "bad --trainer options: `devices` selected with `CPUAccelerator`"),
        (["--seed_everything", "-1"], "lightning_fabric.utilities.seed refuses it: -1 is not in bounds"),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "a-file/x"], "a-file/x (Not a directory)"),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "/proc/x"], "/proc/x (No such file or dir"),
        (
            ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "0"],
            "torch.optim.lr_scheduler ended with ZeroDivisionError",
        ),
        (["--optimizer", "SparseAdam"], "the optimizer refuses an option: SparseAdam does not support dense gradients"),
        (["--optimizer", "SparseAdam", "--damp.k", "4"], "SparseAdam does not support dense gradients"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_lightning_or_torch_refuses_is_bad_input(capsys, args, words):
    assert words in said(capsys, 2, "fit", *QUIET, "--optimizer", "SGD", "--optimizer.lr", "0.1", *args)


# -- classes of the user's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("Dicts", "expected batches of images (B, 1, 8, 8) and labels (B,), got a dict"),
        ("Rows", "expected batches of images (B, 1, 8, 8) and labels (B,), got images (4, 5)"),
        ("Floats", "expected labels (B,) that are whole numbers, got torch.float32 (4,)"),
    ],
)
def test_data_that_no_classifier_takes_are_said_with_what_they_are(capsys, foreign, data, words):
    options = ["--model.input_shape", "[1,8,8]", "--model.num_classes", "10"] if data == "Dicts" else []
    assert words in said(capsys, 2, "fit", *QUIET, "--data", f"{foreign}.{data}", *options)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("step", 1, r"KeyError: 'b' in loss \(NAME.py, line \d+\), called from training_step \(NAME.py, line \d+\)"),
        (
            "shape",
            1,
            r"RuntimeError: mat1 and mat2 shapes cannot be multiplied \(4x2 and 4x3\) in loss \(NAME.py, line",
        ),
        ("memory", 1, r"expected more memory than there is \(CUDA out of memory\); give smaller batches"),
        ("made", 1, r"LookupError: not today in __init__ \(NAME.py, line \d+\)"),
    ],
)
def test_what_a_class_of_the_users_met_is_said_with_the_line(capsys, foreign, fault, code, words):
    line = said(capsys, code, "fit", *QUIET, "--model", f"{foreign}.Own", "--model.fault", fault)
    assert re.match(words.replace("NAME", foreign), line)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    file = Digits.normalise.__code__.co_filename
    names: dict[str, Any] = {}
    exec(compile("def normalise(self, pixels):\n    return pixels.no_such_name", file, "exec"), names)
    monkeypatch.setattr(Digits, "normalise", names["normalise"])
    with pytest.raises(AttributeError, match="no_such_name"):
        main(["fit", *QUIET])


def chained(*errors: Exception, link: str = "__context__") -> Exception:
    """The first of some exceptions, each of which the next one led to; what was never raised has no frames."""
    for error, cause in itertools.pairwise(errors):
        setattr(error, link, cause)
    return errors[0]


@pytest.mark.parametrize("link", ["__context__", "__cause__"])
@pytest.mark.parametrize("kind", [IndexError, RuntimeError, OSError, MemoryError])
def test_causes_whose_frames_a_library_dropped_are_read_all_the_same(kind, link):
    """As by a client that tries again: the sentence that we raised is found behind them, and no error is added."""
    sentence = "expected a data set of the hub, got nobody/nothing; give another"
    behind = sentence_on(chained(RuntimeError("gave up"), kind("five times"), ValueError(sentence), link=link))
    alone = sentence_on(chained(RuntimeError("gave up"), kind("five times"), link=link))
    if kind is MemoryError:  # the machine's word comes first
        words = "expected more memory than there is (five times); give smaller batches or a smaller network"
        assert behind == alone == (words, FAILED)
    else:
        assert behind == (sentence, BAD_INPUT)
        assert alone is None  # nobody's: it keeps its traceback


@pytest.mark.parametrize("raised", ["error", "cause"])
def test_of_an_error_and_its_cause_the_one_with_frames_is_said(raised):
    """The frames that are left are this test's, which is a user to the command."""

    def with_frames(error: Exception) -> Exception:
        try:
            raise error
        except Exception as met:
            return met

    errors = {"error": RuntimeError("gave up"), "cause": IndexError("five times")}
    errors[raised] = with_frames(errors[raised])
    sentence, code = sentence_on(chained(*errors.values())) or ("", 0)
    assert sentence.startswith(f"{type(errors[raised]).__name__}: {errors[raised]} in with_frames (")
    assert code == FAILED


# -- checkpoints -----------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch EVIL",)


def test_a_checkpoint_that_is_none_is_said_and_executes_nothing(capsys, here):
    path = trained("NSGD")
    whole = torch.load(path, weights_only=True)
    (here / "folder.ckpt").mkdir()
    torch.save({"a": 1}, here / "other.ckpt")
    torch.save({**whole, "hyper_parameters": {"x": Evil()}}, here / "evil.ckpt")
    (here / "pickle.ckpt").write_bytes(pickle.dumps(Evil()))
    for command, options in (("fit", ["--optimizer", "NSGD", "--optimizer.lr", "0.1"]), ("test", [])):
        for name in ("other", "evil", "pickle"):
            line = said(capsys, 2, command, *QUIET[6:], *options, "--ckpt_path", f"{name}.ckpt")
            assert line.startswith(
                "expected --ckpt_path to be a checkpoint of nsgd fit, got a file that cannot be read"
            )
        line = said(capsys, 2, command, *QUIET[6:], *options, "--ckpt_path", "folder.ckpt")
        assert "folder.ckpt (Is a directory)" in line
        for name in ("best", "last", "hpc"):
            line = said(capsys, 2, command, *QUIET[6:], *options, "--ckpt_path", name)
            assert line.startswith("expected --ckpt_path to be a checkpoint")
            assert name in line
    assert not (here / "EVIL").exists()
    pickle.loads(pickle.dumps(Evil()))  # it would have
    assert (here / "EVIL").exists()


def test_the_last_checkpoint_is_taken_where_there_is_one():
    keep = ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.dirpath", "kept"]
    keep += ["--trainer.callbacks.save_last", "true"]
    assert main(["fit", *QUIET, *keep]) == 0
    assert main(["test", *QUIET[6:], *keep, "--ckpt_path", "last"]) == 0
    tested = [path for path in Path().rglob("metrics.csv") if "test_loss" in path.read_text()]
    assert len(tested) == 1
    assert main(["fit", *QUIET[2:], "--trainer.max_epochs", "2", *keep, "--ckpt_path", "last"]) == 0


@pytest.mark.parametrize(("first", "second"), [("NSGD", "AdamW"), ("AdamW", "NSGD"), ("SGD", "RMSprop")])
def test_a_checkpoint_of_another_optimizer_is_refused(capsys, first, second):
    options = ["--optimizer", second, "--optimizer.lr", "0.1", "--ckpt_path", trained(first)]
    line = said(capsys, 2, "fit", *QUIET[2:], "--trainer.max_epochs", "2", *options)
    assert f"expected --ckpt_path to be of a training with {second}, got one of another optimizer: it has " in line


@pytest.mark.parametrize(("first", "second"), [("SGD", "NSGD"), ("NSGD", "SGD")])
def test_directions_may_begin_or_end_at_a_checkpoint(first, second):
    options = ["--optimizer", second, "--optimizer.lr", "0.1", "--ckpt_path", trained(first)]
    assert main(["fit", *QUIET[2:], "--trainer.max_epochs", "2", *options]) == 0


# -- files of options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "text", "words"),
    [
        ("fit", "", "a line NAME: VALUE for each, got a.yaml, which is empty"),
        ("compare", "# nothing\n", "a line NAME: VALUE for each, got a.yaml, which is empty"),
        ("escape", "- a\n", "a line NAME: VALUE for each, got a.yaml, a list"),
        (
            "fit",
            "optimizer: {class_path: NSGD, lr: 0.1}\n",
            "write optimizer as {class_path: NSGD, init_args: {OPTION: VALUE}}",
        ),
        (
            "compare",
            "data: {class_path: HuggingFace, path: x}\n",
            "expected the options of HuggingFace in init_args, got them beside class_path; write data as",
        ),
        ("compare", "data: !!python/object/apply:os.system ['touch EVIL']\n", "expected a config in YAML"),
        ("fit", "data: !!python/object/apply:os.system ['touch EVIL']\n", "expected a config in YAML"),
    ],
)
def test_a_file_of_options_that_is_none_is_said(capsys, here, command, text, words):
    (here / "a.yaml").write_text(text)
    assert words in said(capsys, 2, command, "--config", "a.yaml")
    assert not (here / "EVIL").exists()


def test_a_list_that_was_given_as_a_word_is_shown_as_a_list(capsys):
    line = said(capsys, 2, "compare", "digits", "--measure", "all")
    assert line == "expected --measure to be a list of texts, got 'all'; write a list as '[all]'"


# -- a full disk -----------------------------------------------------------------------------------------------------


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


@pytest.mark.parametrize("written", [0, 3, 7])
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(capsys, here, monkeypatch, written):
    assert main(["compare", *TINY, "--out", "whole"]) == 0
    fsync, left = os.fsync, [written * 2]  # of a file and of its folder

    def full(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patched:
        patched.setattr(whole_files.os, "fsync", full)
        line = said(capsys, 1, "compare", *TINY, "--out", "cut")
    assert re.fullmatch(
        r"expected room to write cut/\S+, got none \(No space left on device\); make some, and give the same .*",
        line,
    )
    assert partials(here) == []
    assert list(here.rglob("failed.txt")) == []
    assert main(["compare", *TINY, "--out", "cut"]) == 0
    assert read_csv(here / "cut" / "results.csv") == read_csv(here / "whole" / "results.csv")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_disk_that_is_really_full_keeps_what_is_finished(capsys, here, jobs):
    disk = here / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=36k", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("nothing may be mounted here")
    try:
        command = ["compare", *TINY, "--out", "disk/out", "--jobs", jobs]
        assert "got none (No space left on device)" in said(capsys, 1, *command)
        assert list(disk.rglob("failed.txt")) == []
        kept = {path: path.read_bytes() for path in disk.rglob("results.csv")}
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert main(command) == 0
        assert all(path.read_bytes() == content for path, content in kept.items())
        assert len(read_csv(disk / "out" / "results.csv")) > 0
        assert partials(disk) == []  # of workers that were ended while they wrote, too
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- a folder that may not be written --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("barred", ["out", "out/runs", "out/runs/sgd-momentum-0", "out/summary.csv"])
def test_a_forbidden_folder_ends_a_study_and_loses_no_run(capsys, here, monkeypatch, number, barred):
    """At any depth, in one sentence, whatever is there already; when it is allowed the same command goes on."""
    command = ["compare", "digits", *TINY, "--out", "out"]
    if barred != "out":
        assert main([*command, "--run", "0"]) == 0
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}

    def refusing(function: Any) -> Any:
        def refused(path: Any, *args: Any, **options: Any) -> Any:
            place = str(path)
            written = function is not open_ or args[0] & os.O_CREAT
            if written and (place == barred or place.startswith((f"{barred}/", f"{barred}."))):
                raise OSError(number, os.strerror(number), place)
            return function(path, *args, **options)

        return refused

    open_ = os.open
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refusing(os.open))
        patched.setattr(os, "mkdir", refusing(os.mkdir))
        line = said(capsys, 2, *command)
        assert main(command) == 2
        assert "died" not in capsys.readouterr().out
    assert barred in line
    assert os.strerror(number) in line
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not [*partials(here), *here.rglob("failed.txt")]
    assert main(command) == 0
    assert len(read_csv(here / "out" / "results.csv")) > 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a folder on itself")
def test_a_folder_that_is_really_read_only_is_said(capsys, here):
    folder = here / "disk"
    folder.mkdir()
    command = ["compare", "digits", *TINY, "--out", "disk/out"]
    assert main([*command, "--run", "0"]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        fit = ["fit", *QUIET, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir"]
        for place, *args in (
            ("disk/out/runs/sgd-momentum-0", *command),
            ("disk/out/runs/sgd-momentum-0", *command, "--jobs", "2"),
            ("disk/out/runs/sgd-momentum-0", *command, "--run", "1"),
            ("disk/new", *command[:-1], "disk/new"),
            ("disk/both", "compare", "--out", "disk/both"),
            ("disk/escape", "escape", "--out", "disk/escape"),
            ("disk/logs", *fit, "disk/logs"),
        ):
            line = said(capsys, 2, *args)
            assert f"{place}" in line
            assert "Read-only file system" in line
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert main(command) == 0
