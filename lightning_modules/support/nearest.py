"""What a misspelt name was meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The known name that another comes nearest to, as a question; empty where none comes near.

    Args:
        name: As it was typed; capitals count for nothing.
        known: Names that there are.
        prefix: What is written before the name that is meant.
    """
    by_small = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), by_small, n=1, cutoff=0.65)
    return f"did you mean {prefix}{by_small[near[0]]}?" if near else ""


def meant(name: str, known: Iterable[str]) -> str:
    """The same as the end of a sentence; empty where none comes near."""
    question = did_you_mean(name, known)
    return f"; {question}" if question else ""
