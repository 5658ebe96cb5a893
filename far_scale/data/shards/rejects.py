"""Rejected videos of a shard set and the reasons: `rejected.jsonl`.

Until the manifest is built, each shard has its own file (`rejected-000003.jsonl`), because each task encodes its own
shards. Then they are merged in the order of the sources.
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
    """A video that was not encoded: `Source`'s name and key, and what is wrong with it."""

    source: str
    key: str
    reason: str


def rejects_of_shard(folder: Path, number: int) -> Path:
    """Path of one shard's rejects before the manifest is built."""
    return folder / f"rejected-{number:06d}.jsonl"


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write one line for each reject, atomically. Without rejects the file is removed; an equal file is not touched."""
    text = "".join(json.dumps(reject._asdict()) + "\n" for reject in rejects)
    if not text:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_text() != text:
        with atomic_write(path) as temporary:
            temporary.write_text(text)


def read_rejects(folder: Path) -> dict[str, Reject]:
    """All rejects of a shard set by key, from the set's file and those of single shards.

    Raises:
        UserError: a file is damaged.
    """
    rejects = {}
    for path in [folder / REJECTED_NAME, *sorted(folder.glob("rejected-*.jsonl"))]:
        try:
            for line in filter(None, path.read_text().split("\n")):
                reject = Reject(**json.loads(line))
                if not all(isinstance(text, str) for text in reject):
                    raise TypeError
                rejects[reject.key] = reject
        except FileNotFoundError:  # there are none, or a merge has just removed it
            continue
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path}: not the list of rejects that was written; remove it and encode again") from None
    return rejects


def check_reject_rate(folder: Path, rejects: Iterable[Reject], videos: int, allowed: float) -> None:
    """Refuse more rejects than the fraction `allowed` of all `videos`.

    Raises:
        UserError: names the first reject and its reason.
    """
    listed = list(rejects)
    if len(listed) > allowed * videos:
        first = listed[0]
        raise UserError(
            f"{folder}: {len(listed)} of {videos} videos are rejected, more than --max-rejected {allowed:g} allows, "
            f"first {first.source}: {first.reason}; all are in {folder}/rejected*.jsonl: fix them, or allow more"
        )
