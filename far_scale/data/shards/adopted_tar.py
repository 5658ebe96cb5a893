"""Reading adopted tars: all members that WebDataset would read. Nothing in them is trusted.

Names may be long (extended headers of GNU and POSIX) and have folders. Folders, devices and hidden files (`._name` of
macOS) are skipped. WebDataset skips links, too; here their samples are listed, as broken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from far_scale.data.shards.adopted import MAX_NAME
from far_scale.data.shards.errors import UnexpectedMemberError
from far_scale.data.shards.members import BadTarError, Member, TarReader, check_header_checksum

_MAX_EXTENDED = 1 << 20  # bytes of an extended header
_MAX_DATA = 1 << 50  # bytes of a member; large ones are skipped
_MAX_MEMBERS = 1 << 22  # of a tar
# As webdataset.tariterators: the key is everything before the first dot of the file's name, with its folders.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_HIDDEN = re.compile(r"^__[^/]*__($|/)|(^|/)\.[^/]*$")  # of WebDataset, and of operating systems
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class AdoptedTarReader(TarReader):
    """The members of a tar that belong to samples; a member's `kind` is its extension."""

    def __iter__(self) -> Iterator[Member]:
        name, size = None, None  # of the next entry, from extended headers
        for _ in range(_MAX_MEMBERS):
            header = self._header()
            if not any(header):
                return self._check_end()
            entry_size, kind = _parse_header(header)
            if kind in b"LxgKXN":  # extended headers, of the next entry or of all (g)
                if entry_size > _MAX_EXTENDED:
                    raise UnexpectedMemberError(f"an extended header of {entry_size} bytes, {_MAX_EXTENDED} at most")
                data = self._take(entry_size)
                if kind == b"L":
                    name = _decode_name(data.rstrip(b"\0"))
                elif kind in b"xX":
                    name, size = _parse_extended(data, name, size)
                continue
            member_name = _decode_name(_header_name(header)) if name is None else name
            data_bytes = 0 if kind in b"123456" else entry_size if size is None else size
            if kind == b"S" or data_bytes > _MAX_DATA:
                raise UnexpectedMemberError(f"member {member_name!r:.100} is sparse, or its size is {data_bytes}")
            is_file = kind in (b"0", b"\0", b"7", b"1", b"2") and not _HIDDEN.search(member_name)
            match = _KEY_AND_EXTENSION.fullmatch(member_name.removeprefix("./")) if is_file else None
            if match is None:
                self._file.seek(data_bytes, os.SEEK_CUR)
                self._offset += data_bytes
            else:
                yield from self._offer(match[1], match[2].lower(), data_bytes)
            name, size = None, None
        raise BadTarError(f"it has more than {_MAX_MEMBERS} members")

    def _check_end(self) -> None:
        """Refuse data after the tar's end, as in tars joined by `cat`: no reader would see it."""
        while block := self._file.read(1 << 20):
            if any(block):
                raise UnexpectedMemberError("after its end comes more: tars are joined by `tar -A`, not by `cat`")


def refuse_compressed(file: BinaryIO) -> None:
    """Refuse a compressed tar: its samples cannot be read by offset.

    Raises:
        BadTarError: it is compressed.
    """
    start = file.read(8)
    file.seek(0)
    if start.startswith(_COMPRESSED):
        raise BadTarError("it is compressed; unpack it first, as by gunzip")


def _parse_header(header: bytes) -> tuple[int, bytes]:
    """Size and kind of an entry."""
    check_header_checksum(header)
    size = header[124:136]
    if size[0] == 0x80:  # GNU's base 256, for more than 8 GB
        return int.from_bytes(size[1:], "big"), header[156:157]
    digits = size.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{0,12}", digits):
        raise BadTarError("a header's size is not readable")
    return int(digits or b"0", 8), header[156:157]


def _header_name(header: bytes) -> bytes:
    name, prefix = (header[begin:end].partition(b"\0")[0] for begin, end in ((0, 100), (345, 500)))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _decode_name(name: bytes) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise UnexpectedMemberError(f"the name {name!r:.100} is not in UTF-8") from None
    if len(text) > MAX_NAME or not text.isprintable():
        raise UnexpectedMemberError(f"the name {text!r:.100} is longer than {MAX_NAME}, or not printable")
    return text


def _parse_extended(data: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size of the next entry after a POSIX extended header, lines of `LENGTH KEY=VALUE`."""
    while data.strip(b"\0"):
        length = re.match(rb"(\d{1,7}) ", data)
        record = data[: int(length[1])] if length else b""
        parsed = re.fullmatch(rb"\d+ ([^=]+)=(.*)\n", record, re.DOTALL)
        if parsed is None:
            raise BadTarError("an extended header is not readable")
        key, value = parsed.groups()
        if key == b"path":
            name = _decode_name(value)
        elif key == b"size":
            if not re.fullmatch(rb"\d{1,18}", value):
                raise BadTarError("an extended header's size is not readable")
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise UnexpectedMemberError("a member is sparse; write the tar without --sparse")
        data = data[len(record) :]
    return name, size
