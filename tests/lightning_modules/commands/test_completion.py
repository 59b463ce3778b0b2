"""Tab completion in a real bash: the script is sourced, and asked as the shell asks it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lightning_modules.commands.main import main

ASK = """
source completion.bash
while read -ra COMP_WORDS; do
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _shtab_nsgd "${COMP_WORDS[-1]}"
    echo "${COMPREPLY[*]}"
done
"""

ANSWERS = {
    "nsgd com": {"compare"},
    "nsgd compare dig": {"digits", "digits-1024", "digits-32"},
    "nsgd compare --nsgd.so": {"--nsgd.source", "--nsgd.solver"},
    "nsgd compare --nsgd.solver la": {"lanczos"},
    "nsgd compare --data Hug": {"HuggingFace"},
    "nsgd compare --data.pa": {"--data.path"},
    "nsgd escape --wal": {"--walkers", "--walls"},
    "nsgd fit --optimizer NS": {"NSGD"},
    "nsgd fit --optimizer.ga": {"--optimizer.gamma"},
    "nsgd fit --trainer.max_e": {"--trainer.max_epochs"},
    "nsgd test --ckpt": {"--ckpt_path"},
}


@pytest.mark.filterwarnings("ignore:.*shtab.*")
def test_bash_completes_commands_options_classes_choices_and_studies(capsys, monkeypatch, tmp_path):
    pytest.importorskip("shtab", reason="needs the extra nsgd[lightning]")
    monkeypatch.chdir(tmp_path)
    assert main(["--print-completion", "bash"]) == 0
    Path("completion.bash").write_text(capsys.readouterr().out)
    asked = subprocess.run(
        ["bash", "-c", ASK], input="\n".join(ANSWERS) + "\n", capture_output=True, text=True, check=True
    )
    assert asked.stderr == ""
    assert dict(zip(ANSWERS, (set(line.split()) for line in asked.stdout.splitlines()), strict=True)) == ANSWERS


def test_zsh_has_a_script_too(capsys):
    pytest.importorskip("shtab", reason="needs the extra nsgd[lightning]")
    assert main(["--print-completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef nsgd")


@pytest.mark.parametrize("args", [[], ["fish"]])
def test_another_shell_is_one_sentence(capsys, args):
    assert main(["--print-completion", *args]) == 2
    assert "expected --print-completion to be bash or zsh, got" in capsys.readouterr().err
