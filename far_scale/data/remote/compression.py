"""Decompressing MDS files in mosaicml-streaming's five compressions, never to more bytes than expected."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from far_scale.utils.errors import UserError

MAX_MDS_BYTES = (1 << 32) - 1  # offsets in an MDS file have 32 bits
_COMPRESSED_NAME = re.compile(r"\.mds\.(zstd|gz|bz2|br|snappy)")
# Of cramjam, which has all of them in one package and writes into a buffer of fixed size.
_CODECS = {
    "zstd": ("zstd", "decompress_into"),
    "gz": ("gzip", "decompress_into"),
    "bz2": ("bzip2", "decompress_into"),
    "br": ("brotli", "decompress_into"),
    "snappy": ("snappy", "decompress_raw_into"),
}


class DecompressionError(Exception):
    """The bytes do not decompress to what is expected."""


def compression_of(location: str) -> str | None:
    """Compression of an MDS file by its name in mosaicml-streaming; None if it is not compressed."""
    path = location if location.startswith(("/", "pipe:")) else urlsplit(location).path
    match = _COMPRESSED_NAME.fullmatch(path[path.rfind(".mds") :]) if ".mds" in path else None
    return None if match is None else match[1]


def max_compressed_bytes(size: int) -> int:
    """Upper bound of the compressed size of `size` bytes."""
    return size + size // 16 + (1 << 16)


def decompress(data: bytes, compression: str, size: int) -> bytearray:
    """Decompress data that has `size` bytes uncompressed.

    Raises:
        DecompressionError: the data is cut off, damaged, or of another size.
        UserError: the package cramjam is not installed.
    """
    try:
        import cramjam
    except ImportError:
        raise UserError(f"decompressing .{compression} needs the package cramjam: pip install '.[mds]'") from None
    module, function = _CODECS[compression]
    decompressed = bytearray(size)
    try:
        count = getattr(getattr(cramjam, module), function)(data, decompressed)
    except cramjam.DecompressionError as error:
        reason = " ".join(str(error).split())[:100]
        raise DecompressionError(f"it does not decompress as .{compression} ({reason})") from None
    if count != size:
        raise DecompressionError(f"it decompresses to {count} bytes, not {size}")
    return decompressed
