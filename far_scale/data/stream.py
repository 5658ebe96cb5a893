"""Reading shards as any WebDataset reader does: in order, from files or URLs, without manifest or index."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from far_scale.data.manifest import Manifest
from far_scale.data.sample import Mismatch, Sample, from_members
from far_scale.errors import UserError


def stream(source: str | Path | Sequence[str]) -> Iterator[Sample]:
    """All samples in order, through WebDataset: of a shard set's folder, or of tars by path or URL.

    Raises:
        UserError: no shard set in the folder, or a tar that is missing, cut off or not one of ours.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        source = [str(folder / shard.file) for shard in Manifest.read(folder).shards]
    for url in source:
        try:
            yield from _stream_one(url)
        except Mismatch as problem:
            raise UserError(f"{url}: not a shard of far_scale ({problem}); encode the videos again") from None
        except FileNotFoundError:
            raise UserError(f"{url}: this shard is missing; copy it again, or encode the set again") from None
        except (tarfile.TarError, ValueError) as problem:
            raise UserError(f"{url}: not a tar file, or cut off ({problem.args[0]}); copy it again") from None


def _stream_one(url: str) -> Iterator[Sample]:
    import webdataset

    samples = 0
    # Each rank that streams wants all of it: WebDataset's own split among ranks is not asked for.
    for members in webdataset.WebDataset([url], shardshuffle=False, nodesplitter=_all_of_them, empty_check=False):
        key, kinds = members["__key__"], {name for name in members if not name.startswith("__")}
        if kinds != {"json", "safetensors"}:
            raise Mismatch(f"sample {key!r} holds {sorted(kinds)}, not json and safetensors")
        samples += 1
        yield from_members(key, members["safetensors"], members["json"])
    if samples == 0:
        raise Mismatch("there is no sample in it")


def _all_of_them(urls: Iterator[Any]) -> Iterator[Any]:
    return urls
