"""Files that are there whole or not at all, also after a loss of power, a full disk or a kill."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

try:
    import fcntl
except ImportError:  # not on Windows, where what is left over stays
    fcntl = None  # type: ignore[assignment]

_LEFT_OVER = re.compile(r".+\.[0-9a-f]+\.partial")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class CannotWrite(OSError):
    """A file or folder of ours cannot be written, which no run has a part in: all others would meet it too."""


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whatever the locale."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, in place of one that is there, and make the folder of it.

    Raises:
        CannotWrite: Of the path; what was there stays.
    """
    write_with(path, lambda file: file.write(content))


def write_with(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """The same for what writes into an open file by itself, such as ``torch.save``: nothing is held twice.

    Raises:
        CannotWrite: Of the path; what was there stays.
    """
    with _partial(path, write) as partial:
        partial.replace(path)


def write_bytes_once(path: Path, content: bytes) -> None:
    """The same, but that a file which is there already stays: of several processes the first one's.

    Raises:
        CannotWrite: Of the path.
    """
    with _partial(path, lambda file: file.write(content)) as partial:
        try:
            path.hardlink_to(partial)
        except FileExistsError:
            pass
        except OSError:  # a file system without links: the last one wins
            partial.replace(path)


@contextmanager
def _partial(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """A file beside the one to write, with a name of its own: several processes may write the same one."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, number = _locked(path)
        try:
            with os.fdopen(number, "wb", closefd=False) as file:
                write(file)
            os.fsync(number)
            yield partial
            _keep(path.parent)
        finally:
            os.close(number)
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror, str(path)) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _locked(path: Path) -> tuple[Path, int]:
    """A new file that is locked while this process lives, so that no other takes it for left over."""
    while True:
        partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks, where what is left over stays
                fcntl.flock(number, fcntl.LOCK_EX)
        if partial.exists():
            return partial, number
        os.close(number)  # taken away before it was locked


def _keep(folder: Path) -> None:
    """Have the names of a folder reach the disk, where the system lets them."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system that cannot: the file itself is safe
                os.fsync(number)
        finally:
            os.close(number)


def remove_left_overs(folder: Path) -> None:
    """Remove what killed processes were writing in a folder and those below it, but nothing that is still written."""
    if fcntl is None:
        return
    for path in folder.rglob("*.partial"):
        if not _LEFT_OVER.fullmatch(path.name):
            continue
        try:
            number = os.open(path, os.O_RDONLY)
        except OSError:  # gone, or not ours to open
            continue
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:  # it is being written, or not ours to remove
            pass
        finally:
            os.close(number)


def no_room(error: BaseException | None) -> OSError | None:
    """What says that a disk is full or fails, of an error and what it came from: a run has no part in that."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return cause
        if isinstance(cause, RuntimeError) and "PytorchStreamWriter failed writing file" in str(cause):
            return OSError(errno.ENOSPC, str(cause))
    return None


def unwritable(error: BaseException | None) -> OSError | None:
    """The same, or what says that a folder of ours is read-only or forbidden."""
    return no_room(error) or next((cause for cause in _chain(error) if isinstance(cause, CannotWrite)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
