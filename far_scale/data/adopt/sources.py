"""Which shards are adopted: paths, folders, lists, URLs, and any of these with braces."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pydantic

from far_scale.data.remote.fetch import is_file_url, shown
from far_scale.data.shards.typed import Place
from far_scale.errors import UserError
from far_scale.files import text_lines

_MAX_SHARDS = 300_000  # as many as a manifest may name
_PLACE: pydantic.TypeAdapter[str] = pydantic.TypeAdapter(Place)


def find_shards(sources: Sequence[str]) -> list[str]:
    """The shards in their order, each an absolute path or a URL.

    Args:
        sources: tars; folders, of which all `.tar` at any depth are taken in the order of their names; `.txt` files
            with a source a line; URLs. `{000..123}` and `{a,b}` are expanded as by WebDataset.

    Raises:
        UserError: a source that is not there, is named twice or has a name that a manifest cannot hold; some are here
            and some remote.
    """
    found = list(itertools.islice(_expand(sources, Path()), _MAX_SHARDS + 1))
    if len(found) > _MAX_SHARDS:
        raise UserError(
            f"{shown(found[0])}, ...: more than {_MAX_SHARDS} shards; adopt them as several sets, and mix these"
        )
    seen = set()
    for place in found:
        try:
            _PLACE.validate_python(place)
            place.encode()
        except (pydantic.ValidationError, UnicodeEncodeError):
            raise UserError(f"{shown(place)!r}: a shard's name must be UTF-8 without braces; rename it") from None
        if place in seen:
            raise UserError(f"{shown(place)}: this shard is named twice; name it once")
        seen.add(place)
    if len({is_file_url(place) for place in found}) > 1:
        raise UserError(f"{shown(found[0])}, ...: some shards are remote and some are here; adopt them as two sets")
    return found


def _expand(sources: Sequence[str], folder: Path) -> Iterator[str]:
    """The shards of these sources; relative paths begin at `folder`."""
    for source in sources:
        if is_file_url(source):
            yield from _braces(source)
            continue
        path = folder / source
        if path.is_dir():
            tars = sorted(path.rglob("*.tar"))
            if not tars:
                raise UserError(f"{path}: there is no .tar in this folder; name the shards themselves")
            yield from map(os.path.abspath, tars)
        elif path.suffix == ".txt" and path.is_file():
            for _, line in text_lines(path, "list of shards"):
                yield from _expand([line], path.parent)
        elif path.is_file():
            yield os.path.abspath(path)
        else:
            for each in _braces(str(path)):
                if not os.path.isfile(each):
                    raise UserError(f"{each}: there is no such shard; name a tar, a folder, a .txt list or a URL")
                yield os.path.abspath(each)


def _braces(text: str) -> Iterator[str]:
    from braceexpand import braceexpand  # webdataset's own

    try:
        yield from braceexpand(text, escape=False)
    except ValueError:
        raise UserError(f"{shown(text)}: its braces do not close; write a range as {{000..123}}") from None
