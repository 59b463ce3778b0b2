"""Variants of a built-in method: some options changed, several of them in one study."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from studies import OPTIONS, STEPS, finished, plain_start, plain_steps, silent, study
from torch.utils.data import DataLoader

from lightning_modules import Classifier, Digits
from lightning_modules.callbacks.gradient_noise import GradientNoise
from lightning_modules.data.images import ImageDataset
from lightning_modules.study.compare import claim, run_study
from lightning_modules.study.methods.built_in import RECIPES, recipes_of
from lightning_modules.support.files import read_csv


def losses(folder: Any, method: str) -> list[Any]:
    return [row["loss"] for row in read_csv(folder / "runs" / f"{method}-0" / "metrics.csv")]


def test_variants_train_as_the_study_of_their_options_would(tmp_path):
    variants = [
        {"like": "nsgd", "nsgd": {"gamma": 0.3}},
        {"like": "nsgd", "nsgd": {"gamma": 0.5, "k": 3, "samples": 8}, "label": "Fewer"},
    ]
    together = finished(tmp_path / "all", methods=["sgd", *variants], seeds=1)
    for name, changed in (("nsgd-gamma-0-3", {"gamma": 0.3}), ("fewer", {"gamma": 0.5, "k": 3, "samples": 8})):
        alone = finished(tmp_path / name, methods=["nsgd"], nsgd=replace(OPTIONS, **changed), seeds=1)
        assert losses(together, name) == losses(alone, "nsgd")
    assert losses(together, "fewer") != losses(together, "nsgd-gamma-0-3")


def test_settings_of_a_variant_stand_in_place_of_the_methods(tmp_path):
    fixed = {"like": "sgd-momentum", "settings": {"lr": 0.05, "momentum": 0.5}, "search": {}}
    folder = finished(tmp_path, methods=["sgd", fixed], lr=None, tune=1, seeds=1)
    net, data = plain_start()
    steps = plain_steps(net, data, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5))
    name = "sgd-with-momentum-lr-0-05-momentum-0-5"
    assert losses(folder, name) == pytest.approx([*steps], rel=1e-5)
    assert {path.name for path in (folder / "tuning").iterdir()} == {"sgd-0"}  # it is not tuned


def test_a_clipped_variant_steps_by_the_clipped_gradient(tmp_path):
    folder = finished(tmp_path, methods=[{"like": "sgd", "clip": 0.4}], seeds=1)
    net, data = plain_start()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    clipped = []

    def clip(*_: Any) -> None:
        clipped.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.4)) > 0.4)

    optimizer.register_step_pre_hook(clip)
    assert losses(folder, "sgd-clipped-at-0-4") == pytest.approx([*plain_steps(net, data, optimizer)], rel=1e-5)
    assert len(clipped) == STEPS
    assert any(clipped)


@pytest.mark.parametrize(("size", "steps"), [(30, 16), ("all", 2)])
def test_a_variant_has_batches_of_its_own(tmp_path, size, steps, monkeypatch):
    """240 training images, two epochs; the batches of validation and test stay as they are, limited ones too."""
    seen: dict[str, set[int]] = {}
    for stage in ("validation", "test"):
        step = getattr(Classifier, f"{stage}_step")

        def noting(self: Any, batch: Any, *rest: Any, stage: str = stage, step: Any = step) -> Any:
            seen.setdefault(stage, set()).add(len(batch[0]))
            return step(self, batch, *rest)

        monkeypatch.setattr(Classifier, f"{stage}_step", noting)
    folder = finished(tmp_path, methods=["sgd", {"like": "sgd", "batch_size": size, "label": "other"}], seeds=1)
    net, data = plain_start()
    data.batch_size = 240 if size == "all" else size
    expected = plain_steps(net, data, torch.optim.SGD(net.parameters(), lr=0.2), steps=steps)
    assert losses(folder, "other") == pytest.approx([*expected], rel=1e-5)
    alone = finished(tmp_path / "alone", methods=["sgd"], seeds=1)
    assert losses(folder, "sgd") == losses(alone, "sgd")
    assert {max(sizes) for sizes in seen.values()} == {50}
    tables = [read_csv(f / "results.csv") for f in (folder, alone)]
    assert [row for row in tables[0] if row["method"] == "sgd"] == tables[1]


def test_a_variant_has_epochs_of_its_own_and_its_schedule_ends_with_them(tmp_path):
    longer = {"like": "sgd", "epochs": 3, "schedule": {"name": "linear"}, "label": "longer"}
    folder = finished(tmp_path, methods=["sgd", longer], seeds=1)
    net, data = plain_start()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    expected = plain_steps(net, data, optimizer, steps=12, rate=lambda step: 0.2 * (1 - step / 12))
    assert losses(folder, "longer") == pytest.approx([*expected], rel=1e-5)
    assert len(losses(folder, "sgd")) == STEPS


def test_noise_is_white_and_a_function_of_seed_and_step(tmp_path, random_state):
    """What the steps add to those of the gradient alone has the given deviation; another seed has other noise."""
    drawn: dict[tuple[int, int], torch.Tensor] = {}
    before = random_state()
    for seed in (0, 1):
        noise = GradientNoise(0.5, seed)
        for step in (0, 1):
            module = pl.LightningModule()
            module.p = torch.nn.Parameter(torch.zeros(4000))
            module.p.grad = torch.full((4000,), 3.0)
            trainer: Any = SimpleNamespace(global_step=step)
            noise.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters(), lr=1.0))
            drawn[seed, step] = module.p.grad - 3.0
    assert random_state() == before
    for values in drawn.values():
        assert float(values.std()) == pytest.approx(0.5, rel=0.05)  # 4.5 standard errors
        assert abs(float(values.mean())) < 0.04  # five
    stacked = torch.corrcoef(torch.stack(list(drawn.values())))
    assert float((stacked - torch.eye(4)).abs().max()) < 0.08


def test_a_noisy_variant_is_the_same_run_again_and_another_than_without(tmp_path):
    noisy = {"like": "sgd", "noise": 0.05, "label": "noisy"}
    folder = finished(tmp_path / "a", methods=["sgd", noisy], seeds=1)
    assert losses(folder, "noisy") == losses(finished(tmp_path / "b", methods=["sgd", noisy], seeds=1), "noisy")
    assert losses(folder, "noisy")[0] == losses(folder, "sgd")[0]  # before the first step
    assert losses(folder, "noisy")[1] != losses(folder, "sgd")[1]


def test_a_measured_gradient_has_the_noise_of_its_step(tmp_path):
    """Gradients of one batch are much alike, and with much noise are not."""
    noisy = {"like": "sgd", "noise": 5.0, "label": "noisy"}
    chosen = {"methods": ["sgd", noisy], "seeds": 1, "lr": 1e-3, "measure": ["valley"], "measure_samples": 20}
    folder = finished(tmp_path, **chosen)
    cosines = {
        method: [
            abs(row["value"])
            for row in read_csv(folder / "runs" / f"{method}-0" / "valley.csv")
            if row["quantity"] == "cosine" and row["value"] == row["value"]
        ]
        for method in ("sgd", "noisy")
    }
    assert min(cosines["sgd"]) > 0.3
    assert max(cosines["noisy"]) < 0.1


def test_data_that_do_not_go_by_their_batch_size_are_refused(tmp_path):
    class Fixed(Digits):
        def train_dataloader(self) -> Any:
            dataset = ImageDataset(self.splits["train"])
            return DataLoader(dataset, batch_size=40)

    words = (
        "train_dataloader goes by their batch_size, got 6 batches of 30 from 240 samples; leave batch_size out of other"
    )
    chosen = study(methods=["sgd", {"like": "sgd", "batch_size": 30, "label": "other"}], data=Fixed(limit=300))
    with pytest.raises(ValueError, match=words):
        run_study(chosen, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_quadratic_of_a_single_batch_is_refused_before_any_run(tmp_path):
    chosen = study(methods=["sgd", {"like": "sgd", "batch_size": "all", "label": "GD"}], measure=["quadratic"])
    with pytest.raises(ValueError, match=r"two batches of training data .* got one for GD; leave quadratic out"):
        run_study(chosen, tmp_path / "out", silent)


def test_names_of_variants_say_what_is_changed():
    entry = {"like": "sgd", "batch_size": "all", "epochs": 9, "noise": 0.1, "schedule": {"name": "trapezoid"}}
    (recipe,) = recipes_of([entry]).values()
    assert recipe.label == "SGD, batch of all, 9 epochs, noise 0.1, trapezoid, cool-down 20 %"
    (small,) = recipes_of([{"like": "nsgd", "batch_size": 8}]).values()
    assert small.label == "NSGD, batch 8"


def test_a_variant_is_made_again_from_the_files_of_its_study(tmp_path):
    chosen = study(methods=["sgd", {"like": "nsgd", "nsgd": {"k": 3}}], seeds=1)
    run_study(chosen, tmp_path, silent)
    claim(chosen, tmp_path)  # the same study
    with pytest.raises(ValueError, match="another study"):
        claim(replace(chosen, methods=["sgd", {"like": "nsgd", "nsgd": {"k": 4}}]), tmp_path)


def test_styles_and_names_of_variants_differ():
    found = recipes_of([*RECIPES, *({"like": "nsgd", "nsgd": {"k": k}} for k in range(1, 9))])
    assert len({(recipe.color, recipe.line) for recipe in found.values()}) == len(found) == len(RECIPES) + 8
    assert found["nsgd-k-3"].label == "NSGD, k 3"
    assert found["nsgd-k-3"].search == RECIPES["nsgd"].search
    assert found["nsgd-k-3"].hyperparameters == ("lr", "momentum", "weight_decay", "gamma")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"like": "nsgdd"}, "expected like to be among .*, got 'nsgdd'; did you mean nsgd"),
        ({"like": 3}, "expected like to be among .*, got 3"),
        ({"like": "nsgd", "gamma": 0.1}, "expected a variant to have like, .*, got 'gamma'"),
        ({"like": "nsgd", "nsgd": {"gama": 0.1}}, "expected nsgd .* among .*, got 'gama'; did you mean gamma"),
        ({"like": "nsgd", "nsgd": 3}, "expected nsgd .* a mapping, got 3"),
        ({"like": "nsgd", "label": 3}, "expected label .* a text, got 3"),
        ({"like": "sgd", "nsgd": {"k": 3}}, "expected nsgd in a variant of a method with directions, got one of sgd"),
        ({"like": "sgd", "settings": {"rho": 1.0}}, "expected settings .* among lr, .*, got 'rho'"),
        ({"like": "sgd", "settings": {"lr": "fast"}}, "expected settings.lr .* a number, got 'fast'"),
        ({"like": "sgd", "search": {"lr": [1, 0.1]}}, "expected search.lr .* its ends are swapped"),
        ({"like": "nsgd", "nsgd": {"k": 3}, "search": {"k": [2, 4]}}, "expected search .* got 'k'"),
        ({"like": "sgd", "clip": 0}, "expected clip .* a norm above 0, got 0"),
        ({"like": "sgd", "clip": True}, "expected clip .* a norm above 0, got True"),
        ({"like": "sgd", "noise": -1}, "expected noise .* a standard deviation above 0, got -1"),
        ({"like": "sgd", "batch_size": 0}, 'expected batch_size .* a number of at least 1, or "all", got 0'),
        ({"like": "sgd", "batch_size": "whole"}, "expected batch_size .* a number of at least 1, .* got 'whole'"),
        ({"like": "sgd", "epochs": "all"}, "expected epochs .* a number of at least 1, got 'all'"),
        ({"like": "sgd", "epochs": 2.5}, "expected epochs .* a number of at least 1, got 2.5"),
        ({"like": "sgd-more"}, "expected like to be a method with settings of its own, got sgd-more; take sgd"),
        ({"like": "sgd"}, "expected the label .* one of its own, got 'SGD'; give another"),
    ],
)
def test_a_bad_variant_is_refused_in_a_sentence(entry, words):
    with pytest.raises(ValueError, match=words):
        recipes_of(["adamw", entry])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"like": "sam", "clip": 1.0}, "expected clip of a method that takes one gradient a step, got sam-clipped-at"),
        ({"like": "nsgd", "nsgd": {"gamma": "much"}}, "gamma"),
        ({"like": "nsgd", "nsgd": {"k": 2.5}}, "expected k"),
        ({"like": "nsgd", "nsgd": {"samples": -1}}, "samples"),
        ({"like": "nsgd", "nsgd": {"solver": "best"}}, "solver"),
        ({"like": "nsgd", "settings": {"lr": -1.0}}, "expected lr >= 0, got -1.0"),
        ({"like": "sgd", "batch_size": 241}, "expected a batch of training data at least, got none for SGD, batch 241"),
    ],
)
def test_a_variant_that_cannot_train_is_refused_before_any_run(tmp_path, entry, words):
    with pytest.raises(ValueError, match=words):
        run_study(study(methods=["sgd", entry], lr=None), tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()
