"""`nsgd fit` with our own model and data in every precision, and in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from lightning_modules.commands.main import main
from lightning_modules.support.files import read_csv

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMALL = ["--data.batch_size", "50", "--data.limit", "300"]  # 240 training images and 60 to validate
TEXT = ["--model", "LanguageModel", "--model.dim", "16", "--model.depth", "1", "--data.batch_size", "8"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("optimizer", ["SGD", "NSGD", "NSGD of samples"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)]
)
def test_our_classifier_and_digits_in_true_precisions(precision, dtype, optimizer):
    name, _, samples = optimizer.partition(" of ")
    options = ["--optimizer", name, "--optimizer.lr", "0.05"]
    options += ["--optimizer.solver", "gradients", "--optimizer.refresh_every", "2"] if samples else []
    precise = [*QUIET, *SMALL, "--trainer.precision", precision]
    assert main(["fit", *precise, *options, "--trainer.max_epochs", "2"]) == 0
    (path,) = Path().rglob("*.ckpt")
    weights = torch.load(path, weights_only=True)["state_dict"]
    floats = {value.dtype for value in weights.values() if value.is_floating_point()}
    assert floats == {dtype}
    assert all(value.isfinite().all() for value in weights.values())
    assert main(["test", *precise, "--ckpt_path", str(path)]) == 0
    tested = read_csv(Path("lightning_logs/version_1/metrics.csv"))[-1]
    assert tested["test_loss"] < 2.4  # ten classes by chance: 2.3


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_our_language_model_in_true_precisions(precision):
    options = ["--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "2", "--trainer.max_epochs", "1"]
    assert main(["fit", *QUIET, *TEXT, *options, "--trainer.precision", precision]) == 0


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_two_processes_share_the_data_and_validate_all_of_it(strategy):
    """Against one process: half as many steps, and the same validation loss, of all images and not of a half."""
    train = ["--optimizer", "SGD", "--optimizer.lr", "1e-7", "--trainer.max_epochs", "1", "--data.limit", "300"]
    assert main(["fit", *QUIET, *train, "--data.batch_size", "30"]) == 0  # the weights stay near those of the seed
    command = [sys.executable, "-W", "ignore", "-m", "lightning_modules", "fit", *QUIET, *train]
    command += ["--data.batch_size", "30", "--trainer.strategy", strategy, "--trainer.devices", "2"]
    command += ["--trainer.accelerator", "cpu", "--measure", "quadratic", "--measure_overhead", "3"]
    command += ["--trainer.callbacks+", "WriteAverages"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ran = subprocess.run(command, env=environment, text=True, timeout=200, check=False, **pipes)
    assert ran.returncode == 0, ran.stdout
    assert "Traceback" not in ran.stdout
    one, two = (read_csv(Path(f"lightning_logs/version_{i}/metrics.csv")) for i in (0, 1))
    losses = [next(row["val_loss"] for row in rows if "val_loss" in row) for rows in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    steps = [torch.load(path, weights_only=True)["global_step"] for path in sorted(Path().rglob("*step=*.ckpt"))]
    assert sorted(steps) == [4, 8]  # 8 batches of 30, and two at a time
    assert not any(name.startswith("nsgd/") for row in two for name in row)  # it was SGD that trained
    folder = Path("lightning_logs/version_1")
    assert {path.stem for path in (folder / "averages").iterdir()} == {"last", "ema", "swa", "two-point"}
    assert (folder / "quadratic.csv").exists()
    assert not Path("lightning_logs/version_2").exists()
    apart = strategy == "ddp_spawn"
    assert (folder / "measurements.html").exists() is not apart
    assert ("trains in processes that have ended" in ran.stdout) is apart


def test_a_run_leaves_no_group_of_processes_and_one_that_was_there_alone(monkeypatch):
    """Left to the end of Python, the threads of gloo's would abort the process now and then, though all is done."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # so that what Lightning sets is put back
        monkeypatch.delenv(name)
    begun: list[int] = []
    begin = distributed.init_process_group
    monkeypatch.setattr(distributed, "init_process_group", lambda *a, **k: (begun.append(1), begin(*a, **k)))
    options = [
        "--optimizer",
        "SGD",
        "--optimizer.lr",
        "0.05",
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_steps",
        "2",
    ]
    options += ["--trainer.strategy", "ddp", "--trainer.devices", "1"]
    assert main(["fit", *QUIET, *SMALL, *options]) == 0
    assert begun
    assert not distributed.is_initialized()
    begin("gloo", init_method=f"file://{Path('store').resolve()}", rank=0, world_size=1)
    try:
        assert main(["fit", *QUIET, *SMALL, *options]) == 0
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()
