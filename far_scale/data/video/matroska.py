"""The structure of Matroska and WebM files: elements of an id, a size and content."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator

from far_scale.data.video.container_file import Cut, Damaged, File, Said

_EBML, _SEGMENT, _VOID, _CRC = 0x1A45DFA3, 0x18538067, 0xEC, 0xBF
_INFO, _TRACKS, _CLUSTER = 0x1549A966, 0x1654AE6B, 0x1F43B675
_FILM_BEGINS = (_EBML.to_bytes(4, "big"), _SEGMENT.to_bytes(4, "big"))
_IN_SEGMENT = frozenset(
    # SeekHead, Cues, Attachments, Chapters, Tags, Signature
    (0x114D9B74, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, 0x1B538667, _INFO, _TRACKS, _CLUSTER, _VOID, _CRC)
)
_TRACK, _TRACK_NUMBER, _TRACK_TYPE = 0xAE, 0xD7, 0x83
_STREAM_TYPES = (1, 2, 0x11, 0x21)  # of tracks that FFmpeg makes streams of: video, sound, subtitles, data
_BLOCK, _GROUP, _SIMPLE_BLOCK = 0xA1, 0xA0, 0xA3
_NUMBERS_IN_CLUSTER = (0xE7, 0xA7, 0xAB)  # its time, its position, the size of the one before
_IN_CLUSTER = frozenset((_GROUP, _SIMPLE_BLOCK, *_NUMBERS_IN_CLUSTER, 0x5854, 0xAF, _VOID, _CRC))


def read(file: File, stream: int) -> Said:
    """What the file says of the stream with this index.

    Raises:
        Cut: an element is longer than the file.
        Damaged: there is something else where an element must be, or a checksum is wrong.
    """
    walk = _Walk(file)
    walk.file()
    return Said(walk.frames[walk.tracks[stream]] if 0 <= stream < len(walk.tracks) else None)


class _Walk:
    """A way through the file that collects what is found.

    Attributes:
        tracks: their numbers, in the order of FFmpeg's streams.
        frames: how many there are, by the number of the track.
    """

    def __init__(self, file: File) -> None:
        self.tracks: list[int] = []
        self.frames = Counter[int]()
        self._file = file
        self._all_tracks = set[int]()  # with those of other types

    def file(self) -> None:
        place, segments = 0, 0
        while place < self._file.size:
            if segments and self._file.at(place, min(4, self._file.size - place)) not in _FILM_BEGINS:
                return  # something else, put behind the film
            name, start, stop = self._element(place)
            if name == _SEGMENT:
                segments += 1
                if stop is not None and stop > self._file.size:
                    raise Cut
                place = self._segment(start, self._file.size if stop is None else stop)
            elif stop is None or name not in (_EBML, _VOID):
                raise Damaged("something else where an element must be")
            else:
                place = stop
        if not segments:
            raise Cut

    def _segment(self, place: int, end: int) -> int:
        while place < end:
            name, start, stop = self._element(place)
            if name == _EBML:
                return place  # another film, put behind one whose size is not known
            if name not in _IN_SEGMENT or (stop is None and name != _CLUSTER):
                raise Damaged("something else where an element must be")
            self._check_end(stop, end)
            if name in (_INFO, _TRACKS, _CLUSTER) and stop is not None:
                self._check_sum(start, stop)
            if name == _TRACKS and stop is not None:
                self._read_tracks(start, stop)
            place = self._cluster(start, stop, end) if name == _CLUSTER or stop is None else stop
        return place

    def _cluster(self, place: int, stop: int | None, end: int) -> int:
        while place < (end if stop is None else stop):
            name, start, last = self._element(place)
            if stop is None and name in _IN_SEGMENT | {_EBML} and name not in (_VOID, _CRC):
                return place  # a live stream's cluster has no size: the next element ends it
            if name not in _IN_CLUSTER or last is None or (name in _NUMBERS_IN_CLUSTER and last - start > 8):
                raise Damaged("something else where a block must be")
            self._check_end(last, end if stop is None else stop)
            if name == _SIMPLE_BLOCK:
                self._count(start)
            elif name == _GROUP:
                blocks = [first for inner, first, _ in self._elements(start, last) if inner == _BLOCK]
                if len(blocks) != 1:
                    raise Damaged("a group of blocks without its block")
                self._count(blocks[0])
            place = last
        return place

    def _count(self, place: int) -> None:
        """Count the frames of a block: a number of its track, 2 bytes of time, flags; if laced, the frames less one."""
        length = 9 - self._file.at(place, 1)[0].bit_length()
        track = self._file.number(place, length) & (1 << 7 * length) - 1
        laced = self._file.at(place + length + 2, 1)[0] & 0x06
        self.frames[track] += self._file.at(place + length + 3, 1)[0] + 1 if laced else 1
        if track not in self._all_tracks:
            raise Damaged("a block of no track")

    def _read_tracks(self, place: int, end: int) -> None:
        for name, start, stop in self._elements(place, end):
            if name != _TRACK:
                continue
            short = (one for one in self._elements(start, stop) if one[2] - one[1] <= 8)
            entries = {inner: self._file.number(first, last - first) for inner, first, last in short}
            if not {_TRACK_NUMBER, _TRACK_TYPE} <= entries.keys():
                raise Damaged("a track without number and type")
            self._all_tracks.add(entries[_TRACK_NUMBER])
            if entries[_TRACK_TYPE] in _STREAM_TYPES:
                self.tracks.append(entries[_TRACK_NUMBER])

    def _elements(self, place: int, end: int) -> Iterator[tuple[int, int, int]]:
        while place < end:
            name, start, stop = self._element(place)
            if stop is None:
                raise Damaged("an element without a size")
            self._check_end(stop, end)
            yield name, start, stop
            place = stop

    def _element(self, place: int) -> tuple[int, int, int | None]:
        """The element there: its id, where its content begins, and where it ends (None: that is not known)."""
        length = 9 - self._file.at(place, 1)[0].bit_length()
        if length > 4:
            raise Damaged("something else where an element must be")
        name = self._file.number(place, length)
        place += length
        length = 9 - self._file.at(place, 1)[0].bit_length()
        if length > 8:
            raise Damaged("an element without a size")
        unknown = (1 << 7 * length) - 1
        size = self._file.number(place, length) & unknown
        place += length
        return name, place, None if size == unknown else place + size

    def _check_end(self, stop: int | None, end: int) -> None:
        if stop is not None and stop > end:
            if end == self._file.size:
                raise Cut
            raise Damaged("an element longer than the one that holds it")

    def _check_sum(self, start: int, stop: int) -> None:
        """Compare content with the CRC-32 that may come first in it; FFmpeg and mkvmerge write one."""
        if stop - start < 6 or self._file.at(start, 2) != bytes((_CRC, 0x84)):
            return
        said, found, place = int.from_bytes(self._file.at(start + 2, 4), "little"), 0, start + 6
        while place < stop:
            part = self._file.at(place, min(1 << 20, stop - place))
            found, place = zlib.crc32(part, found), place + len(part)
        if found != said:
            raise Damaged("a wrong checksum")
