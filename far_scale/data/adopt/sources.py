"""Which shards are adopted: tars and MDS sets by paths, folders, lists, URLs, and any of these with braces."""

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

_MAX_SHARDS = 300_000  # as many as a manifest may name
_MOST_BYTES = (1 << 32) - 1  # of an MDS file
_HASHES = {name for name in hashlib.algorithms_guaranteed if not name.startswith("shake")}
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd")
_PLACE: pydantic.TypeAdapter[str] = pydantic.TypeAdapter(Location)


class FoundShard(NamedTuple):
    """A shard to adopt: its absolute path or URL.

    Attributes:
        bytes: of an MDS file its size, unpacked.
        digest: name of a hash and digest of an MDS file, unpacked, where its `index.json` has one.
    """

    place: str
    bytes: int | None = None
    digest: tuple[str, str] | None = None

    @property
    def is_mds(self) -> bool:
        return self.bytes is not None


def find_shards(sources: Sequence[str]) -> list[FoundShard]:
    """The shards in their order.

    Args:
        sources: tars; folders, of which all `.tar` at any depth, links too, are taken in the order of their names, but
            not what is hidden; folders with an `index.json` of mosaicml-streaming, or such a file; `.txt` files with a
            source a line; URLs of tars and of `index.json`. `{000..123}` and `{a,b}` are expanded as by WebDataset.

    Raises:
        UserError: a source that is not there, is named twice, also by a link, or has a name that a manifest cannot
            hold; shards of several kinds.
    """
    found = list(itertools.islice(_expand(sources, Path()), _MAX_SHARDS + 1))
    if not found:
        raise UserError(f"{', '.join(sources)}: names no shard; name tars, folders, .txt lists or URLs")
    first = redact_url(found[0].place)
    if len(found) > _MAX_SHARDS:
        raise UserError(f"{first}, ...: more than {_MAX_SHARDS} shards; adopt them as several sets, and mix these")
    seen: dict[str | tuple[int, int], str] = {}
    for count, (place, *_) in enumerate(found):
        try:
            _PLACE.validate_python(place)
            place.encode()
        except (pydantic.ValidationError, UnicodeEncodeError):
            raise UserError(f"{redact_url(place)!r}: a shard's name must be UTF-8 without braces; rename it") from None
        if (other := seen.setdefault(_identity(place), place)) != place:
            raise UserError(f"{place}: is the same file as {other}; name it once")
        if len(seen) == count:
            raise UserError(f"{redact_url(place)}: this shard is named twice; name it once")
    for one, other, kinds in (
        ("remote", "here", {is_file_url(shard.place) for shard in found}),
        ("tars", "MDS files", {shard.is_mds for shard in found}),
        ("compressed", "not", {compression_of(shard.place) is None for shard in found}),
    ):
        if len(kinds) > 1:
            raise UserError(f"{first}, ...: some shards are {one} and some are {other}; adopt them as two sets")
    return found


def _identity(place: str) -> str | tuple[int, int]:
    """What is the same for two paths that lead to one file."""
    if is_file_url(place):
        return place
    facts = os.stat(place)
    return facts.st_dev, facts.st_ino


def _expand(sources: Sequence[str], folder: Path, lists: tuple[str, ...] = ()) -> Iterator[FoundShard]:
    """The shards of these sources; relative paths begin at `folder`, and `lists` are those that they stand in."""
    for source in sources:
        if is_file_url(source):
            for url in _braces(source):
                is_index = not url.startswith("pipe:") and urlsplit(url).path.endswith(f"/{STREAMING_INDEX_NAME}")
                yield from _mds_shards(url) if is_index else [FoundShard(url)]
            continue
        path = folder / source
        if path.is_dir() and (path / STREAMING_INDEX_NAME).is_file():
            yield from _mds_shards(os.path.abspath(path / STREAMING_INDEX_NAME))
        elif path.is_dir():
            yield from (FoundShard(os.path.abspath(tar)) for tar in _tars_below(path))
        elif path.name == STREAMING_INDEX_NAME and path.is_file():
            yield from _mds_shards(os.path.abspath(path))
        elif path.suffix == ".txt" and path.is_file():
            if (own := os.path.realpath(path)) in lists:
                raise UserError(f"{path}: this list names itself; take that line out")
            for _, line in text_lines(path, "list of shards"):
                yield from _expand([line], path.parent, (*lists, own))
        elif path.is_file() and path.suffix == ".mds":
            raise UserError(f"{path}: is an MDS file; name the index.json that lists it, or their folder")
        elif path.is_file():
            yield FoundShard(os.path.abspath(path))
        else:
            for each in _braces(str(path)):
                if not os.path.isfile(each):
                    raise UserError(f"{each}: there is no such shard; name a tar, a folder, a .txt list or a URL")
                yield FoundShard(os.path.abspath(each))


def _tars_below(folder: Path) -> list[Path]:
    """All tars of a folder; those that are compressed, which cannot be read by offset, are said to be passed over.

    Raises:
        UserError: there is none.
    """
    tars, packed = [], []
    for file in files_below(folder, (".tar",)):
        if file.suffix == ".tar":
            tars.append(file)
        elif file.name.endswith(_PACKED_TARS):
            packed.append(file)
    if not tars:
        raise UserError(f"{folder}: there is no .tar or index.json in this folder; name the shards themselves")
    if packed:
        print_warning(f"{folder}: passed over: {len(packed)} compressed tars, as {min(packed)}; unpack them first")
    return sorted(tars)


def _braces(text: str) -> Iterator[str]:
    try:
        yield from braceexpand(text, escape=False)
    except ValueError:
        raise UserError(f"{redact_url(text)}: its braces do not close; write a range as {{000..123}}") from None


def _mds_shards(index: str) -> Iterator[FoundShard]:
    """The shards of a set of mosaicml-streaming, by its `index.json`.

    Raises:
        UserError: it is none, or a shard is not there.
    """
    remote = is_file_url(index)
    text = fetch_bytes(index, MAX_MANIFEST_BYTES) if remote else read_small(Path(index), MAX_MANIFEST_BYTES)
    try:
        shards = json.loads(text)["shards"]
        listed = [(_basename(each["raw_data"]), each["zip_data"] and _basename(each["zip_data"])) for each in shards]
        digests = [_digest(each["raw_data"]) for each in shards]
        sizes = [each["raw_data"]["bytes"] for each in shards if each["format"] == "mds" and each["version"] == 2]
        if not listed or len(sizes) < len(listed) or not all(type(n) is int and 0 < n <= _MOST_BYTES for n in sizes):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(
            f"{redact_url(index)}: no index of MDS shards as mosaicml-streaming writes it; name another"
        ) from None
    for (raw, packed), size, digest in zip(listed, sizes, digests, strict=True):
        if remote:
            yield FoundShard(_beside(index, packed or raw), size, digest)
            continue
        there = [file for file in (raw, packed) if file and os.path.isfile(_beside(index, file))]
        if not there:
            raise UserError(f"{_beside(index, packed or raw)}: this shard is missing; copy it again")
        yield FoundShard(_beside(index, there[0]), size, digest)


def _basename(data: Any) -> str:
    """The path of a shard's file below the folder of its index."""
    path = PurePosixPath(data["basename"])
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError
    return str(path)


def _digest(data: Any) -> tuple[str, str] | None:
    """A digest of a shard's file by a hash that Python has, with its name: not by xxHash."""
    known = ((name, digest) for name, digest in data["hashes"].items() if name in _HASHES and type(digest) is str)
    return next(known, None)


def _beside(index: str, file: str) -> str:
    if not is_file_url(index):
        return str(Path(index).parent / file)
    parts = urlsplit(index)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{file}"))
