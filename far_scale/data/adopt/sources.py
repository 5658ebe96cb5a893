"""Which shards are adopted: tars and MDS sets by paths, folders, lists, URLs, and any of these with braces."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import pydantic
from braceexpand import braceexpand

from far_scale.data.remote.fetch import fetch_bytes, is_file_url, shown
from far_scale.data.remote.unpack import compression_of
from far_scale.data.shards.mds import STREAMING_INDEX_NAME
from far_scale.data.shards.typed import MAX_MANIFEST_BYTES, Place, read_small
from far_scale.errors import UserError
from far_scale.files import text_lines

_MAX_SHARDS = 300_000  # as many as a manifest may name
_MOST_BYTES = (1 << 32) - 1  # of an MDS file
_PLACE: pydantic.TypeAdapter[str] = pydantic.TypeAdapter(Place)


class FoundShard(NamedTuple):
    """A shard to adopt: its absolute path or URL, and of an MDS file its size, unpacked."""

    place: str
    bytes: int | None = None

    @property
    def is_mds(self) -> bool:
        return self.bytes is not None


def find_shards(sources: Sequence[str]) -> list[FoundShard]:
    """The shards in their order.

    Args:
        sources: tars; folders, of which all `.tar` at any depth are taken in the order of their names; folders with an
            `index.json` of mosaicml-streaming, or such a file; `.txt` files with a source a line; URLs of tars and of
            `index.json`. `{000..123}` and `{a,b}` are expanded as by WebDataset.

    Raises:
        UserError: a source that is not there, is named twice or has a name that a manifest cannot hold; shards of
            several kinds.
    """
    found = list(itertools.islice(_expand(sources, Path()), _MAX_SHARDS + 1))
    first = shown(found[0].place)
    if len(found) > _MAX_SHARDS:
        raise UserError(f"{first}, ...: more than {_MAX_SHARDS} shards; adopt them as several sets, and mix these")
    seen = set()
    for place, _ in found:
        try:
            _PLACE.validate_python(place)
            place.encode()
        except (pydantic.ValidationError, UnicodeEncodeError):
            raise UserError(f"{shown(place)!r}: a shard's name must be UTF-8 without braces; rename it") from None
        if place in seen:
            raise UserError(f"{shown(place)}: this shard is named twice; name it once")
        seen.add(place)
    for one, other, kinds in (
        ("remote", "here", {is_file_url(shard.place) for shard in found}),
        ("tars", "MDS files", {shard.is_mds for shard in found}),
        ("compressed", "not", {compression_of(shard.place) is None for shard in found}),
    ):
        if len(kinds) > 1:
            raise UserError(f"{first}, ...: some shards are {one} and some are {other}; adopt them as two sets")
    return found


def _expand(sources: Sequence[str], folder: Path) -> Iterator[FoundShard]:
    """The shards of these sources; relative paths begin at `folder`."""
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
            tars = sorted(path.rglob("*.tar"))
            if not tars:
                raise UserError(f"{path}: there is no .tar or index.json in this folder; name the shards themselves")
            yield from (FoundShard(os.path.abspath(tar)) for tar in tars)
        elif path.name == STREAMING_INDEX_NAME and path.is_file():
            yield from _mds_shards(os.path.abspath(path))
        elif path.suffix == ".txt" and path.is_file():
            for _, line in text_lines(path, "list of shards"):
                yield from _expand([line], path.parent)
        elif path.is_file():
            yield FoundShard(os.path.abspath(path))
        else:
            for each in _braces(str(path)):
                if not os.path.isfile(each):
                    raise UserError(f"{each}: there is no such shard; name a tar, a folder, a .txt list or a URL")
                yield FoundShard(os.path.abspath(each))


def _braces(text: str) -> Iterator[str]:
    try:
        yield from braceexpand(text, escape=False)
    except ValueError:
        raise UserError(f"{shown(text)}: its braces do not close; write a range as {{000..123}}") from None


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
        sizes = [each["raw_data"]["bytes"] for each in shards if each["format"] == "mds" and each["version"] == 2]
        if not listed or len(sizes) < len(listed) or not all(type(n) is int and 0 < n <= _MOST_BYTES for n in sizes):
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"{shown(index)}: no index of MDS shards as mosaicml-streaming writes it; name another"
        ) from None
    for (raw, packed), size in zip(listed, sizes, strict=True):
        if remote:
            yield FoundShard(_beside(index, packed or raw), size)
            continue
        there = [file for file in (raw, packed) if file and os.path.isfile(_beside(index, file))]
        if not there:
            raise UserError(f"{_beside(index, packed or raw)}: this shard is missing; copy it again")
        yield FoundShard(_beside(index, there[0]), size)


def _basename(data: Any) -> str:
    """The path of a shard's file below the folder of its index."""
    path = PurePosixPath(data["basename"])
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError
    return str(path)


def _beside(index: str, file: str) -> str:
    if not is_file_url(index):
        return str(Path(index).parent / file)
    parts = urlsplit(index)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{file}"))
