"""Finds the shards to adopt: tars and MDS sets, by paths, folders, lists and URLs, with brace expansion."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import pydantic
from braceexpand import braceexpand

from far_scale.data.remote.compression import compression_of
from far_scale.data.remote.fetch import fetch_bytes
from far_scale.data.shards.mds import STREAMING_INDEX_NAME
from far_scale.data.shards.records import MAX_MANIFEST_BYTES, Location, read_small
from far_scale.data.video.find import files_below
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import text_lines
from far_scale.utils.urls import is_file_url, redact_url

_MAX_SHARDS = 300_000  # limit of a manifest
_MAX_MDS_BYTES = (1 << 32) - 1
_HASHES = {name for name in hashlib.algorithms_guaranteed if not name.startswith("shake")}
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd")
_LOCATION: pydantic.TypeAdapter[str] = pydantic.TypeAdapter(Location)


class SourceShard(NamedTuple):
    """A shard to adopt.

    Attributes:
        location: absolute path or URL.
        bytes: uncompressed size of an MDS file; None for a tar.
        digest: hash name and digest of the uncompressed MDS file, if its `index.json` has one.
    """

    location: str
    bytes: int | None = None
    digest: tuple[str, str] | None = None

    @property
    def is_mds(self) -> bool:
        return self.bytes is not None


def find_shards(sources: Sequence[str]) -> list[SourceShard]:
    """Find the shards in their order.

    Args:
        sources: tars; folders, whose `.tar` files at any depth are taken in path order, through links but without
            hidden files; folders with an `index.json` of mosaicml-streaming, or such a file; `.txt` files with one
            source per line; URLs of tars and of `index.json`. `{000..123}` and `{a,b}` are expanded as in WebDataset.

    Raises:
        UserError: a source that is missing, repeated (also through a link), or has a name that a manifest cannot
            store; shards of several kinds.
    """
    shards = list(itertools.islice(_expand(sources, Path()), _MAX_SHARDS + 1))
    if not shards:
        raise UserError(f"{', '.join(sources)}: names no shard; name tars, folders, .txt lists or URLs")
    first = redact_url(shards[0].location)
    if len(shards) > _MAX_SHARDS:
        raise UserError(f"{first}, ...: more than {_MAX_SHARDS} shards; adopt them as several sets, and mix these")
    seen: dict[str | tuple[int, int], str] = {}
    for count, (location, *_) in enumerate(shards):
        try:
            _LOCATION.validate_python(location)
            location.encode()
        except (pydantic.ValidationError, UnicodeEncodeError):
            raise UserError(
                f"{redact_url(location)!r}: a shard's name must be UTF-8 without braces; rename it"
            ) from None
        if (other := seen.setdefault(_identity(location), location)) != location:
            raise UserError(f"{location}: is the same file as {other}; name it once")
        if len(seen) == count:
            raise UserError(f"{redact_url(location)}: this shard is named twice; name it once")
    for kind, other_kind, kinds in (
        ("remote", "local", {is_file_url(shard.location) for shard in shards}),
        ("tars", "MDS files", {shard.is_mds for shard in shards}),
        ("compressed", "not", {compression_of(shard.location) is None for shard in shards}),
    ):
        if len(kinds) > 1:
            raise UserError(f"{first}, ...: some shards are {kind} and some are {other_kind}; adopt them as two sets")
    return shards


def _identity(location: str) -> str | tuple[int, int]:
    """A key that is equal for two paths of one file."""
    if is_file_url(location):
        return location
    status = os.stat(location)
    return status.st_dev, status.st_ino


def _expand(sources: Sequence[str], folder: Path, lists: tuple[str, ...] = ()) -> Iterator[SourceShard]:
    """Expand sources to shards; paths are relative to `folder`, and `lists` are the lists that contain the sources."""
    for source in sources:
        if is_file_url(source):
            for url in _expand_braces(source):
                is_index = not url.startswith("pipe:") and urlsplit(url).path.endswith(f"/{STREAMING_INDEX_NAME}")
                yield from _mds_shards(url) if is_index else [SourceShard(url)]
            continue
        path = folder / source
        if path.is_dir() and (path / STREAMING_INDEX_NAME).is_file():
            yield from _mds_shards(os.path.abspath(path / STREAMING_INDEX_NAME))
        elif path.is_dir():
            yield from (SourceShard(os.path.abspath(tar)) for tar in _tars_below(path))
        elif path.name == STREAMING_INDEX_NAME and path.is_file():
            yield from _mds_shards(os.path.abspath(path))
        elif path.suffix == ".txt" and path.is_file():
            if (list_path := os.path.realpath(path)) in lists:
                raise UserError(f"{path}: this list names itself; take that line out")
            for _, line in text_lines(path, "list of shards"):
                yield from _expand([line], path.parent, (*lists, list_path))
        elif path.is_file() and path.suffix == ".mds":
            raise UserError(f"{path}: is an MDS file; name the index.json that lists it, or their folder")
        elif path.is_file():
            yield SourceShard(os.path.abspath(path))
        else:
            for file in _expand_braces(str(path)):
                if not os.path.isfile(file):
                    raise UserError(f"{file}: there is no such shard; name a tar, a folder, a .txt list or a URL")
                yield SourceShard(os.path.abspath(file))


def _tars_below(folder: Path) -> list[Path]:
    """All tars below a folder. Compressed tars, which cannot be read by offset, are skipped with a warning.

    Raises:
        UserError: there are none.
    """
    tars, compressed = [], []
    for file in files_below(folder, (".tar",)):
        if file.suffix == ".tar":
            tars.append(file)
        elif file.name.endswith(_COMPRESSED_TARS):
            compressed.append(file)
    if not tars:
        raise UserError(f"{folder}: there is no .tar or index.json in this folder; name the shards themselves")
    if compressed:
        print_warning(
            f"{folder}: skipped {len(compressed)} compressed tars, such as {min(compressed)}; unpack them first"
        )
    return sorted(tars)


def _expand_braces(text: str) -> Iterator[str]:
    try:
        yield from braceexpand(text, escape=False)
    except ValueError:
        raise UserError(f"{redact_url(text)}: its braces do not close; write a range as {{000..123}}") from None


def _mds_shards(index: str) -> Iterator[SourceShard]:
    """The shards in an `index.json` of mosaicml-streaming.

    Raises:
        UserError: it is no such index, or a shard is missing.
    """
    is_remote = is_file_url(index)
    text = fetch_bytes(index, MAX_MANIFEST_BYTES) if is_remote else read_small(Path(index), MAX_MANIFEST_BYTES)
    try:
        shards = json.loads(text)["shards"]
        files = [(_basename(shard["raw_data"]), shard["zip_data"] and _basename(shard["zip_data"])) for shard in shards]
        digests = [_known_digest(shard["raw_data"]) for shard in shards]
        sizes = [shard["raw_data"]["bytes"] for shard in shards if shard["format"] == "mds" and shard["version"] == 2]
        if not files or len(sizes) < len(files) or not all(type(n) is int and 0 < n <= _MAX_MDS_BYTES for n in sizes):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(
            f"{redact_url(index)}: no index of MDS shards as mosaicml-streaming writes it; name another"
        ) from None
    for (raw, packed), size, digest in zip(files, sizes, digests, strict=True):
        if is_remote:
            yield SourceShard(_beside(index, packed or raw), size, digest)
            continue
        existing = [file for file in (raw, packed) if file and os.path.isfile(_beside(index, file))]
        if not existing:
            raise UserError(f"{_beside(index, packed or raw)}: this shard is missing; copy it again")
        yield SourceShard(_beside(index, existing[0]), size, digest)


def _basename(data: Any) -> str:
    """Path of a shard's file below the folder of its index."""
    path = PurePosixPath(data["basename"])
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError
    return str(path)


def _known_digest(data: Any) -> tuple[str, str] | None:
    """Name and digest of the first hash that hashlib has (xxHash is none)."""
    known = ((name, digest) for name, digest in data["hashes"].items() if name in _HASHES and type(digest) is str)
    return next(known, None)


def _beside(index: str, file: str) -> str:
    """Path or URL of a file in the folder of an index."""
    if not is_file_url(index):
        return str(Path(index).parent / file)
    parts = urlsplit(index)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{file}"))
