"""The structure of MP4 and MOV files: boxes of a size and a name, tables of samples, fragments."""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Iterator

from far_scale.data.video.container_file import MOST_BEHIND, Cut, Damaged, Edits, File, Said

_HOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf")
_OUTER = frozenset(
    b"ftyp styp moov moof mdat imda mfra sidx ssix prft emsg free skip wide uuid meta udta pdin".split()
)  # of a file of fragments
_DEEPEST = 16  # boxes in boxes; there are 5
_MOST_PADDING = 1 << 24  # bytes that are looked at
_Box = tuple[int, int]
"""Where the content of a box begins and where it ends."""


def read(file: File, track: int) -> Said:
    """What the file says of the track with this id.

    Raises:
        Cut: a box is longer than the file.
        Damaged: boxes or tables of samples contradict each other.
    """
    boxes: dict[bytes, _Box] = {}  # of this track, and of the film
    outer = list(_outer_boxes(file))
    inner = (box for name, start, stop in outer if name in _HOLDERS for box in _tree(file, start, stop))
    names = Counter(name for name, _, _ in outer)
    current, fragments, begun = 0, 0, False
    for name, start, stop in inner:
        names[name] += 1
        if name == b"tkhd":
            current = file.number(start + (20 if file.at(start, 1)[0] else 12), 4)
        elif name == b"tfhd":
            current = file.number(start + 4, 4)
        begun = begun or (name in (b"stsz", b"stz2") and file.number(start + 8, 4) > 0)
        if name == b"trun" and current == track:
            fragments += file.number(start + 4, 4)
        elif name == b"mvhd" or current == track:
            boxes.setdefault(name, (start, stop))
    if not track or not names[b"moov"] or names[b"cmov"]:
        return Said()  # the last two: pictures without a film, and QuickTime's compressed tables
    if names[b"moof"]:
        _check_fragments(names, {name for name, _, _ in outer}, begun)
    if not {b"tkhd", b"mvhd", b"mdhd", b"stts", b"stsc"} <= boxes.keys() or not {b"stsz", b"stz2"} & boxes.keys():
        raise Damaged("a track without its tables")
    samples = _samples(file, boxes)
    return Said(fragments + samples, _edits(file, boxes) if samples and not fragments else None)


def _header(file: File, place: int, end: int) -> tuple[bytes, int, int]:
    """The box there: its name, where its content begins, and where it ends (0: its size is none)."""
    size, name = struct.unpack(">I4s", file.at(place, 8))
    start = place + 8
    if size == 1:
        size, start = file.number(start, 8), start + 8
    elif size == 0 and name != bytes(4):
        size = end - place
    return name, start, place + size if size >= start - place else 0


def _outer_boxes(file: File) -> Iterator[tuple[bytes, int, int]]:
    """The boxes that the file is made of; one without a name for something else, put behind them."""
    place = 0
    while file.size - place >= 8:
        name, start, stop = _header(file, place, file.size)
        if stop > file.size and name in _OUTER:
            raise Cut
        if not place < stop <= file.size:
            if any(file.at(place, min(file.size - place, _MOST_PADDING))):
                yield b"", file.size, file.size
            return
        yield name, start, stop
        place = stop


def _tree(file: File, place: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """The boxes between two places of a box and those in them, in the order of the file."""
    if depth > _DEEPEST:
        raise Damaged("boxes in boxes in boxes")
    while end - place >= 8:
        name, start, stop = _header(file, place, end)
        if not stop and not any(file.at(place, min(end - place, _MOST_PADDING))):
            return
        if not place < stop <= end:
            raise Damaged("a box that does not fit into the one that holds it")
        yield name, start, stop
        if name in _HOLDERS:
            yield from _tree(file, start, stop, depth + 1)
        place = stop


def _check_fragments(names: Counter[bytes], outer: set[bytes], begun: bool) -> None:
    """A box whose name is damaged is passed over: see that all parts of fragments are there.

    Args:
        begun: the tables of the whole film have samples, whose data stand before the fragments.

    Raises:
        Damaged: a fragment has no samples, data have no fragment, or there is an unknown box beside them.
    """
    whole = (
        names[b"moof"] >= names[b"mdat"] - begun
        and names[b"moof"] <= names[b"traf"] == names[b"tfhd"] <= names[b"trun"]
    )
    if not whole or not outer <= _OUTER:
        raise Damaged("something else where a box must be")


def _samples(file: File, boxes: dict[bytes, _Box]) -> int:
    """How many samples there are, which the tables of sizes, times and chunks must agree on."""
    start, stop = boxes.get(b"stsz") or boxes[b"stz2"]
    size, count = struct.unpack(">II", file.at(start + 4, 8))
    bits = (0 if size else 32) if b"stsz" in boxes else size & 0xFF
    if start + 12 + count * bits // 8 > stop:
        raise Damaged("a table longer than its box")
    chunk_table = boxes.get(b"stco") or boxes.get(b"co64")
    chunks = file.number(chunk_table[0] + 4, 4) if chunk_table else 0
    runs = _rows(file, boxes[b"stsc"], ">III")
    ends = [first for first, _, _ in runs[1:]] + [chunks + 1]
    in_chunks = sum((end - first) * samples for (first, samples, _), end in zip(runs, ends, strict=False))
    in_times = sum(number for number, _ in _rows(file, boxes[b"stts"], ">II"))
    if not count == in_times == in_chunks:
        raise Damaged(f"tables of {count}, {in_times} and {in_chunks} samples")
    return int(count)


def _edits(file: File, boxes: dict[bytes, _Box]) -> Edits:
    media_scale, media = _times(file, boxes[b"mdhd"][0])
    film_scale, _ = _times(file, boxes[b"mvhd"][0])
    start = boxes[b"tkhd"][0]
    track = file.number(start + 28, 8) if file.at(start, 1)[0] else file.number(start + 20, 4)
    times = _rows(file, boxes[b"stts"], ">II")
    samples = sum(count * duration for count, duration in times)
    shown = None
    if b"elst" in boxes:
        wide = file.at(boxes[b"elst"][0], 1)[0]
        edits = _rows(file, boxes[b"elst"], ">QqI" if wide else ">IiI")
        track -= sum(duration for duration, first, _ in edits if first < 0)  # before the first picture
        shown = sum(duration for duration, first, _ in edits if first >= 0) / film_scale
    offsets: list[tuple[int, ...]] = [(count, 0) for count, _ in times]
    if b"ctts" in boxes:
        offsets = _rows(file, boxes[b"ctts"], ">Ii")
    agree = sum(count for count, _ in offsets) == sum(count for count, _ in times)
    return Edits(
        media / media_scale,
        samples / media_scale,
        _last_end(samples, times, offsets) / media_scale,
        track / film_scale,
        shown,
        agree,
    )


def _last_end(samples: int, times: list[tuple[int, ...]], offsets: list[tuple[int, ...]]) -> int:
    """When the sample that is shown last ends: it may be stored before the last one."""

    def backwards(runs: list[tuple[int, ...]]) -> Iterator[int]:
        for count, value in reversed(runs):
            yield from itertools.repeat(value, count)

    latest, end = samples, samples
    for duration, offset in itertools.islice(zip(backwards(times), backwards(offsets), strict=False), MOST_BEHIND):
        latest, end = max(latest, end + offset), end - duration
    return latest


def _times(file: File, start: int) -> tuple[int, int]:
    """Time scale (ticks a second) and duration, of the header of the film or of a track's media."""
    wide = file.at(start, 1)[0]
    scale = file.number(start + (20 if wide else 12), 4)
    if not scale:
        raise Damaged("a time scale of 0")
    return scale, file.number(start + 24, 8) if wide else file.number(start + 16, 4)


def _rows(file: File, box: _Box, row: str) -> list[tuple[int, ...]]:
    """The rows of a table that begins with flags and their number."""
    count = file.number(box[0] + 4, 4)
    if box[0] + 8 + count * struct.calcsize(row) > box[1]:
        raise Damaged("a table longer than its box")
    return list(struct.iter_unpack(row, file.at(box[0] + 8, count * struct.calcsize(row))))
