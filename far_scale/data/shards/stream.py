"""Reading shards front to back, from files or URLs, without manifest or index.

WebDataset opens the URLs; tars and MDS files are walked by our own readers, which believe nothing that stands in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.members import BadShardError, ForeignMemberError
from far_scale.data.shards.sample import Mismatch, Sample, from_members, members_of, walk
from far_scale.utils.errors import UserError


def stream(source: str | Path | Sequence[str]) -> Iterator[Sample]:
    """All samples in order: of a shard set's folder, or of shards by path or URL, as WebDataset's `gopen` takes them.

    Raises:
        UserError: no shard set in the folder, or a shard that is missing, cut off or not one of ours.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        manifest = Manifest.read(folder)
        if manifest.adopted is not None:
            raise UserError(f"{folder}: is adopted; read it by its indexes, or convert it (tools/convert_shards.py)")
        source = [str(folder / shard.file) for shard in manifest.shards]
    for url in source:
        try:
            yield from _stream_one(url)
        except (Mismatch, ForeignMemberError) as problem:
            raise UserError(f"{url}: not a shard of far_scale ({problem}); encode the videos again") from None
        except FileNotFoundError:
            raise UserError(f"{url}: this shard is missing; copy it again, or encode the set again") from None
        except BadShardError as problem:
            raise UserError(f"{url}: not {problem.format}, or cut off ({problem}); copy it again") from None
        except (OSError, ValueError) as problem:  # a command or server that fails; a URL that `gopen` does not know
            why = " ".join(str(problem).split())
            raise UserError(f"{url}: cannot be read ({why}); look at the URL, and whether it is in reach") from None


def _stream_one(url: str) -> Iterator[Sample]:
    from webdataset import gopen

    with gopen(url) as file:
        for row, facts, tensors in walk(members_of(url, file), data=True):
            yield from_members(row.key, tensors, facts)
