"""A locale that is not UTF-8: letters in paths, and what is printed."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from lightning_modules.commands import encoding
from lightning_modules.support.files import read_csv

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
FIT = [
    *("fit", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--measure", "quadratic", "--measure_overhead", "9"),
    *("--trainer.logger", "pytorch_lightning.loggers.CSVLogger", "--trainer.logger.save_dir"),
]
COMPARE = [
    *("compare", "digits", "--data.batch_size", "50", "--data.limit", "300", "--epochs", "1", "--seeds", "1"),
    *("--lr", "0.2", "--methods", "[sgd,sgd-momentum]", "--out"),
]


@pytest.mark.skipif(os.name != "posix", reason="paths are UTF-8 elsewhere")
@pytest.mark.parametrize(
    ("command", "page"),
    [
        pytest.param(COMPARE, "report.html", id="compare"),
        pytest.param(FIT, "lightning_logs/version_0/measurements.html", id="fit", marks=pytest.mark.slow),
    ],
)
def test_a_folder_beyond_ascii_is_written_and_said_in_any_locale(tmp_path, command, page):
    name = "größe-λ"
    environment = {**os.environ, **ASCII}
    ended = subprocess.run(
        [sys.executable, "-m", "lightning_modules", *command, name],
        capture_output=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    ended.stdout.decode("ascii")
    assert rb"gr\xf6\xdfe-\u03bb" in ended.stdout  # where it lies, in the letters that there are
    folder = tmp_path / name
    text = (folder / page).read_text(encoding="utf-8")
    if command is FIT:
        assert name in text  # its configuration
    else:
        assert len(read_csv(folder / "results.csv")) > 0


def test_a_locale_with_utf_8_and_a_python_that_may_not_leave_its_mode_go_on(monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("expected no new beginning"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "utf-8")
    encoding.in_utf8()
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setenv("PYTHONUTF8", "1")
    encoding.in_utf8()


@pytest.mark.parametrize(
    ("name", "printed"), [("ascii", b"\\xb1 \\u03bb"), ("latin-1", b"\xb1 \\u03bb"), ("utf-8", "± λ".encode())]
)
def test_what_a_stream_has_no_letters_for_is_printed_as_a_number(monkeypatch, name, printed):
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding=name)
    monkeypatch.setattr(sys, "stdout", stream)
    encoding.print_anything()
    stream.write("± λ")
    stream.flush()
    assert content.getvalue() == printed
