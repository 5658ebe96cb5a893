"""Shards in MDS, the format of mosaicml-streaming: reading one, writing one, and the index of a whole set.

    uint32 samples | uint32 offsets [samples + 1] | JSON of the columns | the samples; all little-endian
    a sample: uint32 sizes [3] | key | JSON | safetensors

Source: mosaicml-streaming 0.13, streaming/base/format/mds. Its datasets read our files, and `write_mds` gives the same
bytes as its MDSWriter. We do not import the library: its writer keeps several copies of a shard in memory, leaves
partial files behind and lets offsets beyond 32 bits wrap, and the import needs torchvision and transformers.

The columns have WebDataset's names, so that a sample is the same dict in both libraries.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from far_scale.data.remote.compression import MAX_MDS_BYTES
from far_scale.data.shards.errors import BadShardError, UnexpectedMemberError
from far_scale.data.shards.index import IndexRow
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.members import Member, MemberReader
from far_scale.data.shards.records import KEY_PATTERN, MAX_MANIFEST_BYTES, read_small
from far_scale.utils.errors import UserError
from far_scale.utils.io import write_json

STREAMING_INDEX_NAME = "index.json"
COLUMNS = {"__key__": "str", "json": "bytes", "safetensors": "bytes"}  # sorted by name, as by the library's writer
MAX_SAMPLES = 1 << 19  # of a shard; the index of more would be larger than its limit

_CONFIG: dict[str, Any] = {
    "version": 2,
    "format": "mds",
    "compression": None,
    "hashes": ["sha256"],
    "size_limit": None,
    "column_names": list(COLUMNS),
    "column_encodings": list(COLUMNS.values()),
    "column_sizes": [None] * len(COLUMNS),
}
_CONFIG_BYTES = json.dumps(_CONFIG, sort_keys=True).encode()
_SIZES = struct.Struct(f"<{len(COLUMNS)}I")


class BadMdsError(BadShardError):
    """The bytes are not a complete MDS file with our columns."""

    format = "an MDS file"


class MdsReader(MemberReader):
    """The members of an MDS file with our columns; other content is refused."""

    truncated = BadMdsError

    def __iter__(self) -> Iterator[Member]:
        for begin, end in itertools.pairwise(self._offsets()):
            key_bytes, json_bytes, tensors_bytes = _SIZES.unpack(self._take(_SIZES.size))
            if _SIZES.size + key_bytes + json_bytes + tensors_bytes != end - begin:
                raise BadMdsError(f"the sizes of the sample at {begin} do not add up to its {end - begin} bytes")
            key = self._take(min(key_bytes, 81)).decode("latin-1")
            if not KEY_PATTERN.fullmatch(key):
                raise UnexpectedMemberError(f"the key {key!r} is not 1 to 80 of A-Z a-z 0-9 _ -")
            yield from self._offer(key, "json", json_bytes)
            yield from self._offer(key, "safetensors", tensors_bytes)
        if self._file.read(1):
            raise BadMdsError("there are more bytes after its last sample")

    def _offsets(self) -> list[int]:
        """Offsets of the samples and of the end; reads up to the first sample."""
        (count,) = struct.unpack("<I", self._take(4))
        if not 0 < count <= MAX_SAMPLES:
            raise BadMdsError(f"{count} samples, and 1 to {MAX_SAMPLES} may be in it")
        offsets: list[int] = np.frombuffer(self._take(4 * (count + 1)), "<u4").tolist()
        if offsets[0] != self._offset + len(_CONFIG_BYTES) or self._take(len(_CONFIG_BYTES)) != _CONFIG_BYTES:
            raise BadMdsError(f"its columns are not {', '.join(COLUMNS)}, uncompressed")
        if any(end - begin < _SIZES.size for begin, end in itertools.pairwise(offsets)):
            raise BadMdsError("its offsets do not rise")
        return offsets


def check_fits(path: Path, samples: Sequence[IndexRow]) -> None:
    """Refuse samples (of the shard at `path`) that do not fit into one MDS file.

    Raises:
        UserError: names the size.
    """
    data = sum(_SIZES.size + len(row.key) + row.json_bytes + row.tensors_bytes for row in samples)
    size = _data_offset(len(samples)) + data
    if size > MAX_MDS_BYTES or len(samples) > MAX_SAMPLES:
        raise UserError(
            f"{path}: as an MDS file its {len(samples)} samples would have {size} bytes, and {MAX_SAMPLES} samples of "
            f"{MAX_MDS_BYTES} bytes together are the most; encode the videos with a lower --samples-per-shard"
        )


def write_mds(path: Path, samples: Iterable[tuple[str, bytes, bytes]], count: int) -> None:
    """Write `count` samples (key, JSON, safetensors), which must fit into one MDS file; one is in memory at a time."""
    offsets = [_data_offset(count)]
    with open(path, "wb") as file:
        file.write(bytes(4 + 4 * (count + 1)) + _CONFIG_BYTES)
        for key, metadata, tensors in samples:
            columns = (key.encode(), metadata, tensors)
            file.write(_SIZES.pack(*map(len, columns)))
            file.writelines(columns)
            offsets.append(file.tell())
        if len(offsets) != count + 1:
            raise ValueError(f"{len(offsets) - 1} samples, not {count}")
        file.seek(0)
        file.write(struct.pack("<I", count) + np.asarray(offsets, "<u4").tobytes())


def write_streaming_index(folder: Path, manifest: Manifest) -> None:
    """Write the library's `index.json` of a set of MDS files, which its datasets need, atomically."""
    write_json(folder / STREAMING_INDEX_NAME, _streaming_index(manifest))


def has_streaming_index(folder: Path, manifest: Manifest) -> bool:
    """Whether the library's index exists and agrees with the manifest."""
    try:
        # An entry of a shard is a little longer than the manifest's.
        text = read_small(folder / STREAMING_INDEX_NAME, 4 * MAX_MANIFEST_BYTES)
        return bool(json.loads(text) == _streaming_index(manifest))
    except (FileNotFoundError, UserError, ValueError, RecursionError):
        return False


def _streaming_index(manifest: Manifest) -> dict[str, Any]:
    shards = []
    for shard in manifest.shards:
        data = {"basename": shard.file, "bytes": shard.bytes, "hashes": {"sha256": shard.sha256}}
        shards.append({"samples": shard.samples, "raw_data": data, "zip_data": None, **_CONFIG})
    return {"version": 2, "shards": shards}


def _data_offset(samples: int) -> int:
    """Offset of the first sample."""
    return 4 + 4 * (samples + 1) + len(_CONFIG_BYTES)
