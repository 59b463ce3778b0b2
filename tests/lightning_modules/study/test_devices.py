"""What a study trains on: devices that are found or missing, some of them made up, and precisions."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from studies import finished, silent, study, without_seconds
from torch.nn.functional import cross_entropy

from lightning_modules.commands.main import main
from lightning_modules.study import compare
from lightning_modules.study.compare import command_of, run_study
from lightning_modules.study.runs import evaluate
from lightning_modules.study.runs.check import check_study
from lightning_modules.study.runs.devices import Devices, find_devices
from lightning_modules.study.runs.launch import launch_on_ray
from lightning_modules.study.runs.plan import plan_runs
from lightning_modules.study.runs.subject import Subject
from lightning_modules.support.files import read_csv
from lightning_modules.support.score import EVALUATED
from lightning_modules.support.study_folder import StudyFolder

ONE: dict[str, Any] = {"methods": ["sgd"], "seeds": 1, "epochs": 2}


# -- which there are ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs, one of another kind, of which nothing but names is ever asked."""
    names = ["H100", "A100", "H100"]
    monkeypatch.setattr("lightning_fabric.accelerators.cuda.num_cuda_devices", lambda: len(names))
    monkeypatch.setattr("pytorch_lightning.accelerators.cuda.num_cuda_devices", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return names


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_without_a_gpu_there_is_the_cpu(accelerator):
    assert find_devices(accelerator, "bf16-mixed") == Devices("cpu", "cpu", ({},))


@pytest.mark.parametrize(
    ("visible", "places"), [(None, ("0", "2")), ("4,5,6", ("4", "6")), ("GPU-a, GPU-b,GPU-c", ("GPU-a", "GPU-c"))]
)
@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_gpus_like_the_first_are_shared_out(gpus, monkeypatch, accelerator, visible, places):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_devices(accelerator, "bf16-mixed") == Devices(
        "cuda", "H100", tuple({"CUDA_VISIBLE_DEVICES": place} for place in places)
    )


def test_the_cpu_can_be_had_beside_gpus(gpus):
    assert find_devices("cpu", "32-true") == Devices("cpu", "cpu", ({},))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--accelerator", "gpu"],
            "expected accelerator gpu on this machine, got cpu alone; leave accelerator out for",
        ),
        (["--accelerator", "gup"], "expected accelerator to be one of auto, gpu, "),
        (["--accelerator", "gup"], ", got 'gup'; did you mean gpu?"),
        (["--precision", "16-mixed"], "a precision that the CPU has, got 16-mixed; take bf16-mixed, or another"),
        (["--precision", "bf16"], "expected --precision to be '32-true', '64-true', 'bf16-mixed', "),
        (["--precision", "transformer-engine"], "expected precision transformer-engine to come with the package that"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*transformer.*")
def test_what_is_asked_for_and_missing_is_one_sentence_before_anything_is_written(tmp_path, capsys, words, said):
    options = ["--seeds", "1", "--epochs", "1", "--data", "Digits", "--data.limit", "300", *words]
    assert main(["compare", *options, "--out", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err.strip()
    assert said in complaint
    assert complaint.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_is_none_is_refused():
    with pytest.raises(
        ValueError, match=r"precision to be one of 32-true, .*, got 'bf16-mixd'; did you mean bf16-mixed"
    ):
        find_devices("cpu", "bf16-mixd")


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled, but CUDA is not available")
def test_sam_in_float16_is_refused_before_anything_is_written(gpus, tmp_path):
    said = "^expected a precision without a gradient scaler for sam, .*, got 16-mixed; take bf16-mixed, or leave sam"
    with pytest.raises(ValueError, match=said):
        run_study(study(precision="16-mixed", methods=["sgd", "sam"]), tmp_path / "out", silent)
    assert list(tmp_path.iterdir()) == []
    check_study(Subject(study(precision="16-mixed", methods=["sgd", "nsgd", "muon"])))
    check_study(Subject(study(precision="bf16-mixed", methods=["sam"])))


# -- a folder has one device -------------------------------------------------------------------------------------------


def test_a_folder_that_was_begun_on_another_device_is_refused(tmp_path):
    folder = finished(tmp_path, **ONE)
    path = StudyFolder(folder).file("environment")
    written = yaml.safe_load(path.read_text())
    assert written["device"] == "cpu"
    path.write_text(yaml.safe_dump({**written, "device": "H100"}))
    with pytest.raises(ValueError, match=r"was begun on H100, and this is cpu, where .*; give --accelerator for that"):
        run_study(study(**ONE), folder, silent)


def test_a_folder_of_the_cpu_goes_on_wherever_the_cpu_is_asked_for(tmp_path, monkeypatch):
    folder = finished(tmp_path, accelerator="cpu", **ONE)
    (folder / "runs" / "sgd-0" / "results.csv").unlink()
    message = r"was begun on cpu, and this is H100, .*; give --accelerator cpu, or another folder with --out$"
    with monkeypatch.context() as patch:
        patch.setattr("lightning_modules.study.runs.subject.find_devices", lambda *_: Devices("cuda", "H100", ({},)))
        with pytest.raises(ValueError, match=message):
            run_study(study(**ONE), folder, silent)
    assert not (folder / "runs" / "sgd-0" / "results.csv").exists()
    run_study(study(accelerator="cpu", **ONE), folder, silent)
    assert (folder / "runs" / "sgd-0" / "results.csv").exists()


def test_a_folder_of_before_goes_on_on_the_cpu_in_float32(tmp_path):
    folder = finished(tmp_path, **ONE)
    for name, options in (("config", ("accelerator", "precision")), ("environment", ("device",))):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in options}))
    run_study(study(**ONE), folder, silent)
    with pytest.raises(ValueError, match="precision was 32-true, now bf16-mixed"):
        run_study(study(precision="bf16-mixed", **ONE), folder, silent)


# -- runs side by side -------------------------------------------------------------------------------------------------


def on_gpus(places: int = 2) -> Subject:
    subject = Subject(study())
    vars(subject)["devices"] = Devices("cuda", "H100", tuple({"CUDA_VISIBLE_DEVICES": str(i)} for i in range(places)))
    return subject


def test_other_processes_are_told_what_was_found(tmp_path):
    command = command_of(on_gpus(), StudyFolder(tmp_path), plan_runs(study())[1])
    assert command[command.index("--accelerator") + 1] == "cuda"
    assert command[-2:] == ["--run", "1"]


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        (1, "4 runs to make, 1 at a time: about 60 seconds"),
        (2, "4 runs to make, 2 at a time: about 35 seconds"),  # a GPU each: (60 + 2 x 5) / 2
        (4, "4 runs to make, 4 at a time, on 2 x H100: at most about 40 seconds"),  # (60 + 4 x 5) / 2
    ],
)
def test_what_sharing_a_gpu_gains_is_not_promised(tmp_path, monkeypatch, jobs, said):
    monkeypatch.setattr(compare, "predicted_seconds", lambda *_: 60.0)
    monkeypatch.setattr(compare, "_cores", lambda: 16)
    subject = on_gpus()
    assert compare._forecast(subject, StudyFolder(tmp_path), plan_runs(subject.study), jobs, "local", 5.0) == said


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_task_of_ray_has_a_gpu_where_the_study_has(monkeypatch, gpus):
    asked: list[dict[str, Any]] = []

    def remote(**options: Any) -> Any:
        asked.append(options)
        return lambda run: SimpleNamespace(remote=lambda command: (run(command),))

    fake = SimpleNamespace(
        init=lambda **_: None, remote=remote, wait=lambda left, **_: (left[:1], left[1:]), get=lambda task: task[0]
    )
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(**vars(fake), exceptions=SimpleNamespace(RayError=OSError)))
    assert list(launch_on_ray({3: [sys.executable, "-c", ""]}, threads=2, gpus=gpus)) == [(3, None)]
    assert asked == [{"num_cpus": 2, "num_gpus": gpus, "max_retries": 0}]


# -- where read-outs are scored ----------------------------------------------------------------------------------------


def test_each_read_out_is_scored_on_the_device_of_the_run(monkeypatch):
    """Lightning leaves the module on the CPU after every fit, validation and test."""
    seen: list[str] = []

    class Module:
        device = "cpu"

        def to(self, device: str) -> None:
            self.device = device

    class ReadOuts:
        @contextmanager
        def applied(self, name: str, module: Module, calibration: Any) -> Iterator[None]:
            seen.append(f"{name} {module.device}")
            yield

    module = Module()

    def logged(judge: Any, module: Module, data: Any, stage: str) -> dict[str, float]:
        module.device = "cpu"
        return {f"{stage}_accuracy": 0.5}

    for name in ("training_samples", "calibration_batches"):
        monkeypatch.setattr(evaluate, name, lambda trainer, module, *_, **__: seen.append(module.device))
    monkeypatch.setattr(evaluate, "_mean_loss", lambda module, samples: seen.append(module.device) or 0.1)
    monkeypatch.setattr(evaluate, "logged_scores", logged)
    trainer: Any = SimpleNamespace(lightning_module=module, strategy=SimpleNamespace(root_device="gpu"))
    scored = evaluate.score_read_outs(
        trainer, ReadOuts(), ["last", "ema"], judge=lambda **_: None, score=study().score, stages=["val", "test"]
    )
    wanted = {"train_loss": 0.1, "val_accuracy": 0.5, "test_accuracy": 0.5}
    assert dict(scored) == {"last": wanted, "ema": wanted}
    assert seen == ["gpu", "gpu", "last gpu", "gpu", "ema gpu", "gpu"]
    assert module.device == "cpu"


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_a_run_and_its_scores_are_a_plain_loop_in_that_precision(tmp_path, precision):
    folder = finished(tmp_path, precision=precision, **ONE)
    row = next(row for row in read_csv(folder / "results.csv") if row["read_out"] == "swa")
    found = [row["loss"] for row in read_csv(folder / "runs" / "sgd-0" / "metrics.csv")]

    pl.seed_everything(0, verbose=False)
    subject = Subject(study(precision=precision, **ONE))
    data = subject.data()
    assert data is not None
    dtype = torch.float64 if precision == "64-true" else torch.float32

    def loss_of(net: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return cross_entropy(net(data.normalise(pixels).to(dtype)), labels)

    net = subject.module().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    average = torch.optim.swa_utils.AveragedModel(net)
    losses = []
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for pixels, labels in loader:
            loss = loss_of(net, pixels, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) > 6:  # the last quarter of 8
                average.update_parameters(net)
    assert found == losses
    pixels, labels = data.splits["train"]
    assert len(labels) < EVALUATED
    with torch.no_grad():
        loss = loss_of(average, pixels, labels)
    # bfloat16 sums in another order where there are other batches: 2 ** -8 of each of its outputs at most.
    assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-3 if precision == "bf16-mixed" else 1e-5)


def test_precisions_differ(tmp_path):
    rows = {
        read_csv(finished(tmp_path / p, precision=p, **ONE) / "results.csv")[0]["train_loss"]
        for p in ("32-true", "bf16-mixed", "64-true", "bf16-true")
    }
    assert len(rows) == 4


def test_a_study_in_bfloat16_that_was_interrupted_goes_on_byte_for_byte(tmp_path):
    options: dict[str, Any] = {"precision": "bf16-mixed", "methods": ["sgd", "nsgd"], "seeds": 1, "epochs": 2}
    whole = finished(tmp_path / "whole", **options)
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("results.csv", "runs/nsgd-0/results.csv", "runs/nsgd-0/metrics.csv"):
        (tmp_path / "cut" / name).unlink()
    assert without_seconds(finished(tmp_path / "cut", **options)) == without_seconds(whole)
