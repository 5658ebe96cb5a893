"""Unpacking files of mosaicml-streaming in its five compressions, never to more bytes than are expected."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from far_scale.utils.errors import UserError

_PACKED = re.compile(r"\.mds\.(zstd|gz|bz2|br|snappy)")
# Of cramjam: it has them all in one package, and writes into a buffer that does not grow.
_CODECS = {
    "zstd": ("zstd", "decompress_into"),
    "gz": ("gzip", "decompress_into"),
    "bz2": ("bzip2", "decompress_into"),
    "br": ("brotli", "decompress_into"),
    "snappy": ("snappy", "decompress_raw_into"),
}


class PackedError(Exception):
    """Bytes that do not unpack to what is expected."""


def compression_of(place: str) -> str | None:
    """What an MDS file is packed with, by the name that mosaicml-streaming gives it; None where it is not."""
    path = place if place.startswith(("/", "pipe:")) else urlsplit(place).path
    found = _PACKED.fullmatch(path[path.rfind(".mds") :]) if ".mds" in path else None
    return None if found is None else found[1]


def most_packed(size: int) -> int:
    """Bytes that no packed form of `size` bytes is longer than."""
    return size + size // 16 + (1 << 16)


def unpack(data: bytes, compression: str, size: int) -> bytearray:
    """The `size` bytes that were packed.

    Raises:
        PackedError: they are cut off or damaged, or another number of bytes.
        UserError: the package that unpacks is not installed.
    """
    try:
        import cramjam
    except ImportError:
        raise UserError(f"unpacking .{compression} needs the package cramjam: pip install '.[mds]'") from None
    module, function = _CODECS[compression]
    unpacked = bytearray(size)
    try:
        count = getattr(getattr(cramjam, module), function)(data, unpacked)
    except cramjam.DecompressionError as error:
        raise PackedError(f"it does not unpack as .{compression} ({' '.join(str(error).split())[:100]})") from None
    if count != size:
        raise PackedError(f"it unpacks to {count} bytes, not {size}")
    return unpacked
