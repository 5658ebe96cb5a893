"""Types of command-line arguments, as argparse's `type` takes them."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of whole numbers from `minimum` on."""

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return number
