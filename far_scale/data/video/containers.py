"""Whether the file of a video is whole, by what its container says of sizes and counts.

FFmpeg reads what it finds: of a file that is cut off, or whose structure is damaged, it gives the frames that are left,
often without an error. So the structure is read here too; nothing is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from far_scale.data.video import matroska, mp4
from far_scale.data.video.container_file import Cut, Damaged, File, Said
from far_scale.utils.errors import UserError

_MAY_BE_MISSING = 2  # frames: some programs that write AVI count one too many, or one that repeats the last
_DEEPEST = 8  # lists in lists of an AVI; there are 3
_AFTER_END = 64  # bytes of anything that may follow the end of a GIF
_NUT_INDEX = b"NX\xdd\x67\x2f\x23\xe6\x4e"
_UNKNOWN = 0xFFFFFFFF  # size of an AVI that was written to a pipe, and of its list of frames


class BadVideo(UserError):
    """A file whose content cannot be used; that the disk or the network cannot be read is not one of these."""


def check_container(path: Path, name: str, stream: int, track: int) -> Said:
    """Go through the structure of a file, and return what it says of one stream.

    Args:
        name: of the container's format, as FFmpeg has it.
        stream: the stream's index; -1 for none.
        track: its id in MP4 and MOV files; 0 for none.

    Raises:
        BadVideo: the file is cut off or damaged.
        UserError: it cannot be read.
    """
    if name not in _READERS:
        return Said()
    try:
        with open(path, "rb") as opened:
            return _READERS[name](File(opened), track if name == _MP4 else stream)
    except Cut:
        raise BadVideo(f"{path}: cut off: the file is shorter than it says; copy it again, or leave it out") from None
    except Damaged as error:
        raise BadVideo(f"{path}: damaged: {error}; copy it again, or leave it out") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def check_mp4(path: Path) -> None:
    """Find out whether a file that cannot be opened is an MP4 or MOV that is cut off: the tables may be at its end.

    Raises:
        BadVideo: it is.
    """
    with open(path, "rb") as file:
        if file.read(8)[4:] == b"ftyp":
            check_container(path, _MP4, -1, 0)


def check_readable(path: Path) -> None:
    """Find out whether it is the disk or the network that is broken: a file that cannot be read now may be whole.

    Raises:
        UserError: the file's bytes cannot be read.
    """
    try:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); fix that and run again")


def _avi(file: File, stream: int) -> Said:
    """Chunks of a name and a size, in lists; the frames of stream 0 are in chunks 00dc or 00db."""
    lengths: list[int] = []
    prefix = b"%02d" % stream
    riffs = found = empty = indexed = 0
    piped, stop = file.at(4, 4) == _UNKNOWN.to_bytes(4, "little"), 0
    for name, start, stop in _riffs(file):
        if name == b"RIFF":
            riffs += 1
        elif name == b"strh":
            lengths.append(int.from_bytes(file.at(start + 32, 4), "little"))
        elif name == b"idx1":
            rows = file.at(start, stop - start)
            indexed += sum(
                rows[at : at + 2] == prefix and rows[at + 2 : at + 4] != b"pc" for at in range(0, len(rows), 16)
            )
        elif name[:2] == prefix and name[2:] != b"pc":  # a palette is no frame
            found += 1
            empty += start == stop  # the frame before is repeated
    if stream < 0 or not riffs:
        return Said()
    if piped and stop + stop % 2 < file.size:  # the last chunk ends; a part of a name and a size is left
        raise Cut
    if stream >= len(lengths):
        raise Damaged("a stream without its header")
    if piped:  # its length is none, either
        lengths[stream] = 0
    if indexed > found or lengths[stream] > found + _MAY_BE_MISSING:
        raise Damaged(f"{max(indexed, lengths[stream]) - found} of its frames are missing")
    if indexed and indexed < found and riffs == 1:  # the parts of a large file have other indexes
        raise Damaged(f"{found - indexed} frames that its index does not have")
    return Said(found - empty if found else None)


def _riffs(file: File) -> Iterator[tuple[bytes, int, int]]:
    """The files in the file, and all their chunks that are no lists: name, and where the content begins and ends."""
    place = 0
    while file.size - place >= 12:
        name, size = struct.unpack("<4sI", file.at(place, 8))
        if name != b"RIFF" or not size:
            return  # something else, put behind the film; or a recording that was not ended, which says nothing
        if size == _UNKNOWN:
            size = file.size - place - 8
        if place + size > file.size:  # without the header of 8 bytes: some programs count it
            raise Cut
        end = min(place + 8 + size, file.size)
        yield name, place + 12, end
        yield from _chunks(file, place + 12, end)
        place = end + size % 2


def _chunks(file: File, place: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    if depth > _DEEPEST:
        raise Damaged("lists in lists in lists")
    while end - place >= 8:
        name, size = struct.unpack("<4sI", file.at(place, 8))
        if not name.isascii() or not name.decode().isprintable():
            raise Damaged("something else where a chunk must be")
        start, stop = place + 8, place + 8 + size
        if size == _UNKNOWN and name == b"LIST" and end == file.size:
            stop = end
        if stop > end:
            if end == file.size:
                raise Cut
            raise Damaged("a chunk longer than the list that holds it")
        if name == b"LIST":
            if file.at(start, 4) in (b"hdrl", b"strl", b"movi", b"rec "):
                yield from _chunks(file, start + 4, stop, depth + 1)
        else:
            yield name, start, stop
        place = stop + size % 2


def _gif(file: File, stream: int) -> Said:
    """Blocks: extensions and pictures, each with parts of up to 255 bytes behind it, and an end."""
    pictures, place = 0, 13 + _palette(file.at(10, 1)[0])
    while (kind := file.at(place, 1)) != b";":
        if kind == b"!":
            place += 2
        elif kind == b",":
            pictures += 1
            across, down, flags = struct.unpack("<HHB", file.at(place + 5, 5))
            place += 10 + _palette(flags)
            bits = file.at(place, 1)[0]
            place += 1
        else:
            raise Damaged("something else where a block must be")
        parts = []
        while length := file.at(place, 1)[0]:
            parts.append((place + 1, length))
            place += 1 + length
        place += 1
        # parts are equally long but for the last one, or else damage may have joined one picture to the next
        if kind == b"," and len({length for _, length in parts[:-1]}) > 1:
            _check_lzw(b"".join(file.at(*part) for part in parts), bits, across * down)
    if len(file.at(place + 1, file.size - place - 1).rstrip(b"\0")) > _AFTER_END:
        raise Damaged("it goes on after its end")
    return Said(pictures)


def _check_lzw(data: bytes, bits: int, pixels: int) -> None:
    """See that the codes of a picture make just its pixels; the slowness of this is no matter, so rare is it.

    Raises:
        Damaged: they make more or fewer, or end long before their data.
    """
    if not 1 <= bits <= 11:
        raise Damaged("a picture with codes of no size")
    clear, end = 1 << bits, (1 << bits) + 1
    lengths: list[int] = []  # of what a code stands for
    waiting, held, width, before, made, at = 0, 0, bits + 1, 0, 0, 0
    while True:
        while held < width and at < len(data):
            waiting, held, at = waiting | data[at] << held, held + 8, at + 1
        if held < width:
            break
        code, waiting, held = waiting & (1 << width) - 1, waiting >> width, held - width
        if code == end:
            break
        if code == clear or not lengths:
            lengths, width, before = [1] * clear + [0, 0], bits + 1, 0
            if code == clear:
                continue
        if before and len(lengths) < 1 << 12:
            lengths.append(before + 1)
            width = max(width, min(12, len(lengths).bit_length()))
        if code >= len(lengths):
            break
        before = lengths[code]
        made += before
    if made != pixels or len(data) - at > 4:  # some encoders write a byte too many
        raise Damaged("a picture with more or fewer pixels than it must have")


def _palette(flags: int) -> int:
    """The bytes of a palette that these flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _flv(file: File, stream: int) -> Said:
    """Tags of a kind, 3 bytes of size, 7 of time and stream, content, and 4 of size once more."""
    place = file.number(5, 4) + 4
    while place < file.size:
        if file.at(place, 1)[0] & 0x1F not in (8, 9, 18):  # sound, pictures, what is said of them
            raise Damaged("something else where a tag must be")
        size = 11 + file.number(place + 1, 3)
        if place + size > file.size:
            raise Cut
        place += size + 4
    return Said()


def _asf(file: File, stream: int) -> Said:
    """Objects (WMV): 16 bytes that name it, 8 of size."""
    place = 0
    while file.size - place >= 24:
        size = int.from_bytes(file.at(place + 16, 8), "little")
        if size < 24:
            break  # live, or something else behind the film
        if place + size > file.size:
            raise Cut
        place += size
    return Said()


def _ts(file: File, stream: int) -> Said:
    """Packets of 188 bytes, or of 192 with a time before each (M2TS): no size of the whole is said."""
    size = 188 if file.at(0, 1) == b"G" else 192
    if file.at(0 if size == 188 else 4, 1) == b"G" and file.size % size:
        raise Cut
    return Said()


def _ogg(file: File, stream: int) -> Said:
    """Pages; the last one of each of its streams is marked."""
    place, open_streams = 0, set[bytes]()
    while file.size - place >= 27 and file.at(place, 4) == b"OggS":
        flags, serial, parts = file.at(place + 5, 1)[0], file.at(place + 14, 4), file.at(place + 26, 1)[0]
        open_streams.add(serial)
        if flags & 4:
            open_streams.discard(serial)
        place += 27 + parts + sum(file.at(place + 27, parts))
    if open_streams or place > file.size:
        raise Cut
    return Said()


def _ivf(file: File, stream: int) -> Said:
    """A header that says its size, and frames: 4 bytes of size, 8 of time, content."""
    place = int.from_bytes(file.at(6, 2), "little")
    while place < file.size:
        place += 12 + int.from_bytes(file.at(place, 12)[:4], "little")
    if place > file.size:
        raise Cut
    return Said()


def _nut(file: File, stream: int) -> Said:
    """An index is the last packet; it ends with how long it is, and a checksum."""
    if file.at(file.size - file.number(file.size - 12, 8), 8) != _NUT_INDEX:
        raise Cut
    return Said()


_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
_READERS: dict[str, Callable[[File, int], Said]] = {
    _MP4: mp4.read,
    "matroska,webm": matroska.read,
    "avi": _avi,
    "gif": _gif,
    "flv": _flv,
    "asf": _asf,
    "mpegts": _ts,
    "ogg": _ogg,
    "ivf": _ivf,
    "nut": _nut,
}
