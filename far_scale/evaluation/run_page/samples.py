"""Sampled pictures and videos of a run, as data for the page and within a limit on its size."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from far_scale.evaluation.run_page.markup import Markup, join, tag

MEDIA_BYTES = 3_000_000
"""Of all pictures and videos of a page; base64 makes a third more of them."""
_MAX_PICTURES = 4
_PICTURE_BYTES = 300_000  # a larger PNG becomes a JPEG
_WIDTH, _OLDER_WIDTH = 1600, 900  # of a JPEG in pixels
_STEP = re.compile(r"step-(\d{8})")


class Samples(NamedTuple):
    """A folder with samples.png and samples.mp4, and what they show."""

    folder: Path
    title: str


def validation_samples(run: Path) -> list[Samples]:
    """The samples of a run's validations, newest first."""
    matches = [(_STEP.fullmatch(path.name), path) for path in (run / "validation").glob("step-*") if path.is_dir()]
    by_step = sorted(((int(match.group(1)), path) for match, path in matches if match), reverse=True)
    return [Samples(path, f"Validation after step {step:,}, sampled with the EMA") for step, path in by_step]


def samples_section(samples: Sequence[Samples]) -> Markup:
    """Contact sheets and the newest video; empty without samples.

    Args:
        samples: newest first; of more than fit, the first, the last and some in between are shown.
    """
    count = min(len(samples), _MAX_PICTURES)
    shown = [samples[round(index * (len(samples) - 1) / max(1, count - 1))] for index in range(count)]
    left, parts = MEDIA_BYTES, []
    for position, sample in enumerate(shown):
        pieces: list[Markup] = []
        names = ("samples.png", "samples.mp4") if position == 0 else ("samples.png",)
        for name in names:
            if not (sample.folder / name).is_file():
                continue
            if name.endswith("png"):
                data = _picture(sample.folder / name, _OLDER_WIDTH if position else _WIDTH)
            else:
                data = _video(sample.folder / name, left)
            if data is None or len(data) > left:
                pieces.append(tag("p", f"{name}: unreadable or too large for this page", class_="note"))
                continue
            left -= len(data)
            pieces.append(_element(data, sample.title))
        if pieces:
            heading = tag("h3", sample.title)
            older = tag("details", tag("summary", sample.title), *pieces)
            parts.append(join(heading, *pieces) if position == 0 else older)
    return join(*parts)


def _picture(path: Path, width: int) -> bytes | None:
    """A picture as it is, or a large one as a JPEG of at most `width` pixels a line; None where it cannot be read."""
    try:
        if path.stat().st_size <= _PICTURE_BYTES:
            with Image.open(path) as picture:
                picture.verify()
            return path.read_bytes()
        with Image.open(path) as picture:
            smaller = picture.convert("RGB")
        smaller.thumbnail((width, 8 * width))
        data = io.BytesIO()
        smaller.save(data, format="JPEG", quality=85)
        return data.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on damaged files
        return None


def _video(path: Path, limit: int) -> bytes | None:
    """A video that is not larger than `limit`."""
    return path.read_bytes() if path.stat().st_size <= limit else None


def _element(data: bytes, title: str) -> Markup:
    kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg" if data.startswith(b"\xff\xd8") else "video/mp4"
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    if kind == "video/mp4":
        return tag("video", src=source, controls="", loop="", muted="", playsinline="", preload="metadata")
    return tag("div", tag("img", src=source, alt=title, loading="lazy"), class_="scroll")
