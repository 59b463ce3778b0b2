"""What Lightning 2.6 does to optimizers, averages and command lines that look right, and that ours do not fall for it.

Trap, then the test, which is here unless a file is named:

- A step that calls its closure twice adds a batch twice: test_the_closure_runs_once_a_step.
- Means over an epoch count every call of training_step; so do metrics and BatchNorm:
  test_refresh_callback, test_refreshing_leaves_training_bit_identical, with clipping and accumulation.
- fp16 runs the closure itself and passes None: test_a_scaled_step_comes_without_a_closure.
- Hooks see the loss scaled, and divided by the accumulated batches:
  test_refresh_callback, test_eigenvalues_under_loss_scaling_are_those_of_the_unscaled_loss.
- There is no graph where gradients are off: test_batch_loss, test_the_graph_is_there_also_where_gradients_are_off.
- A checkpoint is read with weights_only=True: test_a_checkpoint_holds_plain_values_only.
- load_state_dict casts state to the dtype of the parameters:
  tests/nsgd/test_checkpoints, test_a_checkpoint_loads_into_another_dtype_and_the_basis_stays_as_good.
- Resuming at an epoch boundary has to be exact, schedules too: test_refresh_callback, test_averages and test_fit.
- An average that never began overwrites the weights: test_an_average_that_never_began_is_not_written, and
  test_averages, test_an_average_that_never_began_is_not_available.
- Validation sees an average, or the initial weights: test_validation_sees_the_last_weights.
- Integer buffers are averaged: test_integer_buffers_are_not_averaged.
- Averaged weights have the BatchNorm statistics of others:
  test_averages, test_batchnorm_statistics_are_those_of_the_calibration_batches.
- SWA takes a hidden step and another schedule: test_averages_add_no_step_and_leave_the_schedule.
- A checkpoint holds the average for the weights: test_resuming_without_the_averages_goes_on_from_the_weights.
- A config.yaml stops the second run without a logger: test_a_second_run_without_a_logger_keeps_the_first_config.
- Short names are known only of what is imported: test_short_names_of_callbacks_and_optimizers.
- Links want both sides: test_fit, test_a_model_learns_of_its_data_what_both_know.
- Options of the default class reach the class that is given:
  test_fit, test_a_class_of_ones_own_gets_no_options_of_the_default_one.
- --optimizer replaces configure_optimizers with its schedule: test_replacing_the_schedule_is_said.
- The class of a checkpoint has to be imported: test_fit, test_a_checkpoint_of_another_module_asks_for_its_config.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from strangers import Everything, Smooth, loader

from lightning_modules import ReadOuts, RefreshDirections, SharpnessMonitor
from lightning_modules.callbacks.write_averages import WriteAverages
from lightning_modules.commands.main import main
from nsgd import NSGD

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
DEMO = ["--model", "pytorch_lightning.demos.boring_classes.BoringModel", "--trainer.limit_val_batches", "1"]


class Counted(NSGD):
    """Notes how often each step calls its closure; None where it gets none."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.calls: list[int | None] = []

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            self.calls.append(None)
            return super().step()
        self.calls.append(0)

        def counted() -> Any:
            self.calls[-1] += 1
            return closure()

        return super().step(counted)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 4), (2, 2), (3, 2)])
def test_the_closure_runs_once_a_step(make_trainer, accumulate, steps, clip):
    module = Everything(partial(Counted, lr=0.1, k=2, refresh_every=1))
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = make_trainer(callbacks=[RefreshDirections(), ReadOuts()], **options)
    trainer.fit(module, loader(samples=64))
    assert trainer.optimizers[0].calls == [1] * steps
    assert trainer.global_step == steps
    assert module.calls == 4  # of training_step: once for each batch, refreshes not counted


def test_a_scaled_step_comes_without_a_closure(make_trainer):
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Everything(partial(Counted, lr=0.1, k=2, gamma=0.0, refresh_every=1))
    trainer = make_trainer(callbacks=[RefreshDirections()], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    trainer.fit(module, loader(samples=64))
    optimizer = trainer.optimizers[0]
    assert optimizer.calls == [None] * 4
    assert optimizer.refreshes == 4
    assert optimizer.alignment > 0  # of a step that was damped, and so measured


def test_a_checkpoint_holds_plain_values_only(make_trainer, tmp_path):
    module = Everything(partial(NSGD, lr=0.1, momentum=0.9, k=2))
    trainer = make_trainer(callbacks=[RefreshDirections(), ReadOuts(), SharpnessMonitor(every=2)], max_epochs=2)
    trainer.fit(module, loader(samples=64))
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    saved = torch.load(tmp_path / "all.ckpt", weights_only=True)  # nothing else passes
    kinds: set[type] = set()

    def look(value: Any) -> None:
        kinds.add(type(value))
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []:
            look(part)

    look(saved["optimizer_states"])
    assert kinds <= {dict, list, tuple, torch.Tensor, int, float, str, bool, type(None)}
    assert {key.partition("{")[0] for key in saved["callbacks"]} >= {"ReadOuts", "SharpnessMonitor"}


# -- averages --------------------------------------------------------------------------------------------------------


class Validated(Everything):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


class Validations(pl.Callback):
    """What every validation says."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found.append(float(trainer.callback_metrics["val"]))


def test_validation_sees_the_last_weights(make_trainer):
    found = []
    for callbacks in ([], [ReadOuts(ema_decay=0.9)], [WriteAverages(ema_decay=0.9)]):
        validations = Validations()
        torch.manual_seed(0)
        trainer = make_trainer(max_epochs=3, callbacks=[*callbacks, validations])
        trainer.fit(Validated(SGD), loader(samples=64), loader(seed=9))
        found.append(validations.found)
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2]


def test_an_average_that_never_began_is_not_written(make_trainer, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    averages = WriteAverages()
    module = Smooth(SGD)
    trainer = make_trainer(max_epochs=10, callbacks=[averages, Stop()])
    trainer.fit(module, loader(samples=32, features=2, number=2))
    assert trainer.global_step == 2
    assert {path.stem for path in (tmp_path / "averages").iterdir()} == {"last", "ema"} == set(averages.paths)
    last = torch.load(averages.paths["last"], weights_only=True)["state_dict"]
    assert all(torch.equal(last[name], value) for name, value in module.state_dict().items())


def test_integer_buffers_are_not_averaged(make_trainer, tmp_path):
    module = Everything(SGD)
    make_trainer(max_epochs=6, callbacks=[WriteAverages(calibration=48)]).fit(module, loader(samples=64))
    assert int(module.net[1].num_batches_tracked) == 24  # every batch, and no more
    for name in ("last", "ema", "swa", "two-point"):
        saved = torch.load(tmp_path / "averages" / f"{name}.ckpt", weights_only=True)["state_dict"]
        tracked = saved["net.1.num_batches_tracked"]
        assert (tracked.dtype, int(tracked)) == (torch.int64, 1)  # of its own calibration, one batch of 48


@pytest.mark.parametrize("make", [ReadOuts, WriteAverages])
def test_averages_add_no_step_and_leave_the_schedule(make_trainer, make):
    """Also where no validation ends the last epoch: there SWA of Lightning stepped on stale gradients."""

    class Scheduled(Validated):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.net.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    found = []
    for callbacks in ([], [make(swa_share=0.5)]):
        torch.manual_seed(0)
        module = Scheduled(SGD)
        trainer = make_trainer(max_epochs=4, callbacks=callbacks, check_val_every_n_epoch=3)
        trainer.fit(module, loader(samples=64), loader())
        found.append((module.plain_state(), trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))
    assert found[0] == found[1]
    assert found[0][1:] == (16, 0.1 * 0.5**4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_resuming_without_the_averages_goes_on_from_the_weights(make_trainer, tmp_path):
    def run(epochs: int, callbacks: list[Any], resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        module = Smooth(SGD)
        trainer = make_trainer(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(module, loader(features=2, number=2), ckpt_path=resume)
        return module, trainer

    _, half = run(2, [ReadOuts(ema_decay=0.5)])
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, whole = run(4, [], tmp_path / "half.ckpt")[0], run(4, [])[0]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest"])
    return tmp_path


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_second_run_without_a_logger_keeps_the_first_config(here):
    (here / "config.yaml").write_text("mine: 1\n")
    for _ in range(2):
        args = [*DEMO, *QUIET, "--trainer.logger", "false", "--trainer.max_epochs", "1"]
        assert main(["fit", *args, "--trainer.limit_train_batches", "2"]) == 0
    assert (here / "config.yaml").read_text() == "mine: 1\n"
    assert (here / "config-1.yaml").exists()
    assert (here / "config-2.yaml").exists()


def test_short_names_of_callbacks_and_optimizers(here, capsys):
    names = ["RefreshDirections", "SharpnessMonitor", "ValleyWalk", "BatchQuadratic", "AveragingExperiment"]
    names += ["ReadOuts", "WriteAverages", "EMAWeightAveraging", "EarlyStopping"]
    callbacks = [word for name in names for word in ("--trainer.callbacks+", name)] + [
        "--trainer.callbacks.monitor",
        "x",
    ]
    for optimizer in ("NSGD", "SGD", "AdamW"):
        with pytest.raises(SystemExit) as exit_:
            main(["fit", *callbacks, "--optimizer", optimizer, "--lr_scheduler", "ConstantLR", "--print_config"])
        assert not exit_.value.code
        out = capsys.readouterr().out
        assert all(f".{name}\n" in out for name in [*names, optimizer, "ConstantLR"])


@pytest.mark.parametrize(
    ("args", "said"), [(["--optimizer", "SGD", "--optimizer.lr", "0.01"], True), (["--damp", "{}"], False)]
)
def test_replacing_the_schedule_is_said(here, caplog, args, said):
    caplog.set_level(logging.INFO)
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"]
    assert main(["fit", *DEMO, *QUIET, *limits, *args]) == 0
    assert ("--optimizer takes the place of BoringModel.configure_optimizers and its schedules" in caplog.text) == said
