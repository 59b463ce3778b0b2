"""SharpnessMonitor on blocks of parameters, in brief, in loggers and progress bar, and its warning."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from measured import (
    CENTRES,
    HESSIAN,
    SGD,
    SPECTRUM,
    Bowl,
    Counted,
    Iterates,
    Tally,
    bowls,
    drawn,
    gradient_at,
    loss_at,
    near,
    samples_of,
    table,
)
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint
from strangers import Everything, Memory, Smooth, loader
from test_measurement_runs import Digitlike, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import RefreshDirections, SharpnessMonitor
from nsgd import NSGD, damp

SMALL = {"features": 2, "number": 2}
BLOCK = slice(3, 7)  # theta.1 of the bowl's seven parameters
PLAIN = partial(torch.optim.SGD, lr=0.05, momentum=0.5)  # a limit of 60 where the sharpness is 8


def quantities(callback: SharpnessMonitor) -> set[str]:
    return {row["quantity"] for row in callback.rows}


def values_of(callback: SharpnessMonitor, quantity: str, of: str | None = None) -> list[float]:
    return [r["value"] for r in callback.rows if r["quantity"] == quantity and of in (None, r["of"])]


# -- blocks ----------------------------------------------------------------------------------------------------------


class Single(Bowl):
    """In the precision of its batches."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        offset = self.flat() - batch[0]
        return ((offset @ HESSIAN.to(offset)) * offset).sum(1).mean() / 2


@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_is_that_of_the_hessian(make_trainer, brief, dtype):
    callback = SharpnessMonitor(samples=20, every=4, k=2, products=4, params=["theta.1"], brief=brief)
    iterates = Iterates()
    batches = drawn(callback.evaluation, "draw_batches")
    data = DataLoader(TensorDataset(CENTRES.to(dtype)), batch_size=8)
    make_trainer(callbacks=[iterates, callback]).fit(Single(PLAIN).to(dtype), data)
    # Sums in float32 round to some 1e-7; the closed form squares and divides them.
    close = partial(pytest.approx, rel=1e-9, abs=1e-9) if dtype == torch.float64 else partial(pytest.approx, rel=1e-4)
    found, centres = table(callback), samples_of(callback.evaluation.parts).double()
    block, expected = HESSIAN[BLOCK, BLOCK], torch.linalg.eigh(HESSIAN[BLOCK, BLOCK])
    for number, step in enumerate((0, 4, 8)):
        theta = iterates.found[step].double()
        full = gradient_at(theta, centres)[BLOCK]
        assert found[step, "parameters", "theta.1", ""] == 4
        assert found[step, "stability limit", "", ""] == pytest.approx(3 / 0.05)
        for i in (1, 2):
            e = expected.eigenvectors[:, -i]
            assert found[step, "eigenvalue", f"e{i}", ""] == close(float(expected.eigenvalues[-i]))
            cosine = found[step, "alignment of the full gradient", f"e{i}", ""]
            assert abs(cosine) == close(abs(float(full @ e / full.norm())))
        if not brief:
            ((batch, _),) = batches[1 + number]  # the first draw is a trial
            g = gradient_at(theta, batch[0].double())[BLOCK]
            assert found[step, "batch sharpness", "", ""] == close(float(g @ block @ g / (g @ g)))
            move = torch.zeros(7, dtype=torch.float64)
            move[BLOCK] = -0.05 * g  # the others stay
            change = loss_at(theta + move, centres) - loss_at(theta, centres)
            assert found[step, "change after a step", "whole step", 1.0] == pytest.approx(change, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("patterns", "size"),
    [(["net.0.*"], 6), (["*.bias"], 4), (["net.0.weight", "net.2.weight"], 8), (["*", "net.?.bias"], 12), (None, 12)],
)
def test_patterns_choose_parameters_once(make_trainer, patterns, size):
    callback = SharpnessMonitor(samples=8, k=1, products=3, brief=True, params=patterns)
    make_trainer(callbacks=[callback]).fit(Smooth(SGD), loader(**SMALL))
    assert set(values_of(callback, "parameters", ", ".join(patterns or ()))) == {size}


def test_tied_parameters_go_by_either_name(make_trainer):
    class Tied(Smooth):
        def __init__(self) -> None:
            super().__init__(SGD)
            self.net[2].weight = self.net[0].weight

    callback = SharpnessMonitor(samples=8, k=1, products=3, brief=True, params=["net.2.weight"])
    make_trainer(callbacks=[callback]).fit(Tied(), loader(**SMALL))
    assert set(values_of(callback, "parameters")) == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"params": "net.0.*"},
            "expected params to be a list of patterns of parameters' names, or None for all, got 'n",
        ),
        ({"params": []}, "expected params to be a list of patterns.*got \\[\\]; write for example"),
        ({"params": [0]}, "expected params to be a list of patterns.*got \\[0\\]"),
    ],
)
def test_params_that_are_no_patterns_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**options)


def test_a_pattern_that_matches_nothing_is_said_before_the_first_step(make_trainer):
    module = Smooth(SGD)
    before = copy.deepcopy(module.state_dict())
    message = (
        "expected params to match names of the module's parameters (net.0.weight, net.0.bias, net.2.weight, "
        "net.2.bias), got 'head.*', which matches none; see module.named_parameters()"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(callbacks=[SharpnessMonitor(params=["net.0.*", "head.*"])]).fit(module, loader(**SMALL))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def test_a_frozen_block_is_measured_from_when_it_trains(make_trainer):
    module = Smooth(lambda params: torch.optim.SGD([p for p in params if p.requires_grad], lr=0.1))
    callback = SharpnessMonitor(samples=8, every=1, k=1, products=3, params=["net.0.*"])
    make_trainer(callbacks=[Unfreeze(), callback], max_epochs=2).fit(module, loader(**SMALL))
    assert sorted({r["step"] for r in callback.rows}) == [3, 4, 5]  # three steps an epoch


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_monitors_of_several_layers_stand_beside_each_other(make_trainer, tmp_path):
    callbacks = [
        SharpnessMonitor(samples=8, every=2, k=1, products=3, brief=True, params=params)
        for params in (None, ["net.0.*"], ["net.2.*"])
    ]
    saves = ModelCheckpoint(tmp_path / "checkpoints", every_n_epochs=1)
    trainer = make_trainer(callbacks=[*callbacks, saves], enable_checkpointing=True)
    trainer.fit(Smooth(SGD), loader(**SMALL))
    assert {path.name for path in tmp_path.glob("*.csv")} == {"sharpness.csv", "sharpness-1.csv", "sharpness-2.csv"}
    names = [name for name in trainer.progress_bar_metrics if name.endswith("top")]
    assert names == ["sharpness/top", "sharpness/net.0.*/top", "sharpness/net.2.*/top"]
    assert values_of(callbacks[0], "eigenvalue")[0] >= max(values_of(c, "eigenvalue")[0] for c in callbacks[1:])


# -- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [7, 40])  # one graph, kept; three batches of 16, 16 and 8, rebuilt
def test_in_brief_there_are_eigenvalues_cosines_and_limits_at_what_they_cost(make_trainer, monkeypatch, samples):
    tally = Tally(monkeypatch)
    callback = tally.around(SharpnessMonitor(samples=samples, every=3, k=1, products=12, brief=True))
    monkeypatch.setattr(Counted, "tally", tally)
    make_trainer(callbacks=[callback]).fit(Counted(SGD), loader(samples=112, **SMALL))
    assert quantities(callback) == {
        "parameters",
        "evaluation samples",
        "lr",
        "stability limit",
        "eigenvalue",
        "residual",
        "alignment of the full gradient",
    }
    assert set(values_of(callback, "evaluation samples")) == {samples}
    assert callback.gradients == pytest.approx(tally.work / 16, rel=1e-12)
    most = callback.price(2 if samples <= 16 else 3) * samples / 16
    assert callback.gradients / 3 < 0.9 * most  # one eigenvalue takes fewer products than 12


@pytest.mark.parametrize("kind", ["SGD", "NSGD"])
def test_a_run_of_300_steps_at_batch_128_is_measured_three_times(make_trainer, kind):
    module = Digitlike()
    refresh = [RefreshDirections()] if kind == "NSGD" else []
    if refresh:
        module.configure_optimizers = lambda: NSGD(module.parameters(), lr=0.1, k=10)
    callback = SharpnessMonitor()
    trainer = make_trainer(callbacks=[*refresh, callback], max_steps=300, max_epochs=-1)
    trainer.fit(module, images())
    assert {r["measurement"] for r in callback.rows} == {1, 2, 3}
    assert {"root-sum-square", "cross-section", "change after a step", "batch sharpness"} <= quantities(callback)
    assert ("felt sharpness" in quantities(callback)) == (kind == "NSGD")
    assert callback.gradients <= 0.15 * 300


def test_every_20_steps_is_every_20_steps(make_trainer):
    callback = SharpnessMonitor(every=20)
    make_trainer(callbacks=[callback], max_steps=70, max_epochs=-1).fit(Digitlike(), images())
    assert sorted({r["step"] for r in callback.rows}) == [0, 20, 40, 60]
    assert set(values_of(callback, "evaluation samples")) == {16}
    assert callback.gradients / 70 < 1  # of one gradient a step


# -- loggers and progress bar ----------------------------------------------------------------------------------------


class Looks(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(dict(trainer.progress_bar_metrics))


@pytest.mark.parametrize("samples", [16, 20])
def test_sharpness_and_its_ratio_to_the_limit_are_logged(make_trainer, samples):
    logger, looks = Memory(), Looks()
    callback = SharpnessMonitor(samples=samples, every=4, k=2, products=7, brief=True)
    trainer = make_trainer(callbacks=[callback, looks], logger=logger, log_every_n_steps=10)
    trainer.fit(Bowl(PLAIN), bowls())  # twelve steps
    rows = [(step, row) for step, row in logger.rows if "sharpness/top" in row]
    assert [step for step, _ in rows] == [0, 4, 8]
    for _, row in rows:
        assert set(row) == {"sharpness/top", "sharpness/of_limit"}
        assert near(row["sharpness/top"], float(SPECTRUM[0]))
        assert near(row["sharpness/of_limit"], 0.05 * 8 / 3)
    assert looks.seen == [row for _, row in rows for _ in range(4)]
    assert not trainer.callback_metrics


def test_for_a_damped_optimizer_the_sharpness_that_it_feels_counts(make_trainer):
    looks = Looks()
    callback = SharpnessMonitor(samples=8, every=4, k=1, products=7)
    optimizer = partial(NSGD, lr=0.05, momentum=0.5, k=2, gamma=0.0, refresh_every=100, decay=0.0, solver="lanczos")
    make_trainer(callbacks=[RefreshDirections(8), callback, looks]).fit(Bowl(optimizer), bowls())
    first, last = ({k: v for k, v in looks.seen[i].items() if k.startswith("sharpness")} for i in (0, -1))
    assert set(first) == {"sharpness/top"}  # no directions yet
    felt = values_of(callback, "felt sharpness")[-1]
    assert felt < 4
    assert last == {
        "sharpness/top": pytest.approx(8.0),
        "sharpness/felt": felt,
        "sharpness/of_limit": pytest.approx(felt * 0.05 / 3),
    }
    assert max(values_of(callback, "residual", "felt sharpness")) < 1e-3 * felt


def two_rates(params: Any) -> torch.optim.Optimizer:
    first, second = params
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.01}], lr=10.0)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=10.0),
        partial(torch.optim.SGD, lr=10.0, momentum=0.5, nesterov=True),
        partial(torch.optim.SGD, lr=10.0, momentum=0.5, dampening=0.5),
        partial(torch.optim.SGD, lr=0.01, maximize=True),
        lambda params: damp(torch.optim.AdamW(params, lr=10.0), k=2, warmup_steps=10),
        two_rates,
    ],
    ids=["AdamW", "Nesterov", "dampening", "maximize", "damped AdamW", "two rates"],
)
def test_where_stable_steps_have_another_limit_none_is_named(make_trainer, optimizer):
    callback = SharpnessMonitor(samples=8, every=1, k=1, products=7, brief=True)
    trainer = make_trainer(callbacks=[callback], max_steps=3)
    trainer.fit(Bowl(optimizer), bowls())  # a warning would be an error
    assert list(trainer.progress_bar_metrics) == ["sharpness/top"]
    assert not any("limit" in quantity for quantity in quantities(callback))


def test_a_block_of_groups_at_two_rates_goes_by_its_own(make_trainer):
    callback = SharpnessMonitor(samples=8, every=1, k=1, products=4, brief=True, params=["theta.1"])
    make_trainer(callbacks=[callback], max_steps=2).fit(Bowl(two_rates), bowls())
    assert set(values_of(callback, "lr")) == {0.01}
    assert set(values_of(callback, "stability limit")) == {2 / 0.01}


# -- the warning -----------------------------------------------------------------------------------------------------


class Scheduled(Bowl):
    """The rate of each step; the limit without momentum is 2 / lr, the sharpness 8."""

    def __init__(self, rates: list[float], make: Any = torch.optim.SGD) -> None:
        super().__init__(partial(make, lr=1.0))
        self.rates = rates

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: self.rates[min(i, len(self.rates) - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warned(make_trainer: Any, module: Any, callbacks: list[Any], steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=callbacks, max_steps=steps).fit(module, bowls())
    return [str(w.message) for w in caught if "SharpnessMonitor" in str(w.message)]


def test_above_the_limit_there_is_one_warning_until_it_has_fallen_below(make_trainer):
    callback = SharpnessMonitor(samples=8, every=1, k=1, products=7, brief=True)
    rates = [0.1, 0.3, 0.4, 0.3, 0.2, 0.3, 0.3]
    found = warned(make_trainer, Scheduled(rates), [callback], len(rates))
    assert [text.split(":")[0] for text in found] == ["SharpnessMonitor at step 1", "SharpnessMonitor at step 5"]
    assert found[0] == (
        "SharpnessMonitor at step 1: the top eigenvalue of the Hessian, 8, is above the limit of stable steps, 6.67 = "
        "(2 + 2 momentum) / lr: steps along that direction grow until the curvature falls. Measured on 8 samples, of "
        "which few give larger values on average: raise samples to be sure. Where the training loss rises, lower lr, "
        "or damp its sharpest directions with nsgd.NSGD"
    )
    # A second run with the same callback is a run of its own.
    assert len(warned(make_trainer, Scheduled(rates), [callback], len(rates))) == 2


@pytest.mark.parametrize(("lr", "steps"), [(0.3, []), (1.0, [1])])
def test_what_damped_steps_feel_is_what_is_warned_of(make_trainer, lr, steps):
    """Directions 1 and 2 at rest, the third has 3: limits of 6.7 and 2."""
    callback = SharpnessMonitor(samples=8, every=1, k=1, products=7)
    options = {"k": 2, "gamma": 0.0, "refresh_every": 1, "decay": 0.0, "solver": "lanczos"}
    module = Scheduled([lr], partial(NSGD, **options))
    found = warned(make_trainer, module, [RefreshDirections(None), callback], 4)
    assert [int(text.split(":")[0].split()[-1]) for text in found] == steps
    for text in found:
        assert "the sharpness that damped steps feel, 3, is above the limit of stable steps, 2 =" in text
        assert "raise k or overhead of the damped optimizer" in text


@pytest.mark.parametrize("damped", [False, True])
def test_a_block_above_the_limit_is_warned_of_where_it_is_not_damped(make_trainer, damped):
    callback = SharpnessMonitor(samples=8, every=1, k=1, products=4, brief=True, params=["theta.1"])
    top = float(torch.linalg.eigvalsh(HESSIAN[BLOCK, BLOCK])[-1])
    rate = 2.2 / top
    options = {"k": 2, "gamma": 0.0, "refresh_every": 1, "decay": 0.0, "solver": "lanczos"}
    module = Scheduled([rate], partial(NSGD, **options) if damped else torch.optim.SGD)
    found = warned(make_trainer, module, [*([RefreshDirections(None)] if damped else []), callback], 3)
    assert len(found) == (0 if damped else 1)
    assert all("the top eigenvalue of the Hessian of theta.1" in text for text in found)
    assert "felt sharpness" not in quantities(callback)


# -- exceptions ------------------------------------------------------------------------------------------------------


class Fails(Everything):
    """Raises inside a measurement: training itself makes fewer calls by then."""

    at = 1
    numbers: Any = None  # of the calls; an iterator, which no guard takes back

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.eval()
        if next(self.numbers) == self.at:
            raise RuntimeError("as planned")
        self.train()
        return loss


@pytest.mark.parametrize("options", [{}, {"brief": True}, {"params": ["net.0.*"]}], ids=["all", "brief", "block"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_in_a_measurement_leaves_everything_as_found(make_trainer, random_state, options, at):
    module = Fails(SGD)
    module.at, module.numbers = at, itertools.count(1)
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    before = (dict(hooks), module.plain_state()["tensors"], [p.requires_grad for p in module.parameters()])
    state: list[Any] = []

    class Note(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            state.append(random_state())

    callback = SharpnessMonitor(samples=24, every=1, k=1, products=3, **options)  # two batches
    with pytest.raises(RuntimeError, match="as planned"):
        make_trainer(callbacks=[Note(), callback]).fit(module, loader(samples=64))
    assert len(state) == 1
    assert random_state() == state[0]
    assert (dict(hooks), module.plain_state()["tensors"], [p.requires_grad for p in module.parameters()]) == before
    assert all(m.training for m in module.modules())
    assert "log" not in vars(module)
    assert all(p.grad is None for p in module.parameters())


def test_a_measurement_that_finds_nothing_logs_nothing(make_trainer):
    """Training has diverged, which is not for a measurement to end."""

    class Broken(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean() * torch.nan

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger, callback = Memory(), SharpnessMonitor(samples=8, every=1, k=1, products=3)
    trainer = make_trainer(callbacks=[callback], logger=logger)
    trainer.fit(Broken(), loader(**SMALL))
    assert not callback.rows
    assert not logger.rows
    assert not trainer.progress_bar_metrics
