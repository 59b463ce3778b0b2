"""The ``nsgd`` command: ``fit``, ``validate``, ``test`` and ``predict`` by LightningCLI, ``compare``, ``escape``."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from lightning_modules.commands.encoding import in_utf8, print_anything
from lightning_modules.commands.failures import sentence_on
from lightning_modules.commands.parsing import short_help
from lightning_modules.commands.sigterm import CODE, Terminated, raising_at_sigterm
from lightning_modules.support.nearest import did_you_mean

HELP = """usage: nsgd COMMAND [options]

NSGD, Nudged SGD: SGD that steps less along the sharpest directions of the loss.

  compare    compare NSGD with SGD, and with weight averages, on real data: a table and a report
  escape     let SGD, and NSGD, escape from a minimum, and compare with theory: a table and a report
  fit        train any LightningModule with NSGD or any other optimizer
  validate   evaluate a checkpoint on the validation data
  test       evaluate a checkpoint on the test data
  predict    write what a checkpoint predicts for the test data

nsgd COMMAND --help shows the options of a command, nsgd --version the version, and
nsgd --print-completion SHELL what bash or zsh sources to complete all of them."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        args: Its words; by default those that the program was started with.

    Returns:
        The exit code: 0; 2 for bad input, and 1 where the machine or a user's class failed, said in one sentence; 1 if
        a run of a study died twice; 130 if interrupted; 143 after SIGTERM; 141 if nobody reads what is printed any
        more. A fault of ours raises, which ends Python with 1.
    """
    if args is None:
        in_utf8()
        print_anything()
    argv = list(sys.argv[1:] if args is None else args)
    path = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))  # for module files of the user's
    goes_on = argv[:1] in (["compare"], ["escape"]) and "--worker" not in argv  # whose study goes on without it
    again = "; the same command keeps the finished runs and goes on" if goes_on else ""
    try:
        with raising_at_sigterm():
            code = _run(argv)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except Terminated:
        print(f"nsgd: ended by SIGTERM{again}", file=sys.stderr)
        return CODE
    except _Missing as error:
        print(f"nsgd: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns an interrupt of its own loop into an exit.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print(f"nsgd: interrupted{again}", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        said = sentence_on(error)
        if said is None:
            raise
        sentence, code = said
        whole = "; ".join([sentence, *getattr(error, "__notes__", [])])
        print(f"nsgd: {' '.join(whole.split())}", file=sys.stderr)
        return code
    finally:
        sys.path[:] = path


def _run(argv: list[str]) -> int:
    """Importing Lightning takes seconds, which help does without."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        print(f"nsgd {version('nsgd')}")
        return 0
    if argv[0] == "--print-completion":
        with _importing():
            from lightning_modules.commands.completion import completion_script
        print(completion_script(" ".join(argv[1:])))
        return 0
    command, *options = argv
    if command in short_help.HELP and short_help.asks_short_help(argv):
        print(short_help.HELP[command])
        return 0
    options = options[:-1] if options[-2:] == ["--help", "all"] else options
    for option in options:
        if option.startswith("--") and option.endswith("=--"):  # which argparse takes for the end of options
            raise ValueError(f"expected a value after {option.removesuffix('=--')}, got --; give another")
    known = ("compare", *short_help.LIGHTNING, "escape")
    if command not in known:
        meant = did_you_mean(command, known) or "nsgd --help says what they do"
        raise ValueError(f"expected a command among {', '.join(known)}, got {command!r}; {meant}")
    with _importing():
        from lightning_modules.commands.compare import run_compare_command
        from lightning_modules.commands.escape import run_escape_command
        from lightning_modules.commands.fit import run_lightning
    if command in short_help.LIGHTNING:
        run_lightning([command, *options])
        return 0
    return run_compare_command(options) if command == "compare" else run_escape_command(options)


class _Missing(Exception):
    """A package of the extra is not installed."""


@contextmanager
def _importing() -> Iterator[None]:
    """Say what goes on while the commands are imported, or in one sentence what they lack."""
    try:
        from lightning_modules.support.progress import starting

        with starting("importing torch and Lightning"):
            yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("nsgd", "lightning_modules"):
            raise
        raise _Missing(
            f"expected the extra lightning, which the commands need, got no package {package}; install it in the "
            "folder of the sources with: pip install '.[lightning]'"
        ) from error


def _nobody_reads() -> bool:
    """Whether the pipe that is printed to is closed, as by ``head``; then nothing more is written to it."""
    try:
        number = sys.stdout.fileno()
    except OSError:  # no file of the system's
        return False
    poll = select.poll()
    poll.register(number, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:  # Python itself flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return closed
