"""Checks whether a video file is complete, by the sizes and counts in its container.

FFmpeg returns whatever frames it finds in a truncated or damaged file, often without an error. So the container's
structure is parsed here as well; nothing is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from far_scale.data.video import matroska, mp4
from far_scale.data.video.container_file import BinaryReader, CorruptFile, StreamInfo, TruncatedFile
from far_scale.data.video.find import unreadable_file
from far_scale.utils.errors import UserError

_AVI_FRAME_TOLERANCE = 2  # some programs count one frame too many, or one that repeats the last
_MAX_AVI_DEPTH = 8  # of nested lists; files have 3
_MAX_GIF_TRAILER = 64  # bytes after the end of a GIF
_NUT_INDEX = b"NX\xdd\x67\x2f\x23\xe6\x4e"
_UNKNOWN_SIZE = 0xFFFFFFFF  # of an AVI that was written to a pipe, and of its list of frames


class BadVideo(UserError):
    """The content of a file cannot be used. A disk or network that cannot be read is another error."""


def check_container(path: Path, name: str, stream: int, track: int) -> StreamInfo:
    """Check the structure of a file and return what it declares about one stream.

    Args:
        name: FFmpeg's name of the container format.
        stream: index of the stream; -1 for none.
        track: its id in MP4 and MOV files; 0 for none.

    Raises:
        BadVideo: the file is truncated or damaged.
        UserError: it cannot be read.
    """
    if name not in _PARSERS:
        return StreamInfo()
    try:
        with open(path, "rb") as opened:
            return _PARSERS[name](BinaryReader(opened), track if name == _MP4 else stream)
    except TruncatedFile:
        raise BadVideo(f"{path}: cut off: the file is shorter than it says; copy it again, or leave it out") from None
    except CorruptFile as error:
        raise BadVideo(f"{path}: damaged: {error}; copy it again, or leave it out") from None
    except OSError as error:
        raise unreadable_file(path, error) from None


def check_mp4(path: Path) -> None:
    """Check a file that cannot be opened for a truncated MP4 or MOV, which may have lost the tables at its end.

    Raises:
        BadVideo: it is one.
    """
    with open(path, "rb") as file:
        if file.read(8)[4:] == b"ftyp":
            check_container(path, _MP4, -1, 0)


def check_readable(path: Path) -> None:
    """Read a whole file, to tell a broken disk or network from broken content.

    Raises:
        UserError: the bytes of the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    except OSError as error:
        raise unreadable_file(path, error) from None


def _parse_avi(file: BinaryReader, stream: int) -> StreamInfo:
    """Chunks with a name and a size, nested in lists; the frames of stream 0 are in chunks 00dc or 00db."""
    lengths: list[int] = []
    prefix = b"%02d" % stream
    riffs = frames = empty_frames = indexed = 0
    is_piped, end = file.read(4, 4) == _UNKNOWN_SIZE.to_bytes(4, "little"), 0
    for name, start, end in _riff_chunks(file):
        if name == b"RIFF":
            riffs += 1
        elif name == b"strh":
            lengths.append(file.read_uint_le(start + 32, 4))
        elif name == b"idx1":
            rows = file.read(start, end - start)
            indexed += sum(rows[i : i + 2] == prefix and rows[i + 2 : i + 4] != b"pc" for i in range(0, len(rows), 16))
        elif name[:2] == prefix and name[2:] != b"pc":  # pc: a palette change, no frame
            frames += 1
            empty_frames += start == end  # repeats the previous frame
    if stream < 0 or not riffs:
        return StreamInfo()
    if is_piped and end + end % 2 < file.size:  # ends with part of a chunk header
        raise TruncatedFile
    if stream >= len(lengths):
        raise CorruptFile("a stream without its header")
    if is_piped:  # the header has no length either
        lengths[stream] = 0
    if indexed > frames or lengths[stream] > frames + _AVI_FRAME_TOLERANCE:
        raise CorruptFile(f"{max(indexed, lengths[stream]) - frames} of its frames are missing")
    if indexed and indexed < frames and riffs == 1:  # further RIFF chunks of a large file have other indexes
        raise CorruptFile(f"{frames - indexed} frames that its index does not have")
    return StreamInfo(frames - empty_frames if frames else None)


def _riff_chunks(file: BinaryReader) -> Iterator[tuple[bytes, int, int]]:
    """The RIFF chunks and all chunks in them that are not lists: name, start and end of the content."""
    offset = 0
    while file.size - offset >= 12:
        name, size = struct.unpack("<4sI", file.read(offset, 8))
        if name != b"RIFF" or not size:
            return  # foreign data appended to the file, or an unfinished recording, which declares no size
        if size == _UNKNOWN_SIZE:
            size = file.size - offset - 8
        if offset + size > file.size:  # without the 8 bytes of the header: some programs count them
            raise TruncatedFile
        end = min(offset + 8 + size, file.size)
        yield name, offset + 12, end
        yield from _list_chunks(file, offset + 12, end)
        offset = end + size % 2


def _list_chunks(file: BinaryReader, offset: int, list_end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    if depth > _MAX_AVI_DEPTH:
        raise CorruptFile("lists are nested too deeply")
    while list_end - offset >= 8:
        name, size = struct.unpack("<4sI", file.read(offset, 8))
        if not name.isascii() or not name.decode().isprintable():
            raise CorruptFile("unknown data where a chunk is expected")
        start, end = offset + 8, offset + 8 + size
        if size == _UNKNOWN_SIZE and name == b"LIST" and list_end == file.size:
            end = list_end
        if end > list_end:
            if list_end == file.size:
                raise TruncatedFile
            raise CorruptFile("a chunk longer than its list")
        if name == b"LIST":
            if file.read(start, 4) in (b"hdrl", b"strl", b"movi", b"rec "):
                yield from _list_chunks(file, start + 4, end, depth + 1)
        else:
            yield name, start, end
        offset = end + size % 2


def _parse_gif(file: BinaryReader, stream: int) -> StreamInfo:
    """Blocks: extensions and images, each followed by sub-blocks of up to 255 bytes, and a trailer."""
    images, offset = 0, 13 + _palette_bytes(file.read(10, 1)[0])
    while (kind := file.read(offset, 1)) != b";":
        if kind == b"!":
            offset += 2
        elif kind == b",":
            images += 1
            width, height, flags = struct.unpack("<HHB", file.read(offset + 5, 5))
            offset += 10 + _palette_bytes(flags)
            min_code_bits = file.read(offset, 1)[0]
            offset += 1
        else:
            raise CorruptFile("unknown data where a block is expected")
        sub_blocks = []
        while length := file.read(offset, 1)[0]:
            sub_blocks.append((offset + 1, length))
            offset += 1 + length
        offset += 1
        # all but the last sub-block have one length; otherwise damage may have joined two images
        if kind == b"," and len({length for _, length in sub_blocks[:-1]}) > 1:
            _check_lzw(b"".join(file.read(*block) for block in sub_blocks), min_code_bits, width * height)
    if len(file.read(offset + 1, file.size - offset - 1).rstrip(b"\0")) > _MAX_GIF_TRAILER:
        raise CorruptFile("more data after its end")
    return StreamInfo(images)


def _check_lzw(data: bytes, min_code_bits: int, pixels: int) -> None:
    """Check that LZW data decodes to exactly `pixels` pixels. Slow, but rarely needed.

    Raises:
        CorruptFile: it decodes to more or fewer, or ends long before its data.
    """
    if not 1 <= min_code_bits <= 11:
        raise CorruptFile("an image with an invalid code size")
    clear, end = 1 << min_code_bits, (1 << min_code_bits) + 1
    lengths: list[int] = []  # pixels by code
    buffer, buffered_bits, position = 0, 0, 0
    code_bits, previous_length, decoded = min_code_bits + 1, 0, 0
    while True:
        while buffered_bits < code_bits and position < len(data):
            buffer, buffered_bits, position = buffer | data[position] << buffered_bits, buffered_bits + 8, position + 1
        if buffered_bits < code_bits:
            break
        code = buffer & (1 << code_bits) - 1
        buffer, buffered_bits = buffer >> code_bits, buffered_bits - code_bits
        if code == end:
            break
        if code == clear or not lengths:
            lengths, code_bits, previous_length = [1] * clear + [0, 0], min_code_bits + 1, 0
            if code == clear:
                continue
        if previous_length and len(lengths) < 1 << 12:
            lengths.append(previous_length + 1)
            code_bits = max(code_bits, min(12, len(lengths).bit_length()))
        if code >= len(lengths):
            break
        previous_length = lengths[code]
        decoded += previous_length
    if decoded != pixels or len(data) - position > 4:  # some encoders write an extra byte
        raise CorruptFile("an image with too many or too few pixels")


def _palette_bytes(flags: int) -> int:
    """Size of the palette that these flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _parse_flv(file: BinaryReader, stream: int) -> StreamInfo:
    """Tags: 1 byte of type, 3 of size, 7 of time and stream, content, and 4 of size again."""
    offset = file.read_uint(5, 4) + 4
    while offset < file.size:
        if file.read(offset, 1)[0] & 0x1F not in (8, 9, 18):  # audio, video, script data
            raise CorruptFile("unknown data where a tag is expected")
        size = 11 + file.read_uint(offset + 1, 3)
        if offset + size > file.size:
            raise TruncatedFile
        offset += size + 4
    return StreamInfo()


def _parse_asf(file: BinaryReader, stream: int) -> StreamInfo:
    """Objects (WMV): 16 bytes of id, 8 of size, content."""
    offset = 0
    while file.size - offset >= 24:
        size = file.read_uint_le(offset + 16, 8)
        if size < 24:
            break  # a live stream, or foreign data appended to the file
        if offset + size > file.size:
            raise TruncatedFile
        offset += size
    return StreamInfo()


def _parse_ts(file: BinaryReader, stream: int) -> StreamInfo:
    """Packets of 188 bytes, or of 192 with a time before each (M2TS); the file declares no size."""
    size = 188 if file.read(0, 1) == b"G" else 192
    if file.read(0 if size == 188 else 4, 1) == b"G" and file.size % size:
        raise TruncatedFile
    return StreamInfo()


def _parse_ogg(file: BinaryReader, stream: int) -> StreamInfo:
    """Pages; the last page of each stream is marked."""
    offset, open_streams = 0, set[bytes]()
    while file.size - offset >= 27 and file.read(offset, 4) == b"OggS":
        flags, serial, segments = file.read(offset + 5, 1)[0], file.read(offset + 14, 4), file.read(offset + 26, 1)[0]
        open_streams.add(serial)
        if flags & 4:
            open_streams.discard(serial)
        offset += 27 + segments + sum(file.read(offset + 27, segments))
    if open_streams or offset > file.size:
        raise TruncatedFile
    return StreamInfo()


def _parse_ivf(file: BinaryReader, stream: int) -> StreamInfo:
    """A header with its own size, then frames: 4 bytes of size, 8 of time, content."""
    offset = file.read_uint_le(6, 2)
    while offset < file.size:
        offset += 12 + int.from_bytes(file.read(offset, 12)[:4], "little")
    if offset > file.size:
        raise TruncatedFile
    return StreamInfo()


def _parse_nut(file: BinaryReader, stream: int) -> StreamInfo:
    """The last packet is an index; it ends with its own length and a checksum."""
    if file.read(file.size - file.read_uint(file.size - 12, 8), 8) != _NUT_INDEX:
        raise TruncatedFile
    return StreamInfo()


_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
_PARSERS: dict[str, Callable[[BinaryReader, int], StreamInfo]] = {
    _MP4: mp4.read_stream_info,
    "matroska,webm": matroska.read_stream_info,
    "avi": _parse_avi,
    "gif": _parse_gif,
    "flv": _parse_flv,
    "asf": _parse_asf,
    "mpegts": _parse_ts,
    "ogg": _parse_ogg,
    "ivf": _parse_ivf,
    "nut": _parse_nut,
}
