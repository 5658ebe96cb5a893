"""The structure of MP4 and MOV files: boxes with a size and a name, sample tables, fragments."""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Iterator

from far_scale.data.video.container_file import (
    MAX_REORDER,
    BinaryReader,
    CorruptFile,
    EditDurations,
    StreamInfo,
    TruncatedFile,
)

_CONTAINER_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf")
_TOP_LEVEL = frozenset(
    b"ftyp styp moov moof mdat imda mfra sidx ssix prft emsg free skip wide uuid meta udta pdin".split()
)  # box names of a fragmented file
_MAX_DEPTH = 16  # of nested boxes; files have 5
_MAX_PADDING = 1 << 24  # bytes of padding that are checked
_Box = tuple[int, int]
"""Start and end offset of the content of a box."""


def read_stream_info(file: BinaryReader, track: int) -> StreamInfo:
    """Read what the file declares about the track with this id.

    Raises:
        TruncatedFile: a box is longer than the file.
        CorruptFile: boxes or sample tables contradict each other.
    """
    boxes: dict[bytes, _Box] = {}  # of this track and of the movie
    outer = list(_top_level_boxes(file))
    inner = (box for name, start, end in outer if name in _CONTAINER_BOXES for box in _nested_boxes(file, start, end))
    names = Counter(name for name, _, _ in outer)
    current_track, fragment_samples, has_samples = 0, 0, False
    for name, start, end in inner:
        names[name] += 1
        if name == b"tkhd":
            current_track = file.read_uint(start + (20 if file.read(start, 1)[0] else 12), 4)
        elif name == b"tfhd":
            current_track = file.read_uint(start + 4, 4)
        has_samples = has_samples or (name in (b"stsz", b"stz2") and file.read_uint(start + 8, 4) > 0)
        if name == b"trun" and current_track == track:
            fragment_samples += file.read_uint(start + 4, 4)
        elif name == b"mvhd" or current_track == track:
            boxes.setdefault(name, (start, end))
    if not track or not names[b"moov"] or names[b"cmov"]:
        return StreamInfo()  # without moov: a still image; cmov: QuickTime's compressed tables
    if names[b"moof"]:
        _check_fragments(names, {name for name, _, _ in outer}, has_samples)
    if not {b"tkhd", b"mvhd", b"mdhd", b"stts", b"stsc"} <= boxes.keys() or not {b"stsz", b"stz2"} & boxes.keys():
        raise CorruptFile("a track without its tables")
    samples = _count_samples(file, boxes)
    edits = _read_edit_durations(file, boxes) if samples and not fragment_samples else None
    return StreamInfo(fragment_samples + samples, edits)


def _read_header(file: BinaryReader, offset: int, end: int) -> tuple[bytes, int, int]:
    """Read a box header: its name, the start and the end of its content (end 0 for an invalid size)."""
    size, name = struct.unpack(">I4s", file.read(offset, 8))
    start = offset + 8
    if size == 1:
        size, start = file.read_uint(start, 8), start + 8
    elif size == 0 and name != bytes(4):
        size = end - offset
    return name, start, offset + size if size >= start - offset else 0


def _top_level_boxes(file: BinaryReader) -> Iterator[tuple[bytes, int, int]]:
    """The boxes at the top level; foreign data after them is one box without a name."""
    offset = 0
    while file.size - offset >= 8:
        name, start, end = _read_header(file, offset, file.size)
        if end > file.size and name in _TOP_LEVEL:
            raise TruncatedFile
        if not offset < end <= file.size:
            if any(file.read(offset, min(file.size - offset, _MAX_PADDING))):
                yield b"", file.size, file.size
            return
        yield name, start, end
        offset = end


def _nested_boxes(file: BinaryReader, offset: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """The boxes between two offsets and, recursively, those inside them, in file order."""
    if depth > _MAX_DEPTH:
        raise CorruptFile("boxes are nested too deeply")
    while end - offset >= 8:
        name, start, box_end = _read_header(file, offset, end)
        if not box_end and not any(file.read(offset, min(end - offset, _MAX_PADDING))):
            return
        if not offset < box_end <= end:
            raise CorruptFile("a box that does not fit into its parent")
        yield name, start, box_end
        if name in _CONTAINER_BOXES:
            yield from _nested_boxes(file, start, box_end, depth + 1)
        offset = box_end


def _check_fragments(names: Counter[bytes], outer: set[bytes], has_samples: bool) -> None:
    """Check that all parts of fragments are present: a box with a damaged name would be skipped.

    Args:
        has_samples: whether the movie's own tables have samples; their data is stored before the fragments.

    Raises:
        CorruptFile: a fragment has no samples, data has no fragment, or there is an unknown box at the top level.
    """
    is_complete = (
        names[b"moof"] >= names[b"mdat"] - has_samples
        and names[b"moof"] <= names[b"traf"] == names[b"tfhd"] <= names[b"trun"]
    )
    if not is_complete or not outer <= _TOP_LEVEL:
        raise CorruptFile("unknown data where a box is expected")


def _count_samples(file: BinaryReader, boxes: dict[bytes, _Box]) -> int:
    """Count the samples; the tables of sizes, times and chunks must agree."""
    start, end = boxes.get(b"stsz") or boxes[b"stz2"]
    size, count = struct.unpack(">II", file.read(start + 4, 8))
    bits = (0 if size else 32) if b"stsz" in boxes else size & 0xFF
    if start + 12 + count * bits // 8 > end:
        raise CorruptFile("a table longer than its box")
    chunk_table = boxes.get(b"stco") or boxes.get(b"co64")
    chunks = file.read_uint(chunk_table[0] + 4, 4) if chunk_table else 0
    runs = _read_table(file, boxes[b"stsc"], ">III")
    ends = [first for first, _, _ in runs[1:]] + [chunks + 1]
    in_chunks = sum((end - first) * samples for (first, samples, _), end in zip(runs, ends, strict=False))
    in_times = sum(number for number, _ in _read_table(file, boxes[b"stts"], ">II"))
    if not count == in_times == in_chunks:
        raise CorruptFile(f"tables of {count}, {in_times} and {in_chunks} samples")
    return int(count)


def _read_edit_durations(file: BinaryReader, boxes: dict[bytes, _Box]) -> EditDurations:
    media_scale, media = _read_timescale(file, boxes[b"mdhd"][0])
    movie_scale, _ = _read_timescale(file, boxes[b"mvhd"][0])
    start = boxes[b"tkhd"][0]
    track = file.read_uint(start + 28, 8) if file.read(start, 1)[0] else file.read_uint(start + 20, 4)
    times = _read_table(file, boxes[b"stts"], ">II")
    samples = sum(count * duration for count, duration in times)
    presented = None
    if b"elst" in boxes:
        is_64_bit = file.read(boxes[b"elst"][0], 1)[0]
        edits = _read_table(file, boxes[b"elst"], ">QqI" if is_64_bit else ">IiI")
        track -= sum(duration for duration, media_time, _ in edits if media_time < 0)  # empty edits: a start delay
        presented = sum(duration for duration, media_time, _ in edits if media_time >= 0) / movie_scale
    offsets: list[tuple[int, ...]] = [(count, 0) for count, _ in times]
    if b"ctts" in boxes:
        offsets = _read_table(file, boxes[b"ctts"], ">Ii")
    return EditDurations(
        media=media / media_scale,
        samples=samples / media_scale,
        last_end=_last_end(samples, times, offsets) / media_scale,
        track=track / movie_scale,
        presented=presented,
        offsets_agree=sum(count for count, _ in offsets) == sum(count for count, _ in times),
    )


def _last_end(samples: int, times: list[tuple[int, ...]], offsets: list[tuple[int, ...]]) -> int:
    """End time of the sample that is presented last; it may be stored before the last sample."""

    def backwards(runs: list[tuple[int, ...]]) -> Iterator[int]:
        for count, value in reversed(runs):
            yield from itertools.repeat(value, count)

    latest, end = samples, samples
    for duration, offset in itertools.islice(zip(backwards(times), backwards(offsets), strict=False), MAX_REORDER):
        latest, end = max(latest, end + offset), end - duration
    return latest


def _read_timescale(file: BinaryReader, start: int) -> tuple[int, int]:
    """Read the time scale (ticks per second) and the duration from a movie or media header."""
    is_64_bit = file.read(start, 1)[0]
    scale = file.read_uint(start + (20 if is_64_bit else 12), 4)
    if not scale:
        raise CorruptFile("a time scale of 0")
    return scale, file.read_uint(start + 24, 8) if is_64_bit else file.read_uint(start + 16, 4)


def _read_table(file: BinaryReader, box: _Box, row: str) -> list[tuple[int, ...]]:
    """Read the rows of a table that starts with flags and the row count."""
    count = file.read_uint(box[0] + 4, 4)
    if box[0] + 8 + count * struct.calcsize(row) > box[1]:
        raise CorruptFile("a table longer than its box")
    return list(struct.iter_unpack(row, file.read(box[0] + 8, count * struct.calcsize(row))))
