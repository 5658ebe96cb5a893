"""The structure of Matroska and WebM files: elements with an id, a size and content."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator

from far_scale.data.video.container_file import BinaryReader, CorruptFile, StreamInfo, TruncatedFile

_EBML, _SEGMENT, _VOID, _CRC = 0x1A45DFA3, 0x18538067, 0xEC, 0xBF
_INFO, _TRACKS, _CLUSTER = 0x1549A966, 0x1654AE6B, 0x1F43B675
_FILE_STARTS = (_EBML.to_bytes(4, "big"), _SEGMENT.to_bytes(4, "big"))
_IN_SEGMENT = frozenset(
    # SeekHead, Cues, Attachments, Chapters, Tags, Signature
    (0x114D9B74, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, 0x1B538667, _INFO, _TRACKS, _CLUSTER, _VOID, _CRC)
)
_TRACK, _TRACK_NUMBER, _TRACK_TYPE = 0xAE, 0xD7, 0x83
_STREAM_TYPES = (1, 2, 0x11, 0x21)  # track types that are streams for FFmpeg: video, audio, subtitles, metadata
_BLOCK, _BLOCK_GROUP, _SIMPLE_BLOCK = 0xA1, 0xA0, 0xA3
_NUMBERS_IN_CLUSTER = (0xE7, 0xA7, 0xAB)  # Timestamp, Position, PrevSize
_IN_CLUSTER = frozenset((_BLOCK_GROUP, _SIMPLE_BLOCK, *_NUMBERS_IN_CLUSTER, 0x5854, 0xAF, _VOID, _CRC))


def read_stream_info(file: BinaryReader, stream: int) -> StreamInfo:
    """Read what the file declares about the stream with this index.

    Raises:
        TruncatedFile: an element is longer than the file.
        CorruptFile: there is no element where one must be, or a checksum is wrong.
    """
    parser = _Parser(file)
    parser.parse()
    return StreamInfo(parser.frames[parser.tracks[stream]] if 0 <= stream < len(parser.tracks) else None)


class _Parser:
    """Walks through the file and counts the frames of each track.

    Attributes:
        tracks: track numbers in the order of FFmpeg's streams.
        frames: number of frames by track number.
    """

    def __init__(self, file: BinaryReader) -> None:
        self.tracks: list[int] = []
        self.frames = Counter[int]()
        self._file = file
        self._all_tracks = set[int]()  # including types that are no stream

    def parse(self) -> None:
        offset, segments = 0, 0
        while offset < self._file.size:
            if segments and self._file.read(offset, min(4, self._file.size - offset)) not in _FILE_STARTS:
                return  # foreign data appended to the file
            element, start, end = self._read_header(offset)
            if element == _SEGMENT:
                segments += 1
                if end is not None and end > self._file.size:
                    raise TruncatedFile
                offset = self._parse_segment(start, self._file.size if end is None else end)
            elif end is None or element not in (_EBML, _VOID):
                raise CorruptFile("unknown data where an element is expected")
            else:
                offset = end
        if not segments:
            raise TruncatedFile

    def _parse_segment(self, offset: int, segment_end: int) -> int:
        while offset < segment_end:
            element, start, end = self._read_header(offset)
            if element == _EBML:
                return offset  # another file, appended to one of unknown size
            if element not in _IN_SEGMENT or (end is None and element != _CLUSTER):
                raise CorruptFile("unknown data where an element is expected")
            self._check_end(end, segment_end)
            if element in (_INFO, _TRACKS, _CLUSTER) and end is not None:
                self._check_crc(start, end)
            if element == _TRACKS and end is not None:
                self._parse_tracks(start, end)
            offset = self._parse_cluster(start, end, segment_end) if element == _CLUSTER or end is None else end
        return offset

    def _parse_cluster(self, offset: int, cluster_end: int | None, segment_end: int) -> int:
        parent_end = segment_end if cluster_end is None else cluster_end
        while offset < parent_end:
            element, start, end = self._read_header(offset)
            if cluster_end is None and element in _IN_SEGMENT | {_EBML} and element not in (_VOID, _CRC):
                return offset  # a live stream's cluster has no size: the next element ends it
            if element not in _IN_CLUSTER or end is None or (element in _NUMBERS_IN_CLUSTER and end - start > 8):
                raise CorruptFile("unknown data where a block is expected")
            self._check_end(end, parent_end)
            if element == _SIMPLE_BLOCK:
                self._count_frames(start)
            elif element == _BLOCK_GROUP:
                blocks = [block for inner, block, _ in self._elements(start, end) if inner == _BLOCK]
                if len(blocks) != 1:
                    raise CorruptFile("a block group without its block")
                self._count_frames(blocks[0])
            offset = end
        return offset

    def _count_frames(self, offset: int) -> None:
        """Count the frames of a block: track number, 2 bytes of time, flags; if laced, the frame count minus one."""
        length = 9 - self._file.read(offset, 1)[0].bit_length()
        track = self._file.read_uint(offset, length) & (1 << 7 * length) - 1
        is_laced = self._file.read(offset + length + 2, 1)[0] & 0x06
        self.frames[track] += self._file.read(offset + length + 3, 1)[0] + 1 if is_laced else 1
        if track not in self._all_tracks:
            raise CorruptFile("a block of an unknown track")

    def _parse_tracks(self, offset: int, tracks_end: int) -> None:
        for element, start, end in self._elements(offset, tracks_end):
            if element != _TRACK:
                continue
            fields = {
                inner: self._file.read_uint(inner_start, inner_end - inner_start)
                for inner, inner_start, inner_end in self._elements(start, end)
                if inner_end - inner_start <= 8
            }
            if not {_TRACK_NUMBER, _TRACK_TYPE} <= fields.keys():
                raise CorruptFile("a track without number and type")
            self._all_tracks.add(fields[_TRACK_NUMBER])
            if fields[_TRACK_TYPE] in _STREAM_TYPES:
                self.tracks.append(fields[_TRACK_NUMBER])

    def _elements(self, offset: int, parent_end: int) -> Iterator[tuple[int, int, int]]:
        while offset < parent_end:
            element, start, end = self._read_header(offset)
            if end is None:
                raise CorruptFile("an element without a size")
            self._check_end(end, parent_end)
            yield element, start, end
            offset = end

    def _read_header(self, offset: int) -> tuple[int, int, int | None]:
        """Read an element header: its id, the start and the end of its content (None: unknown size)."""
        length = 9 - self._file.read(offset, 1)[0].bit_length()
        if length > 4:
            raise CorruptFile("unknown data where an element is expected")
        element = self._file.read_uint(offset, length)
        offset += length
        length = 9 - self._file.read(offset, 1)[0].bit_length()
        if length > 8:
            raise CorruptFile("an element without a size")
        unknown = (1 << 7 * length) - 1
        size = self._file.read_uint(offset, length) & unknown
        offset += length
        return element, offset, None if size == unknown else offset + size

    def _check_end(self, end: int | None, parent_end: int) -> None:
        if end is not None and end > parent_end:
            if parent_end == self._file.size:
                raise TruncatedFile
            raise CorruptFile("an element longer than its parent")

    def _check_crc(self, start: int, end: int) -> None:
        """Compare the content with the CRC-32 that may come first in it; FFmpeg and mkvmerge write one."""
        if end - start < 6 or self._file.read(start, 2) != bytes((_CRC, 0x84)):
            return
        expected, actual, offset = self._file.read_uint_le(start + 2, 4), 0, start + 6
        while offset < end:
            chunk = self._file.read(offset, min(1 << 20, end - offset))
            actual, offset = zlib.crc32(chunk, actual), offset + len(chunk)
        if actual != expected:
            raise CorruptFile("a wrong checksum")
