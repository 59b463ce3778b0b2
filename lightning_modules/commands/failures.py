"""What ended a command, in one sentence and an exit code: bad input, or what the machine would not do.

Where an exception of a library, or of a user's class, comes from is read off the frames that it passed. A fault of the
project itself has no sentence: it keeps its traceback, for a bug report.
"""

from __future__ import annotations

import errno
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from traceback import FrameSummary
from typing import Literal

from lightning_modules.support.whole_files import no_room

BAD_INPUT, FAILED = 2, 1

Owner = Literal["ours", "library", "user"]


def sentence_on(error: Exception) -> tuple[str, int] | None:
    """One sentence on what ended a command, with the exit code; None for a fault of ours."""
    exceptions = sys.modules.get("lightning_fabric.utilities.exceptions")  # not there, it was not raised
    if exceptions is not None and isinstance(error, exceptions.MisconfigurationException):
        return str(error), BAD_INPUT
    if (said := _of_the_machine(error)) is not None:
        return said, FAILED
    if (said := _of_a_checkpoint(error)) is not None:
        return said, BAD_INPUT
    if (said := _of_an_optimizer(error)) is not None:
        return said, BAD_INPUT
    if (ours := _ours(error)) is not None:
        return str(ours), BAD_INPUT
    if (said := _of_a_user(error)) is not None:
        return said, FAILED
    if (said := _of_a_library(error)) is not None:
        return said, BAD_INPUT
    return None


def _of_the_machine(error: Exception) -> str | None:
    """No room on a disk or in memory, wherever it was met."""
    if (full := no_room(error)) is not None:
        where = full.filename or "a file"
        return f"expected room to write {where}, got none ({full.strerror}); make some, and give the same command again"
    for cause in _chain(error):
        if isinstance(cause, MemoryError) or _is_out_of_memory(cause):
            return f"expected more memory than there is ({cause}); give smaller batches or a smaller network"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _of_a_checkpoint(error: Exception) -> str | None:
    """Torch cannot read the file, Lightning finds in it no weights or no dictionary, or it is of something else."""
    frames = _frames(error)
    if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
        return (
            "the checkpoint is of another network or data set; give the options that it was trained with, for example "
            "--config lightning_logs/version_0/config.yaml"
        )
    if isinstance(error, ValueError) and frames and frames[-1].name == "_parse_ckpt_path":
        return f"expected --ckpt_path to be a checkpoint that is there, got none: {error}"
    torch_reads = any(Path(frame.filename).parts[-2:] == ("torch", "serialization.py") for frame in frames)
    migrates = any(Path(frame.filename).parent.name == "migration" for frame in frames)
    if torch_reads or migrates or (frames and frames[-1].name in ("_parse_ckpt_path", "load_model_state_dict")):
        return (
            "expected --ckpt_path to be a checkpoint of nsgd fit, got a file that cannot be read as one "
            f"({type(error).__name__}): it is damaged, or of another kind; give another"
        )
    return None


def _of_an_optimizer(error: Exception) -> str | None:
    """What torch's optimizers raise on purpose, such as "Invalid learning rate: -1.0"; not what befalls them."""
    frames = _frames(error)
    if not frames or Path(frames[-1].filename).parts[-3:-1] != ("torch", "optim"):
        return None
    if not isinstance(error, ValueError | RuntimeError) or not _on_purpose(frames[-1]):
        return None
    return f"the optimizer refuses an option: {error}; give another value, or another optimizer"


def _of_a_user(error: Exception) -> str | None:
    """Where a class or function of the user's ended, and with what."""
    for cause in _chain(error):
        frames = _frames(cause)
        if frames and _last_owner(frames) == "user":
            own = [frame for frame in frames if _owner(frame.filename) == "user"]
            places = (f"{frame.name} ({_near(frame.filename)}, line {frame.lineno})" for frame in reversed(own))
            return f"{_kind(cause)} in {', called from '.join(places)}; mend it there, or see what it was given"
        if frames and _owner(frames[-1].filename) == "ours":  # raised on what came before: it may be our fault
            return None
    return None


def _of_a_library(error: Exception) -> str | None:
    """What Lightning or torch cannot do with the options that were handed to them; or a path that cannot be used."""
    frames = _frames(error)
    last = next((Path(f.filename).name for f in reversed(frames) if _owner(f.filename) == "ours"), "")
    if isinstance(error, OSError) and error.filename is not None:
        of_the_path = isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError)
        of_the_path = of_the_path or error.errno in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
        if of_the_path or last in ("fit.py", "whole_files.py", "workers.py"):
            return (
                f"expected a path that can be read and written, got {error.filename} ({error.strerror}); give another"
            )
    if last != "fit.py" or _owner(frames[-1].filename) == "ours":
        return None  # classes of ours were at work: it may be a fault of theirs
    if Path(frames[-1].filename).parent.name == "jsonargparse":  # what the class raised that it tried to make
        *_, met = _chain(error)
        if isinstance(met, Exception) and _frames(met):
            error, frames = met, _frames(met)
    place = _module(frames[-1].filename)
    said = f"refuses it: {error}" if _on_purpose(frames[-1]) else f"ended with {_kind(error)}"
    return f"{place} {said}; give other options, nsgd fit --help all lists them"


def _on_purpose(frame: FrameSummary) -> bool:
    """Whether a frame raised, as against met, an exception."""
    return (frame.line or "").startswith("raise ")


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _frames(error: BaseException) -> list[FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _last_owner(frames: list[FrameSummary]) -> Owner:
    """Whose code was at work, or had a library at work for it."""
    owners = (_owner(frame.filename) for frame in reversed(frames))
    return next((owner for owner in owners if owner != "library"), "library")


@cache
def _packages() -> tuple[Path, ...]:
    import nsgd

    return Path(__file__).parents[1], Path(nsgd.__file__).parent


@cache
def _libraries() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(Path(folder) for folder in (*folders, *site.getsitepackages(), site.getusersitepackages()))


def _owner(filename: str) -> Owner:
    path = Path(filename)
    if any(path.is_relative_to(folder) for folder in _packages()):
        return "ours"
    made_up = filename.startswith("<")  # by Python, or by what writes code
    return "library" if made_up or any(path.is_relative_to(folder) for folder in _libraries()) else "user"


def _near(filename: str) -> str:
    """A path as short as it may be."""
    path, here = Path(filename), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _module(filename: str) -> str:
    """The module of a library that a file is."""
    path = Path(filename)
    inside = next((path.relative_to(folder) for folder in _libraries()[2:] if path.is_relative_to(folder)), path)
    return ".".join(inside.with_suffix("").parts)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _ours(error: Exception) -> ValueError | None:
    """The error that the project itself raised to say what is wrong with its input, however wrapped."""
    for cause in _chain(error):
        if not isinstance(cause, Exception):
            return None
        frames = _frames(cause)
        stripped = not frames  # libraries that try again drop the frames of what they met
        raised = not stripped and _owner(frames[-1].filename) == "ours" and _on_purpose(frames[-1])
        if isinstance(cause, ValueError) and (stripped or raised):
            return cause
    return None
