"""What jsonargparse says, which complaints are read from: each test fails when its words change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
from pytorch_lightning import Callback, LightningDataModule
from pytorch_lightning.loggers import Logger
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.commands.parsing.complaints import _KEY, _MISSING, _NO_OPTION, BadOption, one_sentence
from lightning_modules.commands.parsing.given_options import given_options
from lightning_modules.commands.parsing.parser import Parser, parse
from lightning_modules.commands.parsing.types import choices_of, described, known_classes, takes_only_classes


class Needs(LightningDataModule):
    def __init__(self, path: str, size: int = 1) -> None:
        super().__init__()


@pytest.fixture
def parser() -> Parser:
    made = Parser(prog="nsgd made")
    made.add_argument("--config", action="config")
    made.add_argument("--epochs", type=int, default=1)
    made.add_subclass_arguments(LightningDataModule, "data", required=False)
    return made


def complaints(parser: Parser, *argv: str) -> list[BadOption]:
    """What the parser complains of, from the outside in."""
    with pytest.raises(BadOption) as caught:
        parser.parse_args(list(argv))
    found, error = [], caught.value
    while error is not None:
        found += [error] if isinstance(error, BadOption) else []
        error = error.__cause__ or error.__context__
    return found


def test_the_key_of_a_bad_value_is_quoted_first(parser):
    (error,) = complaints(parser, "--epochs", "ten")
    assert _KEY.match(str(error))[1] == "epochs"
    outer, inner = complaints(parser, "--data", f"{__name__}.Needs", "--data.size", "ten")
    assert [_KEY.match(str(error))[1] for error in (outer, inner)] == ["data", "size"]
    assert inner.parser._option_string_actions["--size"]._typehint is int


def test_an_option_that_there_is_not_is_quoted(parser, tmp_path):
    *_, error = complaints(parser, "--data", f"{__name__}.Needs", "--data.szie", "2")
    assert _NO_OPTION.search(str(error))["option"] == "szie"
    assert "--size" in error.parser._option_string_actions
    (tmp_path / "made.yaml").write_text("epcohs: 3\n")
    (error,) = complaints(parser, "--config", str(tmp_path / "made.yaml"))
    assert _NO_OPTION.search(str(error))["option"] == "epcohs"


def test_an_option_that_a_group_has_not_is_quoted_with_the_group(parser):
    parser.add_class_arguments(Needs, "needs")
    (error,) = complaints(parser, "--needs", "{path: x, szie: 2}")
    assert _NO_OPTION.search(str(error)).groupdict() == {"group": "needs", "option": "szie"}


def test_an_option_that_is_missing_is_named(parser):
    *_, error = complaints(parser, "--data", f"{__name__}.Needs")
    assert _MISSING.search(str(error))[1] == "path"


def test_words_that_no_option_takes_come_without_a_cause(parser):
    (error,) = complaints(parser, "--epcohs", "3")
    assert error.__cause__ is None
    assert str(error).split()[-2:] == ["--epcohs", "3"]
    with pytest.raises(ValueError, match=r"^expected an option of nsgd made, got --epcohs; did you mean --epochs\?"):
        parse(parser, ["--epcohs=3"], "nsgd made")


def test_a_message_of_unknown_form_stays_as_it_is(parser):
    error = BadOption("all\n  wrong", parser)
    error.__cause__ = TypeError("all")
    assert one_sentence(error, command="nsgd fit", given={}) == "all wrong; nsgd fit --help lists the options"


def test_what_is_given_is_found_on_the_line_and_in_files(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lr: 1\nmodel: {class_path: m.Net, init_args: {width: 3}}\nnsgd: {k: 2}\n")
    argv = ["--config", str(file), "--epochs=4", "--trainer.callbacks+", "Timer", "--data.init_args.path", "x"]
    line = {"epochs": "4", "trainer.callbacks": "Timer", "data.path": "x"}
    assert given_options(argv) == {"model": "m.Net", "model.width": 3} | line
    every = {"lr": 1, "model": "m.Net", "model.width": 3, "nsgd": {"k": 2}, "nsgd.k": 2}
    assert given_options(argv, of_files=()) == every | line


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (int, "a whole number"),
        (int | Literal["auto"] | None, "a whole number or 'auto'"),
        (float | Tensor, "a number"),
        (list[float] | None, "a list of numbers"),
        (list[Literal["a", "b"]], "a list of 'a', 'b'"),
        (dict[str, dict[str, float]], "a mapping of names to mappings of names to numbers"),
        (dict[str, Any] | None, "a mapping"),
        (Optimizer, "an Optimizer"),
        (Logger | Iterable[Logger] | bool | None, "a Logger or a list of Loggers or true or false"),
        (Path, "a Path"),
    ],
)
def test_types_in_words(kind, said):
    assert described(kind) == said


def test_types_of_classes_and_choices():
    assert takes_only_classes(list[Callback] | Callback | None)
    assert not takes_only_classes(Logger | bool)
    assert not takes_only_classes(float | Tensor)
    known = known_classes(list[Callback] | None)
    assert {"Timer", "Checkpoint", "ModelCheckpoint"} <= known
    assert "Callback" not in known
    assert known_classes(float | None) == set()
    assert choices_of(list[Literal["a", "b"]]) == ["a", "b"]
