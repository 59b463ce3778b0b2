"""Averages at several settings out of one run, and runs under the schedules that they are predicted to equal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from studies import STEPS, finished, plain_start, plain_steps, silent, study
from torch.nn import functional as F

from lightning_modules.callbacks.averages import average_weights
from lightning_modules.report.study.files import read_folder
from lightning_modules.study.compare import claim, run_study
from lightning_modules.study.methods import Schedule
from lightning_modules.study.methods.built_in import recipes_of
from lightning_modules.support.files import read_csv
from lightning_modules.support.read_outs import average

NAMES = ["ema-0.2", "ema-0.9", "swa-0.5", "two-point-1", "two-point-5"]


def results(folder: Path) -> list[dict[str, Any]]:
    return read_csv(folder / "results.csv")


def plain_weights(lr: float = 0.2) -> tuple[torch.nn.Module, list[list[torch.Tensor]], Any]:
    """The weights before the run and after each step, without the study."""
    net, data = plain_start()
    weights = [[p.detach().double() for p in net.parameters()]]
    for _ in plain_steps(net, data, torch.optim.SGD(net.parameters(), lr=lr)):
        weights.append([p.detach().double() for p in net.parameters()])
    train = data.splits["train"]
    return net, weights, (data.normalise(train.pixels), train.labels)


def by_hand(name: str) -> list[float]:
    """What the weights after 0, 1 ... 8 steps count in an average, written out."""
    if name == "swa-0.5":
        return [0, 0, 0, 0, 0, 1 / 4, 1 / 4, 1 / 4, 1 / 4]
    if name.startswith("two-point"):
        first = STEPS - int(name[-1])
        return [0.5 if step in (first, STEPS) else 0.0 for step in range(STEPS + 1)]
    counts = [0.0, 1.0] + [0.0] * (STEPS - 1)
    for step in range(2, STEPS + 1):
        decay = min(float(name.removeprefix("ema-")), (1 + step) / (10 + step))
        counts = [decay * count for count in counts]
        counts[step] += 1 - decay
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_an_average_are_those_written_out(name):
    assert average_weights(average(name), STEPS).tolist() == pytest.approx(by_hand(name), abs=1e-15)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("averaged"), methods=["sgd"], seeds=1, averages=NAMES)


def test_read_outs_are_the_averages_of_the_weights_that_a_plain_loop_leaves(averaged):
    net, weights, (images, labels) = plain_weights()
    losses = {row["read_out"]: row["train_loss"] for row in results(averaged)}
    assert list(losses) == ["last", "ema", "swa", "two-point", *NAMES]
    for name in NAMES:
        counts = by_hand(name)
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.copy_(sum(count * w[i] for count, w in zip(counts, weights, strict=True)))
            loss = float(F.cross_entropy(net(images), labels))
        assert losses[name] == pytest.approx(loss, rel=1e-5), name  # float32, in batches
    assert len({*losses.values()} - {losses["two-point-1"]}) >= len(NAMES)  # they differ


def test_other_read_outs_are_what_they_are_without_and_folders_of_before_go_on(averaged, tmp_path):
    plain = finished(tmp_path, methods=["sgd"], seeds=1)
    assert results(averaged)[:4] == results(plain)
    chosen, config = study(methods=["sgd"], seeds=1), tmp_path / "config.yaml"
    without = {name: value for name, value in yaml.safe_load(config.read_text()).items() if name != "averages"}
    config.write_text(yaml.safe_dump(without))
    claim(chosen, tmp_path)
    with pytest.raises(ValueError, match="another study: averages was"):
        claim(replace(chosen, averages=["ema-0.9"]), tmp_path)


@pytest.mark.parametrize("name", [*NAMES, "swa-0.9"])
def test_a_variant_takes_its_steps_at_the_shares_that_lie_ahead(tmp_path, name):
    variant = {"like": "sgd", "schedule": {"average": name}, "label": "falling"}
    folder = finished(tmp_path, methods=["sgd", variant], seeds=1, averages=["ema-0.5"])
    net, data = plain_start()
    counts = by_hand(name) if name != "swa-0.9" else [0, *[1 / 8] * 8]  # all 8 steps but 0.8 of one
    rates = [0.2 * sum(counts[step + 1 :]) for step in range(STEPS)]
    steps = plain_steps(net, data, torch.optim.SGD(net.parameters(), lr=0.2), rate=lambda step: rates[step])
    rows = read_csv(folder / "runs" / "falling-0" / "metrics.csv")
    assert [row["loss"] for row in rows] == pytest.approx([*steps], rel=1e-5)
    own = {row["read_out"] for row in results(folder) if row["method"] == "falling"}
    assert own == {"last", "ema", "swa", "two-point"}  # the others are for what it stands beside
    described = yaml.safe_load((folder / "methods.yaml").read_text())
    assert described["falling"]["equals"] == {"method": "sgd", "read_out": name}
    assert "equals" not in described["sgd"]


def test_a_schedule_and_its_average_agree_on_a_quadratic_to_first_order():
    """On its last weights; the error is of second order, so that a tenth of the rate leaves about a hundredth."""
    errors = []
    for lr in (0.01, 0.001):
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(40, generator=generator, dtype=torch.float64)
        x = y = torch.tensor(3.0, dtype=torch.float64)
        path, schedule = [x], Schedule(average="swa-0.25")
        for step, centre in enumerate(centres):
            x = x - lr * (x - centre)
            y = y - lr * schedule.factor(step, 40) * (y - centre)
            path.append(x)
        errors.append(abs(float(torch.stack(path[31:]).mean() - y)))
    assert errors[1] < errors[0] / 50
    assert errors[0] > 1e-4


def test_an_average_falls_within_a_warm_up_and_a_cosine():
    both = Schedule("cosine", warmup=0.25, average="swa-0.5")
    found = [both.factor(step, 8) for step in range(8)]
    ahead = [1, 1, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4]
    cosine = [1 / 2, 1, 1, *((1 + math.cos(math.pi * done / 6)) / 2 for done in range(1, 6))]
    assert found == pytest.approx([a * b for a, b in zip(ahead, cosine, strict=True)])
    assert both.label == "cosine, falling as SWA of the last 50 % does, after a warm-up of 25 % of the steps"


def test_a_variant_has_a_schedule_in_place_of_the_studys(tmp_path):
    variants = [{"like": "sgd", "schedule": {"name": "linear"}}, {"like": "sgd", "schedule": {}, "label": "flat"}]
    folder = finished(tmp_path, methods=["sgd", *variants], seeds=1, schedule=Schedule("cosine"))
    rates = {
        "sgd": lambda step: 0.1 * (1 + math.cos(math.pi * step / STEPS)),
        "sgd-linear": lambda step: 0.2 * (1 - step / STEPS),
        "flat": lambda _: 0.2,
    }
    for method, rate in rates.items():
        net, data = plain_start()
        steps = plain_steps(net, data, torch.optim.SGD(net.parameters(), lr=0.2), rate=rate)
        rows = read_csv(folder / "runs" / f"{method}-0" / "metrics.csv")
        assert [row["loss"] for row in rows] == pytest.approx([*steps], rel=1e-5), method
    styles = read_folder(folder).styles
    assert [styles[method].schedule for method in rates] == ["cosine", "linear", "constant"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mean-3"], "expected an average to be named as ema-0.9 .*, got 'mean-3'"),
        (["ema"], "expected an average to be named .*, got 'ema'"),
        (["ema-much"], "expected an average to be named .*, got 'ema-much'"),
        (["ema-nan"], "expected the decay of an average between 0 and 1, got ema-nan"),
        (["ema-1"], "expected the decay of an average between 0 and 1, got ema-1"),
        (["swa-16"], "expected the share of the steps of an average between 0 and 1, got swa-16"),
        (["two-point-0"], "expected the points of an average to be 1 or more whole steps apart, got two-point-0"),
        (["two-point-inf"], "expected the points of an average to be 1 or more whole steps apart, got two-point-inf"),
        (["two-point-8"], "fewer steps apart than the 8 of a run, got 8; take them closer"),
        (["ema-0.9", "ema-0.90"], "expected averages to be different, got ema-0.9 twice"),
    ],
)
def test_averages_that_no_run_has_are_refused_before_any_run(tmp_path, names, words):
    with pytest.raises(ValueError, match=words):
        run_study(study(averages=names), tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"like": "sgd", "schedule": "cosine"}, "expected schedule of a variant of sgd to be a mapping, got 'cosine'"),
        ({"like": "sgd", "schedule": {"nam": "cosine"}}, "expected schedule to have name, .*, got 'nam'; did you mean"),
        ({"like": "sgd", "schedule": {"name": "step"}}, "expected schedule.name to be one of constant, .*, got 'step'"),
        ({"like": "sgd", "schedule": {"warmup": 1.0}}, "expected schedule.warmup to be a share .*, got 1.0"),
        ({"like": "sgd", "schedule": {"warmup": "long"}}, "expected schedule.warmup to be a number, got 'long'"),
        ({"like": "sgd", "schedule": {"cooldown": True}}, "expected schedule.cooldown to be a number, got True"),
        ({"like": "sgd", "schedule": {"average": 3}}, "expected an average to be named .*, got 3"),
        ({"like": "schedule-free", "schedule": {}}, "expected no schedule in a variant of schedule-free, .*; leave it"),
        ({"like": "own", "schedule": {}}, "expected no schedule in a variant of own, .*; leave it out"),
    ],
)
def test_a_schedule_that_a_variant_cannot_have_is_refused_in_a_sentence(entry, words):
    with pytest.raises(ValueError, match=words):
        recipes_of([entry])


def test_a_schedule_whose_average_no_run_has_is_refused_before_any_run(tmp_path):
    entry = {"like": "sgd", "schedule": {"average": "two-point-8"}}
    with pytest.raises(ValueError, match="fewer steps apart than the 8 of a run"):
        run_study(study(methods=["sgd", entry]), tmp_path / "out", silent)
