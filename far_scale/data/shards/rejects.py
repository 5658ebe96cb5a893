"""Videos that were not encoded, and why: `rejected.jsonl` of a shard set.

A shard's rejects lie in a file of their own (`rejected-000003.jsonl`) until the manifest is built, since each shard
is the work of one task. Then they are one file, in the order of the sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write

REJECTED_NAME = "rejected.jsonl"


class Reject(NamedTuple):
    """A video that was not encoded: its name and key as `Source` has them, and what is wrong with it."""

    source: str
    key: str
    reason: str


def rejects_of_shard(folder: Path, number: int) -> Path:
    """The file of one shard's rejects, there while the manifest is not built."""
    return folder / f"rejected-{number:06d}.jsonl"


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write rejects a line each, atomically; where there are none, there is no file, and one that is right is left."""
    text = "".join(json.dumps(reject._asdict()) + "\n" for reject in rejects)
    if not text:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_text() != text:
        with atomic_write(path) as beside:
            beside.write_text(text)


def read_rejects(folder: Path) -> dict[str, Reject]:
    """All rejects of a shard set by their keys, of the whole set's file and of single shards.

    Raises:
        UserError: a file of them is spoilt.
    """
    found = {}
    for path in [folder / REJECTED_NAME, *sorted(folder.glob("rejected-*.jsonl"))]:
        try:
            for line in filter(None, path.read_text().split("\n")):
                reject = Reject(**json.loads(line))
                if not all(isinstance(text, str) for text in reject):
                    raise TypeError
                found[reject.key] = reject
        except FileNotFoundError:  # there are none, or a merge has just put it into the whole set's
            continue
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path}: not the list of rejects that was written; remove it and encode again") from None
    return found


def check_share(folder: Path, rejects: Iterable[Reject], videos: int, allowed: float) -> None:
    """Refuse more rejects than the share `allowed` of all `videos`.

    Raises:
        UserError: there are more; with the first of them and its reason.
    """
    listed = list(rejects)
    if len(listed) > allowed * videos:
        first = listed[0]
        raise UserError(
            f"{folder}: {len(listed)} of {videos} videos are rejected, more than --max-rejected {allowed:g} allows, "
            f"first {first.source}: {first.reason}; all are in {folder}/rejected*.jsonl: mend them, or allow more"
        )
