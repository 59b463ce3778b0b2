"""`nsgd compare` alone: digits in small and in large batches, on one page."""

from __future__ import annotations

import pytest
import yaml

from lightning_modules.commands import compare
from lightning_modules.commands.main import main

METHODS = ["sgd", "nsgd", "nsgd-hessian", "random", "adamw"]


@pytest.fixture
def short(tmp_path, monkeypatch):
    """The named studies, cut to two methods, two seeds and few steps."""
    for path in compare.NAMED.glob("digits-*.yaml"):
        options = yaml.safe_load(path.read_text())
        assert options["methods"] == METHODS
        assert options["seeds"] == 5
        options |= {"methods": ["sgd", "nsgd"], "seeds": 2, "epochs": 2, "search": {}}
        options["settings"] = {name: options["settings"][name] for name in ("sgd", "nsgd")}
        (tmp_path / "named").mkdir(exist_ok=True)
        (tmp_path / "named" / path.name).write_text(yaml.safe_dump(options))
    monkeypatch.setattr(compare, "NAMED", tmp_path / "named")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [[], pytest.param(["--out", "nsgd-compare", "--jobs=1"], marks=pytest.mark.slow)])
def test_both_regimes_are_made_and_stand_on_one_page(short, capsys, words):
    assert main(["compare", *words]) == 0
    page = (short / "nsgd-compare" / "report.html").read_text()
    assert page.count('class="verdict"') == 2
    assert "Batches of 32" in page
    assert "Batches of 1,024" in page
    for name in ("digits-32", "digits-1024"):
        assert (short / "nsgd-compare" / name / "results.csv").exists()
        assert f'href="{name}/report.html"' in page
        assert (short / "nsgd-compare" / f"{name}-training-loss.png").exists()
    places = [page.index(part) for part in ('class="verdict"', "<figure>", 'class="cards"', 'class="caption"')]
    assert places == sorted(places)
    assert "Both: nsgd-compare/report.html" in capsys.readouterr().out
    before = page
    assert main(["compare", *words]) == 0  # all runs are there: the same page again
    assert (short / "nsgd-compare" / "report.html").read_text() == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.yaml", "nsgd-compare holds another study; choose another folder with --out, or remove it"),
        ("notes.txt", "nsgd-compare holds files but no study; choose an empty or a new folder with --out"),
    ],
)
def test_what_that_folder_holds_is_left_alone(short, capsys, name, said):
    (short / "nsgd-compare").mkdir()
    (short / "nsgd-compare" / name).write_text("net: mlp\n")
    assert main(["compare"]) == 2
    assert capsys.readouterr().err.strip() == f"nsgd: {said}"
    assert [path.name for path in (short / "nsgd-compare").iterdir()] == [name]


def test_a_file_in_place_of_that_folder_is_left_alone(short, capsys):
    (short / "nsgd-compare").write_text("mine")
    assert main(["compare"]) == 2
    assert capsys.readouterr().err.strip() == (
        "nsgd: nsgd-compare is, or is inside, a file; choose a folder with --out"
    )
    assert (short / "nsgd-compare").read_text() == "mine"


def test_any_option_of_a_study_means_digits_as_before(short, capsys):
    assert main(["compare", "--seeds", "0"]) == 2
    assert "digits.yaml" in capsys.readouterr().err  # which is not among the short ones
