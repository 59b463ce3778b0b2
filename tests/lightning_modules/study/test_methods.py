"""The methods of a study: any optimizer by its class, the module's own, Muon, schedules, and what is refused."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import pytorch_optimizer
import torch
import yaml
from studies import OPTIONS, finished, on_a_plateau, plain_start, plain_steps, silent, study, without_seconds
from torch import nn
from torch.nn import functional as F

from lightning_modules import Classifier, Digits
from lightning_modules.commands.main import main
from lightning_modules.study.compare import run_study
from lightning_modules.study.methods import RECIPES, NSGDOptions, Schedule
from lightning_modules.study.methods.built_in import recipes_of
from lightning_modules.study.methods.muon import Muon
from lightning_modules.study.options import Study
from lightning_modules.study.runs.check import check_study
from lightning_modules.study.runs.plan import plan_runs
from lightning_modules.study.runs.subject import Subject
from lightning_modules.study.tuning import best_trials, sweep_rates, trial_settings
from lightning_modules.support.files import read_csv
from lightning_modules.support.quiet import quiet_trainer
from nsgd.damping.step import Damped

RMSPROP = {"class_path": "torch.optim.RMSprop", "init_args": {"lr": 0.003, "alpha": 0.9, "centered": True}}
MODEL = f"{__name__}.Mine"
ONCE: dict[str, Any] = {"seeds": 1, "lr": None}


class Mine(Classifier):
    """A module with an optimizer and a schedule of its own."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01, betas=(0.8, 0.99))
        rates = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


class Bare(pl.LightningModule):
    """It has nothing to train with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class Two(Bare):
    """It has more than one optimizer."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.net.weight], lr=0.1), torch.optim.SGD([self.net.bias], lr=0.1)]


class Ready(Bare):
    """It asks its trainer for the steps of the run."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)]


class NoRate(torch.optim.SGD):
    def __init__(self, params: Any, momentum: float = 0.9) -> None:
        super().__init__(params, lr=0.1, momentum=momentum)


class Nothing(torch.optim.SGD):
    """Takes nothing."""

    def __init__(self) -> None:
        """As it is made."""


class NoParams(torch.optim.SGD):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__([nn.Parameter(torch.ones(1))], lr=lr)


class NoDefault(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)


class Rates(pl.Callback):
    """Keeps the rate of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.found.append(optimizer.param_groups[0]["lr"])


def losses(folder: Path, run: str) -> list[float]:
    return [row["loss"] for row in read_csv(folder / "runs" / run / "metrics.csv")]


def by_hand(make: Any, **options: Any) -> list[float]:
    """Losses of a plain loop over the same batches, from torch alone."""
    net, data = plain_start()
    return list(plain_steps(net, data, make(net.parameters()), **options))


# -- any optimizer by its class --------------------------------------------------------------------------------------


def test_an_entry_is_a_hand_loop_with_that_optimizer(tmp_path):
    folder = finished(tmp_path / "out", methods=["sgd", RMSPROP], **ONCE)
    expected = by_hand(lambda params: torch.optim.RMSprop(params, lr=0.003, alpha=0.9, centered=True))
    assert losses(folder, "rmsprop-0") == expected
    (row, *_) = [row for row in read_csv(folder / "results.csv") if row["method"] == "rmsprop"]
    assert row["lr"] == 0.003
    assert yaml.safe_load((folder / "config.yaml").read_text())["methods"] == ["sgd", RMSPROP]


def test_an_entry_is_damped_as_the_rule_damps_any_optimizer(tmp_path):
    """By the built-in of the same optimizer; with gamma = 1 it is the plain one."""
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}, "damped": True}
    folder = finished(tmp_path / "a", methods=["damped-adamw", {**adamw, "label": "The same!"}], **ONCE)
    assert losses(folder, "the-same-0") == losses(folder, "damped-adamw-0")
    plain = finished(tmp_path / "b", methods=["adamw", adamw], **ONCE, nsgd=replace(OPTIONS, gamma=1.0))
    assert losses(plain, "damped-torch-optim-adamw-0") == losses(plain, "adamw-0")
    assert losses(folder, "the-same-0") != losses(plain, "adamw-0")


def test_names_labels_and_styles():
    recipes = recipes_of(
        [
            "sgd",
            RMSPROP,
            {**RMSPROP, "damped": True},
            {**RMSPROP, "label": "RMSprop, centered"},
            {"class_path": "pytorch_optimizer.SOAP"},
        ]
    )
    assert {name: recipe.label for name, recipe in recipes.items()} == {
        "sgd": "SGD",
        "rmsprop": "RMSprop",
        "damped-rmsprop": "damped RMSprop",
        "rmsprop-centered": "RMSprop, centered",
        "pytorch-optimizer-soap": "SOAP",
    }
    every = [*RECIPES.values(), *list(recipes.values())[1:]]
    assert len({(recipe.color, recipe.line) for recipe in every}) == len(every)
    assert recipes["rmsprop"].search == {"lr": pytest.approx((0.0003, 0.03))}  # a tenth to ten times its rate
    assert recipes["pytorch-optimizer-soap"].defaults == {"lr": 3e-3, "weight_decay": 0.01}  # those of the class
    assert [name for name, recipe in recipes.items() if recipe.damps] == ["damped-rmsprop"]


def test_the_folder_says_what_a_report_needs_of_each_method(tmp_path):
    chosen = study(methods=["random", "nsgd", {**RMSPROP, "damped": True}], schedule=Schedule("cosine", 0.25), **ONCE)
    run_study(chosen, tmp_path, silent)
    found = yaml.safe_load((tmp_path / "methods.yaml").read_text())
    schedule = "cosine, after a warm-up of 25 % of the steps"
    assert list(found) == ["random", "nsgd", "damped-rmsprop"]
    keys = {"color": "#999999", "line": ":", "control": True, "damps": False, "schedule": schedule}
    damping = {"solver": "random", "decay": None}
    assert found["random"] == {"label": "random directions", **keys, "damping": damping}
    assert (found["nsgd"]["control"], found["nsgd"]["damps"]) == (False, True)
    assert (found["damped-rmsprop"]["label"], found["damped-rmsprop"]["damps"]) == ("damped RMSprop", True)
    assert {entry["schedule"] for entry in study().described_methods().values()} == {"constant"}
    methods = ["schedule-free", {"class_path": "pytorch_optimizer.ScheduleFreeSGD"}, "own"]
    found = study(methods=methods, schedule=Schedule("cosine", 0.25)).described_methods()
    assert [entry["schedule"] for entry in found.values()] == [
        *["constant, after a warm-up of 25 % of the steps"] * 2,
        "the module's own",
    ]


def test_trials_search_the_ranges_of_an_entry(tmp_path):
    entry = {**RMSPROP, "search": {"lr": [1e-3, 1e-2], "alpha": [0.5, 0.9]}}
    chosen = study(methods=["sgd", entry], tune=3, **ONCE)
    run_study(chosen, tmp_path, silent)
    rows = [row for row in read_csv(tmp_path / "tuning.csv") if row["method"] == "rmsprop"]
    assert len(rows) == 3 * 3  # the best three of three, with three seeds
    assert all(1e-3 <= row["lr"] <= 1e-2 and 0.5 <= row["alpha"] <= 0.9 for row in rows)
    best = min(range(3), key=lambda trial: sum(row["val_loss"] for row in rows if row["trial"] == trial))
    settled = yaml.safe_load((tmp_path / "settled.yaml").read_text())["settings"]["rmsprop"]
    assert settled == trial_settings(chosen, "rmsprop")[best]
    expected = by_hand(lambda params: torch.optim.RMSprop(params, **settled, centered=True))
    assert losses(tmp_path, "rmsprop-0") == expected
    assert sweep_rates(study(methods=[{**entry, "search": {"alpha": [0.5, 0.9]}}]), "rmsprop")[0] == 0.0003


def test_one_weight_decay_for_all_that_have_one(tmp_path):
    entry = {"class_path": "torch.optim.Rprop", "init_args": {"lr": 1e-3}}
    chosen = study(methods=["sgd", "adamw", "muon", RMSPROP, entry], weight_decay=0.3, **ONCE)
    found = {method: chosen.given(method).get("weight_decay") for method in chosen.recipes}
    assert found == {"sgd": 0.3, "adamw": 0.3, "muon": 0.3, "rmsprop": 0.3, "rprop": None}
    folder = finished(tmp_path, methods=["sgd"], seeds=1, weight_decay=0.3)
    assert losses(folder, "sgd-0") == by_hand(lambda params: torch.optim.SGD(params, lr=0.2, weight_decay=0.3))


def test_a_test_on_some_batches(tmp_path):
    data = Digits(batch_size=50, limit=300)
    batches = len(data.test_dataloader())
    assert batches > 1
    rows = [
        read_csv(finished(tmp_path / str(n), methods=["sgd"], seeds=1, limit_test=n) / "results.csv")[0]
        for n in (1, batches, None)
    ]
    assert rows[1] == rows[2]
    assert rows[0]["test_loss"] != rows[2]["test_loss"]
    assert rows[0]["val_loss"] == rows[2]["val_loss"]


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "trapezoid"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_rates_are_those_of_the_formula_at_every_step(tmp_path, name, warmup):
    rising = int(8 * warmup)

    def rate(step: int) -> float:
        if step < rising:
            return 0.2 * (step + 1) / rising
        done = (step - rising) / (8 - rising)
        if name == "trapezoid":  # the last half of the run
            return 0.2 * min(1.0, (8 - step) / 4)
        return 0.2 * {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done}[name]

    schedule = Schedule(name, warmup, cooldown=0.5 if name == "trapezoid" else None)
    assert [0.2 * schedule.factor(step, 8) for step in range(8)] == pytest.approx([rate(s) for s in range(8)])
    folder = finished(tmp_path, methods=["sgd"], seeds=1, schedule=schedule)
    expected = by_hand(lambda params: torch.optim.SGD(params, lr=0.2), rate=rate)
    assert losses(folder, "sgd-0") == pytest.approx(expected, rel=1e-6)  # factors are multiplied in another order


def rates_of_runs(monkeypatch) -> dict[str, Rates]:
    """Rates of each step of the longest run by each kind of optimizer, as studies are made."""
    recorders: dict[str, Rates] = {}

    def fit(self: pl.Trainer, module: Any, **options: Any) -> None:
        self.callbacks.append(rates := Rates())
        plain(self, module, **options)
        kind = type(self.optimizers[0]).__name__
        recorders[kind] = max(rates, recorders.get(kind, rates), key=lambda each: len(each.found))

    plain = pl.Trainer.fit
    monkeypatch.setattr(pl.Trainer, "fit", fit)
    return recorders


def test_on_a_plateau_of_validation_the_rate_falls(tmp_path, monkeypatch):
    recorders = rates_of_runs(monkeypatch)
    methods = ["sgd", "nsgd", "sam", "schedule-free"]
    schedule = Schedule("plateau", patience=2)
    folder = finished(tmp_path, methods=methods, schedule=schedule, seeds=1, lr=2.0, epochs=8)
    kinds = {"sgd": "SGD", "nsgd": "NSGD", "sam": "SAM"}
    for method, kind in kinds.items():
        rows = read_csv(folder / "runs" / f"{method}-0" / "metrics.csv")
        found = [row["val_loss"] for row in rows if "val_loss" in row]  # NaN, where it diverged, is none better
        wanted = [1.0, *on_a_plateau(found, 2)[:-1]]
        rates = recorders[kind].found[-len(rows) :]
        each = len(rows) // 8
        assert rates == pytest.approx([2.0 * factor for factor in wanted for _ in range(each)])
        assert method != "sgd" or rates[-1] < 2.0  # it did fall
    assert set(recorders["ScheduleFreeAdamW"].found[-16:]) == {2.0}


def test_every_method_follows_the_schedule_but_for_those_with_one_of_their_own(tmp_path, monkeypatch):
    recorders = rates_of_runs(monkeypatch)
    methods: list[Any] = ["sgd", "nsgd", "sam", "muon", "schedule-free", "own"]
    model = {"class_path": MODEL}
    finished(tmp_path, methods=methods, model=model, schedule=Schedule("linear", 0.25), **ONCE)
    shape = [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    for kind, base in (("SGD", 0.1), ("NSGD", 0.1), ("Muon", 5e-3)):
        assert recorders[kind].found[-8:] == pytest.approx([base * factor for factor in shape])
    assert recorders["SAM"].found[-8:] == pytest.approx([0.1 * factor for factor in shape])
    assert recorders["ScheduleFreeAdamW"].found[-8:] == pytest.approx([2.5e-3 * min(1.0, f) for f in (0.5, *[1.0] * 7)])
    assert recorders["Adam"].found[-8:] == pytest.approx([0.01 * 0.5 ** (step // 3) for step in range(8)])


@pytest.mark.usefixtures("averaging_is_free")
def test_a_run_given_more_steps_stretches_the_schedule_to_its_own_length(tmp_path):
    folder = finished(tmp_path, methods=["sgd", "nsgd", "sgd-more"], seeds=1, schedule=Schedule("cosine"))
    more = losses(folder, "sgd-more-0")
    assert len(more) > 8
    cosine = [0.1 * (1 + math.cos(math.pi * step / len(more))) for step in range(len(more))]
    expected = by_hand(lambda params: torch.optim.SGD(params, lr=0.2), steps=len(more), rate=lambda step: cosine[step])
    assert more == pytest.approx(expected, rel=1e-6)


def test_the_rule_goes_on_muon():
    (_, recipe) = next(iter(recipes_of([{"class_path": f"{Muon.__module__}.Muon", "damped": True}]).items()))
    module = Classifier()
    options = recipe.directions({}, NSGDOptions(k=2))
    configured = recipe.install(module, recipe.defaults, options.damping(), 0)()
    assert isinstance(configured, Damped)
    assert isinstance(configured, Muon)


# -- the module's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Mine", "Ready"])
def test_own_is_a_plain_fit_of_the_module(tmp_path, model):
    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            found.append(float(outputs["loss"]))

    found: list[float] = []
    chosen = study(methods=["own", "sgd"], model={"class_path": f"{__name__}.{model}"}, **ONCE)
    run_study(chosen, tmp_path, silent)
    pl.seed_everything(0, verbose=False)
    module = {"Mine": Mine, "Ready": Ready}[model]()
    trainer = quiet_trainer(max_epochs=-1, max_steps=8, callbacks=[Losses()], log_every_n_steps=1)
    trainer.fit(module, datamodule=Digits(batch_size=50, limit=300))
    assert losses(tmp_path, "own-0") == found
    assert found != losses(tmp_path, "sgd-0")
    (row, *_) = read_csv(tmp_path / "results.csv")
    assert row["val_loss"] == trainer.validate(module, Digits(batch_size=50, limit=300), verbose=False)[0]["val_loss"]
    assert "lr" not in row


def test_the_rule_on_the_modules_own_is_its_own_where_gamma_is_one(tmp_path):
    options = {"methods": ["own", "damped-own"], "model": {"class_path": MODEL}, **ONCE}
    same = finished(tmp_path / "same", nsgd=NSGDOptions(k=2, gamma=1.0), **options)
    assert losses(same, "own-0") == losses(same, "damped-own-0")
    damped = finished(tmp_path / "damped", nsgd=NSGDOptions(k=2, gamma=0.0), **options)
    assert losses(damped, "own-0") == losses(same, "own-0")
    assert losses(damped, "damped-own-0")[-1] != losses(same, "own-0")[-1]
    assert read_csv(damped / "runs" / "damped-own-0" / "metrics.csv")[-1]["refreshes"] > 0


def test_what_has_no_ranges_is_not_tuned_and_what_has_no_rate_not_swept(tmp_path):
    chosen = study(methods=["sgd", "own"], model={"class_path": MODEL}, tune=1, sweep="lr", sweep_points=2, **ONCE)
    assert {run.name for run in plan_runs(chosen)} == {
        *("tuning/sgd-0", "runs/sgd-0", "runs/own-0", "sweep/sgd-0", "sweep/sgd-1")
    }
    run_study(chosen, tmp_path, silent)
    assert yaml.safe_load((tmp_path / "settled.yaml").read_text())["settings"]["own"] == {}


# -- optimizers that are judged at other weights than those that they train ------------------------------------------


def test_schedule_free_is_validated_averaged_and_ended_at_its_averaged_weights(tmp_path):
    """Against a plain loop that switches on copies."""
    folder = finished(tmp_path, methods=["schedule-free"], **ONCE)
    net, data = plain_start()
    optimizer = pytorch_optimizer.ScheduleFreeAdamW(net.parameters(), lr=2.5e-3, weight_decay=0.01)
    found, validated, ema = [], [], None

    def judged() -> list[torch.Tensor]:
        """The average x, from the point y of the gradient and the iterate z: y = (1 - beta) z + beta x."""
        return [(p - 0.1 * optimizer.state[p]["z"]) / 0.9 for p in net.parameters()]

    def loss_at(weights: list[torch.Tensor], split: str) -> float:
        images = data.splits[split]
        named = dict(zip(dict(net.named_parameters()), weights, strict=True))
        logits = torch.func.functional_call(net, named, data.normalise(images.pixels))
        return F.cross_entropy(logits, images.labels).item()

    for step, loss in enumerate(plain_steps(net, data, optimizer), start=1):
        found.append(loss)
        with torch.no_grad():
            current = judged()
            decay = min(0.99, (1 + step) / (10 + step))
            ema = current if ema is None else [decay * a + (1 - decay) * b for a, b in zip(ema, current, strict=True)]
        if step % 4 == 0:  # the end of an epoch
            validated.append(loss_at(judged(), "val"))
    assert losses(folder, "schedule-free-0") == found  # neither validation nor averages moved what is trained
    rows = read_csv(folder / "runs" / "schedule-free-0" / "metrics.csv")
    assert [row["val_loss"] for row in rows if "val_loss" in row] == pytest.approx(validated, rel=1e-4)
    scores = {row["read_out"]: row["val_loss"] for row in read_csv(folder / "results.csv")}
    assert scores["last"] == pytest.approx(validated[-1], rel=1e-4)
    assert scores["ema"] == pytest.approx(loss_at(ema, "val"), rel=1e-4)
    assert abs(loss_at(list(net.parameters()), "val") / validated[-1] - 1) > 1e-3  # else it could not be told apart


# -- interrupted -----------------------------------------------------------------------------------------------------

_KILLED = """
import sys, yaml
from pathlib import Path
from studies import silent, study
from lightning_modules.commands.main import main
from lightning_modules.study.compare import run_study
from lightning_modules.study.methods import Schedule
if __name__ == "__main__":
    options = {**yaml.safe_load(sys.argv[2]), "schedule": Schedule("cosine", 0.25)}
    run_study(study(**options), Path(sys.argv[1]), silent)
"""


@pytest.mark.slow
def test_a_study_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    options: dict[str, Any] = {
        "methods": ["sgd", "own", {**RMSPROP, "search": {"lr": [1e-3, 1e-2]}, "damped": True}, "muon", "schedule-free"],
        "model": {"class_path": MODEL},
        "tune": 1,
        "epochs": 3,
        **ONCE,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    chosen = study(**options, schedule=Schedule("cosine", 0.25))
    run_study(chosen, whole, silent)
    paths = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
    process = subprocess.Popen([sys.executable, "-c", paths + _KILLED, str(killed), yaml.safe_dump(options)])
    try:
        deadline = time.monotonic() + 240
        while not (killed / "runs" / "own-0").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "results.csv").exists()
    run_study(chosen, killed, silent)
    assert without_seconds(killed) == without_seconds(whole)


# -- bad input -------------------------------------------------------------------------------------------------------


def entry(path: str, **rest: Any) -> dict[str, Any]:
    return {"methods": ["sgd", {"class_path": path, **rest}]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["sgd", "mouon"]}, r"any optimizer as .*got 'mouon'; did you mean muon\?"),
        ({"methods": [RMSPROP, RMSPROP]}, "methods to be different, got rmsprop twice; give one of them a label"),
        (entry("torch.optim.RMSProp"), r"an optimizer that can be imported, got .*; did you mean RMSprop\?"),
        (entry("nowhere.Optimizer"), "can be imported, got 'nowhere.Optimizer': No module named 'nowhere'"),
        (entry("RMSprop"), "can be imported, got 'RMSprop': .*; give the whole path, such as torch.optim.RMSprop"),
        (entry("torch.nn.Linear"), "a class of torch.optim.Optimizer's kind, got 'torch.nn.Linear', which is none"),
        (entry("nsgd.NSGD"), "without directions of its own, got 'nsgd.NSGD'; take the method nsgd"),
        (entry(f"{__name__}.NoRate"), "NoRate to take a learning rate as lr, got momentum; .* wrap it in a class"),
        (entry(f"{__name__}.NoParams"), "NoParams to take the parameters that it trains as its first argument, got lr"),
        (entry(f"{__name__}.Nothing"), "parameters that it trains as its first argument, got a class without any; a"),
        (entry(f"{__name__}.NoDefault"), "init_args.lr of .*NoDefault to be a number, .* got none; give it"),
        (entry("torch.optim.RMSprop", init_args={"alhpa": 0.9}), r"got 'alhpa'; did you mean alpha\?"),
        (
            entry("torch.optim.RMSprop", init_args={"alpha": -1.0}),
            "RMSprop to train all parameters of the model with init_args .*-1.0.*, got: .*; change",
        ),
        (entry("torch.optim.Muon"), "got: Muon only supports 2D parameters .*; change init_args, or take another"),
        (entry("torch.optim.RMSprop", init_arg={}), r"got 'init_arg'; did you mean init_args\?"),
        (entry("torch.optim.RMSprop", damped="yes"), "damped of a method to be true or false, got 'yes'"),
        (entry("torch.optim.RMSprop", search={"lr": [0.1, 1e-4]}), r"its ends are swapped, give \[0.0001, 0.1\]"),
        (
            entry("torch.optim.RMSprop", search={"lr": 0.1}),
            "search.lr of torch.optim.RMSprop to be a lower and a higher",
        ),
        (entry("torch.optim.RMSprop", label="--"), "label of torch.optim.RMSprop to be with a letter or a digit"),
        (entry("torch.optim.RMSprop", label="Random"), "to be another than those of the methods that are built in"),
        (entry("torch.optim.RMSprop", init_args={"lr": 0}), "lr of torch.optim.RMSprop above 0, got 0; give init_args"),
        (
            entry("pytorch_optimizer.SOAP", search={"precondition_frequency": [5, 50]}),
            "search of .*SOAP to be of options that are no whole numbers, got precondition_frequency, which is 10",
        ),
        ({"methods": [{"label": "x"}]}, "class_path of a method to be the import path of an optimizer"),
        (
            entry("pytorch_optimizer.ScheduleFreeAdamW", damped=True),
            "got ScheduleFreeAdamW, which averages them itself",
        ),
        ({"search": {"sgd": {"lr": [1.0, 0.1]}}}, r"its ends are swapped, give \[0.1, 1.0\]"),
        ({"settings": {"adamww": {"lr": 0.1}}}, r"got 'adamww'; did you mean adamw\?"),
        ({"methods": ["own"], "settings": {"own": {"lr": 0.1}}}, "settings of own to be among none at all, got 'lr'"),
        ({"schedule": Schedule("cosine", 1.5)}, "warmup to be a share of the run's steps, .*got 1.5, .* give 0.05"),
        (
            {"schedule": Schedule("step")},
            "schedule.name to be one of constant, cosine, linear, trapezoid, plateau, got 'st",
        ),
        ({"schedule": Schedule("trapezoid", 0.9)}, "cooldown to be a share .* at most the 0.1 that the warm-up leaves"),
        (
            {"schedule": Schedule("trapezoid", cooldown=0.0)},
            "cooldown to be a share of the run's steps above 0, .*got 0",
        ),
        (
            {"schedule": Schedule("plateau")},
            "patience of a plateau to be a number of epochs of at least 1, got None; give",
        ),
        (
            {"schedule": Schedule("cosine", patience=3)},
            "patience with the name plateau alone, got it with cosine; leave",
        ),
        (
            {"schedule": Schedule("plateau", 0.1, patience=3)},
            r"no schedule\.warmup with a plateau, .* got 0\.1; leave it out",
        ),
        ({"schedule": Schedule(cooldown=0.1)}, "cooldown with the name trapezoid alone, got it with constant; leave"),
        ({"weight_decay": -0.1}, "weight_decay >= 0 and finite, got -0.1"),
        ({"limit_test": 0}, "limit_test to be a number of batches of at least 1, got 0"),
        ({"methods": ["own"], "model": {"class_path": f"{__name__}.Bare"}}, "Bare to have a configure_optimizers"),
        ({"methods": ["own"], "model": {"class_path": f"{__name__}.Two"}}, "one optimizer from .* of Two, got 2"),
        ({"methods": ["damped-own"]}, "no directions yet, got NSGD; take it undamped"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_writes_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        run_study(study(**{"lr": None, **options}), tmp_path / "out", silent)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_weight_decay_is_not_given_where_it_is_searched():
    chosen = study(tune=2, lr=None, weight_decay=0.1, search={"sgd": {"weight_decay": [1e-4, 1e-2]}})
    with pytest.raises(ValueError, match=r"no weight_decay with tune, whose trials look for it, got 0\.1"):
        check_study(Subject(chosen))


def test_an_old_studys_options_are_as_they_were():
    """A folder of before, whose config.yaml has none of these options, is still this study's."""
    found = Study().resolved()
    assert [found[name] for name in ("schedule", "weight_decay", "limit_test")] == [None, None, None]


def test_an_entry_of_a_built_in_name_goes_by_its_path():
    methods = [
        {"class_path": "torch.optim.SGD"},
        {"class_path": "pytorch_optimizer.SOAP", "damped": True},
        "sgd",
        "soap",
    ]
    assert list(Study(methods=methods).recipes) == ["torch-optim-sgd", "damped-soap", "sgd", "soap"]


def test_trials_that_all_diverge_choose_nothing():
    chosen = study(tune=2, lr=None)
    for method in chosen.recipes:
        about = {"method": method, "seed": 1000, "val_loss": math.nan, "val_accuracy": 0.1}
        words = rf"every trial of {method} diverged; give search\.{method} a range of smaller rates"
        with pytest.raises(ValueError, match=words):
            best_trials(chosen, method, [{**about, "trial": i} for i in (0, 1)])


def test_an_optimizer_that_calls_the_closure_again_is_charged_for_each_pass(tmp_path):
    lbfgs = {"class_path": "torch.optim.LBFGS", "init_args": {"lr": 0.1, "max_iter": 4}}
    run_study(study(methods=["sgd", lbfgs], seeds=1, lr=None), tmp_path / "out", silent)
    sgd, other = (read_csv(tmp_path / "out" / "runs" / f"{m}-0" / "metrics.csv")[-1] for m in ("sgd", "lbfgs"))
    assert sgd["gradients"] == sgd["step"]
    assert 2 * other["step"] < other["gradients"] <= 5 * other["step"]


# -- the command -----------------------------------------------------------------------------------------------------

_OPTIONS = ["--seeds", "1", "--epochs", "1", "--data", "Digits", "--data.limit", "300", "--data.batch_size", "50"]


@pytest.mark.parametrize("schedule", [["--schedule", "{name: cosine, warmup: 0.25}"], ["--schedule.name", "cosine"]])
def test_entries_and_schedules_are_options_of_the_command_and_of_a_file(tmp_path, monkeypatch, schedule):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    methods = yaml.safe_dump(["sgd", RMSPROP], default_flow_style=True).strip()
    given = ["--methods", methods, *schedule, "--weight_decay", "0.01"]
    assert main(["compare", *_OPTIONS, *given, "--run", "1", "--out", str(tmp_path / "a")]) == 0
    config = tmp_path / "a" / "config.yaml"
    found = yaml.safe_load(config.read_text())
    assert found["methods"] == ["sgd", RMSPROP]
    warmup = 0.25 if len(schedule[1]) > 6 else 0.0
    assert found["schedule"] == {"name": "cosine", "warmup": warmup, "average": None}
    assert main(["compare", str(config), "--run", "1", "--out", str(tmp_path / "b")]) == 0
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "[sgd, mouon]"], "got 'mouon'; did you mean muon?"),
        (["--methods", "[{class_path: torch.optim.RMSProp}]"], "did you mean RMSprop?"),
        (["--schedule", "{name: cosine, warmup: 500}"], "a share of the run's steps, at least 0 and below 1, got 500"),
        (
            ["--schedule", "{name: cosin}"],
            "to be 'constant', 'cosine', 'linear', 'trapezoid', 'plateau', got 'cosin'; did you mean cosine?",
        ),
    ],
)
def test_what_the_command_cannot_compare_is_one_sentence(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert main(["compare", *_OPTIONS, *words, "--out", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err.strip()
    assert said in complaint
    assert complaint.count("\n") == 0
    assert list(tmp_path.iterdir()) == []
