"""The frame count of a clip (a number, a range or a distribution), and its token count."""

from __future__ import annotations

import bisect
import itertools
import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from numpy.random import Generator


def _parse(value: Any) -> Any:
    """`value` as an int, a (low, high) pair, or {length: weight}; keys may be text, as in JSON."""
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n >= 1 for n in value):
        low, high = value
        if low > high:
            raise PydanticCustomError("frames", "must rise from the fewest frames to the most")
        return (low, high)
    if isinstance(value, dict) and value:
        lengths = {int(key) if isinstance(key, str) and key.isdecimal() else key: v for key, v in value.items()}
        weights = lengths.values()
        has_valid_lengths = all(type(length) is int and length >= 1 for length in lengths)
        if has_valid_lengths and all(type(w) in (int, float) and w > 0 and math.isfinite(w) for w in weights):
            return {length: float(lengths[length]) for length in sorted(lengths)}
    raise PydanticCustomError(
        "frames",
        "must be a number of frames, a range [fewest, most] or a distribution {{frames: weight above 0, ...}}",
    )


FrameCounts = Annotated[int | tuple[int, int] | dict[int, float], BeforeValidator(_parse)]
"""A clip's frames: a fixed number, or uniform on a range (both ends included), or drawn by weights."""


def min_frames(frames: FrameCounts) -> int:
    """The fewest frames that can be drawn."""
    return frames if isinstance(frames, int) else min(frames)


def max_frames(frames: FrameCounts) -> int:
    """The most frames that can be drawn."""
    return frames if isinstance(frames, int) else max(frames)


def draw_frames(frames: FrameCounts, generator: Generator) -> int:
    """Draw a frame count; a fixed number takes nothing from `generator`."""
    if isinstance(frames, int):
        return frames
    if isinstance(frames, tuple):
        return int(generator.integers(frames[0], frames[1], endpoint=True))
    sums = list(itertools.accumulate(frames.values()))
    return list(frames)[min(bisect.bisect_right(sums, generator.random() * sums[-1]), len(sums) - 1)]


def clip_tokens(frames: int, window: int, patch: int, context_patch: int, height: int, width: int) -> int:
    """Tokens of a clip: the last `window` frames in patches of `patch`, earlier ones in patches of `context_patch`.

    `height` and `width` are the latent's; without context (`context_patch` 0) all frames must be in the window.
    """
    tokens = min(frames, window) * (height // patch) * (width // patch)
    if frames > window:
        tokens += (frames - window) * (height // context_patch) * (width // context_patch)
    return tokens
