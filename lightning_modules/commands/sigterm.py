"""SIGTERM: raised where it is met, and remembered, since Python drops what is raised in a destructor."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

_P = ParamSpec("_P")

CODE = 128 + signal.SIGTERM

_met = threading.Event()  # since the command began


class Terminated(SystemExit):
    """Raised by SIGTERM: whatever is under way is closed as after any other exit, and the runs of a study end."""


def raise_if_met() -> None:
    """Raise what was dropped where SIGTERM was met, if it was.

    Raises:
        Terminated: After SIGTERM.
    """
    if _met.is_set():
        raise Terminated(CODE)


def watched(update: Callable[_P, None]) -> Callable[_P, None]:
    """What reports progress, ending the command there after SIGTERM."""

    def watching(*args: _P.args, **kwargs: _P.kwargs) -> None:
        raise_if_met()
        update(*args, **kwargs)

    return watching


@contextmanager
def raising_at_sigterm() -> Iterator[None]:
    """Have SIGTERM raise, where Python would end at once and leave the processes that it started.

    Raises:
        Terminated: After SIGTERM, however what runs inside has ended.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if not _met.is_set():  # a second one does not disturb the end
            _met.set()
            raise Terminated(CODE)

    _met.clear()
    before = signal.signal(signal.SIGTERM, end)
    try:
        try:
            yield
        except Terminated:
            raise
        except BaseException as error:  # such as Lightning's own exit
            if _met.is_set():
                raise Terminated(CODE) from error
            raise
        raise_if_met()
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        _met.clear()
