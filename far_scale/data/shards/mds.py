"""Shards in MDS, the format of mosaicml-streaming: walking one, writing one, and the index of a whole set.

    uint32 samples | uint32 offsets [samples + 1] | JSON of the columns | the samples; all little-endian
    a sample: uint32 sizes [3] | key | JSON | safetensors

Source: mosaicml-streaming 0.13, streaming/base/format/mds. Any of its datasets reads our files, and what `write_mds`
writes is what its MDSWriter would write, byte for byte. We do not import it to write these few numbers: it keeps a
whole shard in memory several times over, leaves halves of files behind, lets offsets past 32 bits wrap, and cannot be
imported without torchvision and transformers.

The columns bear the names that WebDataset gives the same things, so that a sample is the same dict by either library.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from far_scale.data.shards.index import IndexRow
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.members import KEY_PATTERN, BadShardError, ForeignMemberError, Member, MemberWalk
from far_scale.data.shards.typed import MAX_MANIFEST_BYTES, read_small
from far_scale.utils.errors import UserError
from far_scale.utils.io import write_json

STREAMING_INDEX_NAME = "index.json"
COLUMNS = {"__key__": "str", "json": "bytes", "safetensors": "bytes"}  # the writer of the library sorts them by name
MAX_SAMPLES = 1 << 19  # of a shard: the index of so many would be larger than any that is read
_MOST_BYTES = (1 << 32) - 1  # an offset has 32 bits

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
    """Bytes that are no MDS file with our columns, or not all of one."""

    format = "an MDS file"


class MdsWalk(MemberWalk):
    """The members of an MDS file with our columns; nothing but them and the numbers of the format may stand in it."""

    bad = BadMdsError

    def __iter__(self) -> Iterator[Member]:
        for begin, end in itertools.pairwise(self._offsets()):
            key_bytes, json_bytes, tensors_bytes = _SIZES.unpack(self._take(_SIZES.size))
            if _SIZES.size + key_bytes + json_bytes + tensors_bytes != end - begin:
                raise BadMdsError(f"the sizes of the sample at {begin} do not add up to its {end - begin} bytes")
            key = self._take(min(key_bytes, 81)).decode("latin-1")
            if not KEY_PATTERN.fullmatch(key):
                raise ForeignMemberError(f"the key {key!r} is not 1 to 80 of A-Z a-z 0-9 _ -")
            yield from self._offer(key, "json", json_bytes)
            yield from self._offer(key, "safetensors", tensors_bytes)
        if self._file.read(1):
            raise BadMdsError("there are more bytes after its last sample")

    def _offsets(self) -> list[int]:
        """Where each sample begins, and where the last one ends; the place in the file is at the first one."""
        (samples,) = struct.unpack("<I", self._take(4))
        if not 0 < samples <= MAX_SAMPLES:
            raise BadMdsError(f"{samples} samples, and 1 to {MAX_SAMPLES} may be in it")
        offsets = np.frombuffer(self._take(4 * (samples + 1)), "<u4").tolist()
        if offsets[0] != self._at + len(_CONFIG_BYTES) or self._take(len(_CONFIG_BYTES)) != _CONFIG_BYTES:
            raise BadMdsError(f"its columns are not {', '.join(COLUMNS)}, uncompressed")
        if any(end - begin < _SIZES.size for begin, end in itertools.pairwise(offsets)):
            raise BadMdsError("its offsets do not rise")
        return offsets


def check_fits(path: Path, samples: Sequence[IndexRow]) -> None:
    """Refuse the samples of the shard at `path` where they are too many for one MDS file.

    Raises:
        UserError: how large it would be.
    """
    data = sum(_SIZES.size + len(row.key) + row.json_bytes + row.tensors_bytes for row in samples)
    size = _data_offset(len(samples)) + data
    if size > _MOST_BYTES or len(samples) > MAX_SAMPLES:
        raise UserError(
            f"{path}: as an MDS file its {len(samples)} samples would have {size} bytes, and {MAX_SAMPLES} samples of "
            f"{_MOST_BYTES} bytes together are the most; encode the videos with a lower --samples-per-shard"
        )


def write_mds(path: Path, samples: Iterable[tuple[str, bytes, bytes]], count: int) -> None:
    """Write `count` samples (key, JSON, safetensors) that fit to `path`; one at a time is held in memory."""
    offsets = [_data_offset(count)]
    with open(path, "wb") as file:
        file.write(bytes(4 + 4 * (count + 1)) + _CONFIG_BYTES)
        for key, facts, tensors in samples:
            parts = (key.encode(), facts, tensors)
            file.write(_SIZES.pack(*map(len, parts)))
            file.writelines(parts)
            offsets.append(file.tell())
        if len(offsets) != count + 1:
            raise ValueError(f"{len(offsets) - 1} samples, not {count}")
        file.seek(0)
        file.write(struct.pack("<I", count) + np.asarray(offsets, "<u4").tobytes())


def write_streaming_index(folder: Path, manifest: Manifest) -> None:
    """Write the library's own `index.json` of a set of MDS files, by which its datasets find them, atomically."""
    write_json(folder / STREAMING_INDEX_NAME, _streaming_index(manifest))


def has_streaming_index(folder: Path, manifest: Manifest) -> bool:
    """Whether the library's own index is there and says what the manifest says."""
    try:
        # A shard's entry is a little longer than the manifest's.
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
    """Where the first of so many samples begins."""
    return 4 + 4 * (samples + 1) + len(_CONFIG_BYTES)
