"""The command in a locale that is not UTF-8: letters of paths and of what is printed."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def in_utf8() -> None:
    """Begin again in Python's UTF-8 mode, where the locale has no letters for the paths of a command line.

    Under ``LC_ALL=C`` with ``PYTHONUTF8=0`` a path beyond ASCII is a text that no file of options can hold. Beginning
    again takes as long as Python takes to start, and happens before anything is imported.
    """
    begun = os.environ.get("PYTHONUTF8") == "1"  # an option of Python itself may keep it from that mode
    if os.name != "posix" or begun or sys.getfilesystemencoding() == "utf-8":
        return
    sys.stdout.flush()
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def print_anything() -> None:
    """Have what a stream has no letters for printed as its number (``\\xb1``), as Python does on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")
