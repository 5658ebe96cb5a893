"""Walking tars that others wrote: any member that WebDataset would read, and nothing in them believed, as in tar.py.

Names may be long (GNU's and POSIX's extended headers) and have folders; folders, devices and hidden files (`._name` of
macOS) are passed over. A link would be passed over by WebDataset; here its sample is found, and is broken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from far_scale.data.shards.adopted import MAX_NAME
from far_scale.data.shards.members import ForeignMemberError, Member
from far_scale.data.shards.tar import BadTarError, TarWalk

_MAX_EXTENDED = 1 << 20  # bytes of an extended header
_MAX_DATA = 1 << 50  # bytes of a member, most of which are passed over
_MAX_MEMBERS = 1 << 22  # of a tar
# As webdataset.tariterators: the key is all before the first dot of the file's name, folders and all.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_HIDDEN = re.compile(r"^__[^/]*__($|/)|(^|/)\.[^/]*$")  # of WebDataset, and of systems
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class ForeignTarWalk(TarWalk):
    """The members of a tar that belong to a sample: key, extension, and where the data lies."""

    def __iter__(self) -> Iterator[Member]:
        name, size = None, None  # of the next entry, where extended headers say so
        for _ in range(_MAX_MEMBERS):
            header = self._header()
            if not any(header):
                return self._refuse_more()
            stated, kind = _entry(header)
            if kind in b"LxgKXN":  # headers that are entries themselves: of the next entry, or of all (g)
                if stated > _MAX_EXTENDED:
                    raise ForeignMemberError(f"an extended header of {stated} bytes, {_MAX_EXTENDED} at most")
                data = self._take(stated)
                if kind == b"L":
                    name = _text(data.rstrip(b"\0"))
                elif kind in b"xX":
                    name, size = _extended(data, name, size)
                continue
            own_name = _text(_name(header)) if name is None else name
            data_bytes = 0 if kind in b"123456" else stated if size is None else size
            if kind == b"S" or data_bytes > _MAX_DATA:
                raise ForeignMemberError(f"member {own_name!r:.100} is sparse, or its size is {data_bytes}")
            plain = kind in (b"0", b"\0", b"7", b"1", b"2") and not _HIDDEN.search(own_name)
            found = _KEY_AND_EXTENSION.fullmatch(own_name.removeprefix("./")) if plain else None
            if found is None:
                self._file.seek(data_bytes, os.SEEK_CUR)
                self._at += data_bytes
            else:
                yield from self._offer(found[1], found[2].lower(), data_bytes)
            name, size = None, None
        raise BadTarError(f"it has more than {_MAX_MEMBERS} members")

    def _refuse_more(self) -> None:
        """Refuse what follows the tar's end, as where tars were put together by `cat`: nobody would read it."""
        while block := self._file.read(1 << 20):
            if any(block):
                raise ForeignMemberError("after its end comes more: tars are joined by `tar -A`, not by `cat`")


def refuse_compressed(file: BinaryIO) -> None:
    """Refuse a tar that was compressed: its samples cannot be read by their places.

    Raises:
        BadTarError: it was.
    """
    start = file.read(8)
    file.seek(0)
    if start.startswith(_COMPRESSED):
        raise BadTarError("it is compressed; unpack it first, as by gunzip")


def _entry(header: bytes) -> tuple[int, bytes]:
    """Size and kind of an entry."""
    stored = header[148:156].strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,8}", stored):
        raise BadTarError("there is no tar header where one should be")
    if int(stored, 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise BadTarError("a header's checksum is wrong")
    size = header[124:136]
    if size[0] == 0x80:  # GNU's: a number of more than 8 GB in base 256
        return int.from_bytes(size[1:], "big"), header[156:157]
    digits = size.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{0,12}", digits):
        raise BadTarError("a header's size is not readable")
    return int(digits or b"0", 8), header[156:157]


def _name(header: bytes) -> bytes:
    name, prefix = (header[begin:end].partition(b"\0")[0] for begin, end in ((0, 100), (345, 500)))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _text(name: bytes) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise ForeignMemberError(f"the name {name!r:.100} is not in UTF-8") from None
    if len(text) > MAX_NAME or not text.isprintable():
        raise ForeignMemberError(f"the name {text!r:.100} is longer than {MAX_NAME}, or not printable")
    return text


def _extended(data: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size of the next entry by a POSIX extended header: lines of `LENGTH KEY=VALUE`."""
    while data.strip(b"\0"):
        length = re.match(rb"(\d{1,7}) ", data)
        record = data[: int(length[1])] if length else b""
        parsed = re.fullmatch(rb"\d+ ([^=]+)=(.*)\n", record, re.DOTALL)
        if parsed is None:
            raise BadTarError("an extended header is not readable")
        key, value = parsed.groups()
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not re.fullmatch(rb"\d{1,18}", value):
                raise BadTarError("an extended header's size is not readable")
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise ForeignMemberError("a member is sparse; write the tar without --sparse")
        data = data[len(record) :]
    return name, size
