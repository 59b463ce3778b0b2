"""Any value for any option of a command: it is taken, or exit code 2 with one sentence; nothing of it is run."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dry import PLANTED, UNSAFE, Stopped, stop_before_work
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from time_limit import in_time

from lightning_modules import Classifier, Digits
from lightning_modules.commands import compare, escape, fit
from lightning_modules.commands.main import main
from nsgd import NSGD
from nsgd.options import DampingOptions


class Captured(BaseException):
    """A command has made its parser."""


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for files that are no good, where commands stop before their work."""
    monkeypatch.chdir(tmp_path)
    stop_before_work(monkeypatch)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.yaml").write_text("lr: [\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "bytes.yaml").write_bytes(b"\x00\xff\xfe")
    (tmp_path / "unsafe.yaml").write_text(f"data: {UNSAFE}\n")
    torch.save([1], tmp_path / "list.ckpt")
    return tmp_path


def options_of(command: str) -> dict[str, str]:
    """The options of a command with their types, from its own parser, so that a new one is tried at once."""
    found: dict[str, str] = {}

    def capture(parser: Any, *_: Any) -> None:
        for option, action in parser._option_string_actions.items():
            found[option] = str(getattr(action, "_typehint", None))
        raise Captured

    def capture_of_lightning(self: Any, *_: Any) -> None:
        capture(self._subcommand_parsers[command])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compare, "parse", capture)
        patched.setattr(escape, "parse", capture)
        patched.setattr(fit._Commands, "parse_arguments", capture_of_lightning)
        with pytest.raises(Captured):
            main([command])
    inside = {"data": Digits, "model": Classifier, "optimizer": NSGD, "damp": DampingOptions}
    for option, kind in inside.items():
        if f"--{option}" in found and (option == "data" or command != "compare"):
            parameters = inspect.signature(kind).parameters.items()
            found |= {f"--{option}.{name}": str(p.annotation) for name, p in parameters if name != "params"}
    return {option: found[option] for option in sorted(found) if option.startswith("--") and option != "--help"}


NUMBERS = ["0", "1", "2", "-1", "0.5", "-0.1", "1e-9", "1e300", "-1e300", ".nan", ".inf", "-.inf", "null", "true"]

LISTS = st.lists(st.sampled_from(NUMBERS), max_size=3).map(lambda values: f"[{', '.join(values)}]")
MAPPINGS = st.sampled_from(
    [
        text.format(number)
        for number in NUMBERS
        for text in (
            "{{lr: {}}}",
            "{{name: cosine, warmup: {}}}",
            "{{nsgd: {{gamma: {}}}}}",
            "{{nsgd: {{lr: [{}, 1]}}}}",
        )
    ]
)


def nearly(option: str, kind: str) -> st.SearchStrategy[str]:
    """Values of the type of an option, which get past the parser."""
    if choices := re.findall(r"'([\w-]+)'", kind.partition("Literal")[2]):
        return st.sampled_from(choices)
    number = st.sampled_from([*NUMBERS, str(10**30), str(2**63)])
    for words, values in (("list", LISTS), ("dict", MAPPINGS), ("Schedule", MAPPINGS)):
        if words in kind:
            return values | number
    if "bool" in kind and "int" not in kind:
        return st.sampled_from(["true", "false", "null"])
    return number if "int" in kind or "float" in kind else VALUES


VALUES = st.one_of(
    st.sampled_from(["", " ", "-1", "0", "1", "2", "0.5", "-0.1", "nan", ".nan", "inf", "-.inf", "1e300", str(10**30)]),
    st.sampled_from(["true", "null", "None", "auto", "all", "last", "best", "-", "--", "=", "~", "x" * 3000]),
    st.sampled_from(["[]", "[1, [2, [3]]]", "[sgd, nsgd]", "[0.1]", "[1, 1]", "[null]", "['", "{", "{}", "{a: {}}"]),
    st.sampled_from(["'", '"', "\n", "a\nb: c", "ä€𝄞", "\udcff", "<b>&amp;", "$(touch planted)", "`touch planted`"]),
    st.sampled_from(["folder", "missing", "missing/x.yaml", "text.yaml/x", "/proc/nowhere", "folder/new"]),
    st.sampled_from(["text.yaml", "list.yaml", "empty.yaml", "bytes.yaml", "unsafe.yaml", "list.ckpt", "@"]),
    st.sampled_from([UNSAFE, f"[{UNSAFE}]", f"{{a: {UNSAFE}}}", f"{{class_path: {UNSAFE}}}", "!!python/name:os"]),
    st.sampled_from(["os.system", "Digits", "torch.optim.SGD", "{class_path: os.system}", "{init_args: {a: 1}}"]),
    st.integers(-3, 10**6).map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=5),
    st.lists(st.floats(), max_size=3).map(str),
    st.dictionaries(st.text("ab.:", max_size=2), st.integers(), max_size=2).map(lambda value: yaml.safe_dump(value)),
)
BEGIN = {
    "compare": [["digits"], ["--net", "mlp"], []],
    "escape": [[]],
    "fit": [["--optimizer", "NSGD"], []],
    "test": [["--ckpt_path", "list.ckpt"], []],
}


@st.composite
def command_lines(draw: Callable[..., Any], command: str, options: dict[str, str]) -> list[str]:
    """A command with one to three options, as words, as one word each, or in a config file."""
    most, wild = draw(st.sampled_from([1, 1, 3])), draw(st.sampled_from([False, False, True]))
    names = draw(st.lists(st.sampled_from(list(options)), min_size=1, max_size=most))
    chosen = [(name, draw(VALUES if wild else nearly(name, options[name]))) for name in names]
    words = draw(st.sampled_from(BEGIN[command]))
    form = draw(st.sampled_from(["words", "one word"] * 3 + ["file"] * 2 + ["no value"]))
    if form == "file":
        text = "".join(f"{option[2:]}: {value}\n" for option, value in chosen)
        Path("given.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
        return [command, *words, "--config", "given.yaml"]
    if form == "one word":
        return [command, *words, *(f"{option}={value}" for option, value in chosen)]
    if form == "no value":
        return [command, *words, *(option for option, _ in chosen)]
    return [command, *words, *(word for pair in chosen for word in pair)]


# Of jsonargparse, of PyYAML and of Python's types, none of which a sentence for users has.
PROSE = ("Parser key", "Union", "subtype", "typing.", "<class", "Traceback", "jsonargparse", "NoneType", "object at 0x")
SECONDS = 60


SEEN = Counter[str]()


def tried(argv: list[str]) -> str:
    """Run a command line, and say what became of it; an AssertionError where it is neither taken nor refused well."""
    for folder in ("nsgd-compare", "nsgd-escape"):  # or the next one would be refused as of another study
        shutil.rmtree(folder, ignore_errors=True)
    said, printed = io.StringIO(), io.StringIO()
    sys.stdin, stdin = io.StringIO(), sys.stdin  # which the path - stands for
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed), in_time(SECONDS):
            code: int | str | None = main(argv)
    except Stopped:
        code = "taken"
    except SystemExit as error:  # of --print_config and --help, which print and end
        code = error.code
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__}: {error}"
        raise AssertionError(argv, "TRACEBACK", kind, f"{last.filename}:{last.lineno}") from error
    finally:
        sys.stdin = stdin
        assert not Path(PLANTED).exists(), argv
    SEEN[str(code)] += 1
    lines = [line for line in said.getvalue().splitlines() if line.startswith("nsgd: ")]
    if code not in ("taken", 0, None):
        assert code == 2, (argv, f"CODE {code}", lines)
        assert len(lines) == 1, (argv, "LINES", said.getvalue())
        assert said.getvalue().endswith(f"{lines[0]}\n"), (argv, "AFTER", said.getvalue())
        assert len(lines[0]) > 25, (argv, "SHORT", lines)
        prose = [words for words in PROSE if words in lines[0] and not any(words in word for word in argv)]
        assert not prose, (argv, f"PROSE {prose}", lines)
    return str(code)


def run_many(command: str, count: int, record_property: Callable[[str, object], None], **how: Any) -> None:
    options = options_of(command)
    assert len(options) > 10
    before = SEEN.total()

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), **how)
    @given(argv=command_lines(command, options))
    def run(argv: list[str]) -> None:
        tried(argv)

    try:
        run()
    finally:
        record_property("reliability: bad command lines", SEEN.total() - before)


@pytest.mark.filterwarnings("ignore")  # they are no errors to a user
@pytest.mark.parametrize(("command", "count"), [("compare", 40), ("escape", 100), ("fit", 12), ("test", 6)])
def test_any_value_for_any_option(dry, record_property, command, count):
    run_many(command, count, record_property, derandomize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("command", "count"), [("compare", 3000), ("escape", 3000), ("fit", 2000), ("test", 500)])
def test_any_value_for_any_option_for_long(dry, record_property, command, count):
    run_many(command, count, record_property)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("argv", "text", "sentence"),
    [
        (["escape"], "noise: null\n", "expected --noise to be a number, got null; leave it out for its default"),
        (["compare", "digits"], "settings: null\n", "expected --settings to be a mapping of names to .*, got null"),
        (["compare"], "data: {class_path: Digits, init_args: {batch_size: null}}\n", "--data.batch_size .*, got null"),
        (["fit"], "measure_overhead: null\n", "expected --measure_overhead to be a number, got null"),
        (["fit"], "damp.gamma: 2\n", "expected --damp to be a mapping, got {'gamma': 2}"),
        (["escape"], "config: other.yaml\n", "expected options in the config given.yaml, got another config in it"),
        (["escape"], "saddle+: near\n", "expected --saddle to be a list of numbers, got 'near'"),
        (["escape", "--walkers", str(10**30)], "", "expected walkers of at most 2,147,483,647, got 1e\\+30"),
        (["compare", "digits", "--tune", str(10**30)], "", "expected tune of at most 10,000, got 1e\\+30"),
        (["compare", "digits", "--net", "{a: b}"], "", "expected net to be one of .*, or module:name of your own, got"),
        (["compare", "digits", "--schedule", "{lr: 0}"], "", "expected an option of --schedule, got lr in it"),
        (["compare", "digits", "--data.help", "[0]"], "", "expected --data.help CLASS, a class by its import path"),
        (
            ["fit", "--model.num_classes", "0"],
            "",
            "expected num_classes of at least 2, got 0",
        ),
        (["escape"], b"out: \xff\n", "expected a config in YAML, got given.yaml: .*can't decode"),
        (["compare", "digits", ""], "", "expected an option of nsgd compare, got ''; nsgd compare --help"),
    ],
)
def test_what_this_has_found_is_said_in_one_sentence(dry, capsys, argv, text, sentence):
    if text:
        Path("given.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        argv = [*argv, "--config", "given.yaml"]
    assert main(argv) == 2
    assert re.search(f"nsgd: .*{sentence}", capsys.readouterr().err)
