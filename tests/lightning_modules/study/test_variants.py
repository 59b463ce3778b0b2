"""Variants of a built-in method: some options changed, several of them in one study."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from studies import OPTIONS, STEPS, finished, plain_start, plain_steps, silent, study

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
    ],
)
def test_a_variant_that_cannot_train_is_refused_before_any_run(tmp_path, entry, words):
    with pytest.raises(ValueError, match=words):
        run_study(study(methods=["sgd", entry], lr=None), tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()
