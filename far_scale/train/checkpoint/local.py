"""Checkpoints on the nodes' own disks: cheap enough to be frequent, good for a restart with the same ranks in the
same places, as after a crash. Every rank writes and reads its own file; none waits for another.

    LOCAL_DIR/RUN-IDENTITY/step-00000100/rank-00003-of-00016.safetensors   its pieces
                                         rank-00003-of-00016.json          their places, checksum, the run's state
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from far_scale.config.schema import CheckpointSection
from far_scale.distributed.process_group import all_gather_objects
from far_scale.train.checkpoint.folders import checksums
from far_scale.train.checkpoint.hashed import save_tensors
from far_scale.train.checkpoint.pieces import FlatPiece
from far_scale.utils.io import atomic_write, parse_json, read_json, write_json

KEEP = 2  # a kill in mid-save leaves some ranks with the newer one, but all with the older one


def folder_of(section: CheckpointSection, run: Path, identity: str) -> Path | None:
    """Where a run's files lie on this node, if the recipe wants any.

    Args:
        identity: what tells this run from an earlier one in the same run directory.
    """
    return None if section.local_dir is None else Path(section.local_dir) / f"{run.name}-{identity}"


def save(
    folder: Path,
    step: int,
    rank: int,
    count: int,
    pieces: Mapping[str, FlatPiece],
    state: dict[str, Any],
    latest: str | None,
) -> None:
    """Write this rank's file, then remove its other ones but the `KEEP` newest up to it.

    Args:
        folder: of this run on this node.
        step: steps done.
        rank, count: this rank, of how many.
        pieces: what it holds, by the tensors' names.
        state: as in state.json.
        latest: `latest_stamp` of the run.

    Raises:
        UserError: the disk is full.
    """
    path = _file(folder, step, rank, count)
    with atomic_write(path) as beside:
        written = save_tensors({name: piece.data for name, piece in pieces.items()}, beside)
    described = {
        "places": _places(pieces),
        "file": {path.name: written},
        "latest": latest,
        "state": {"step": step, **state},
    }
    write_json(path.with_suffix(".json"), described)
    own = sorted(folder.glob(f"step-{8 * '[0-9]'}/{path.stem}.json"), reverse=True)
    # Later ones are of a history that the run left; kept, they would push out those of this one.
    later = [old for old in own if old.parent.name > path.parent.name]
    for old in [*later, *own[len(later) + KEEP :]]:
        old.with_suffix(".safetensors").unlink(missing_ok=True)
        old.unlink()
        if not any(old.parent.iterdir()):
            old.parent.rmdir()


def newest(
    folder: Path,
    above: int,
    rank: int,
    count: int,
    pieces: Mapping[str, FlatPiece],
    latest: str | None,
    group: dist.ProcessGroup | None,
) -> int | None:
    """The newest step above `above` of which every rank finds its own whole file; None where there is none.

    All ranks of `group` call this and get the same answer. `pieces` are what this rank holds now: another rank count
    or ZeRO stage needs other pieces, and finds nothing.

    Args:
        latest: `latest_stamp` of the run now. Files that were written when it was another do not count: somebody has
            sent the run back to an earlier checkpoint since, and they are of the history that this run left.
    """
    fitting = []
    for sidecar in folder.glob(f"step-{8 * '[0-9]'}/{_file(folder, 0, rank, count).stem}.json"):
        step = int(sidecar.parent.name.removeprefix("step-"))
        if step > above and _is_whole(sidecar, pieces, latest):
            fitting.append(step)
    of_all = all_gather_objects(fitting, group)
    return max(set(of_all[0]).intersection(*of_all[1:]), default=None)


def read_state(folder: Path, step: int, rank: int, count: int) -> dict[str, Any]:
    """The run's state at a step that `newest` named."""
    path = _file(folder, step, rank, count).with_suffix(".json")
    return read_json(path, "node-local checkpoint")["state"]


def load(folder: Path, step: int, rank: int, count: int, pieces: Mapping[str, FlatPiece]) -> None:
    """Fill `pieces` in place from this rank's file of a step that `newest` named."""
    with torch.no_grad():
        for name, tensor in load_file(_file(folder, step, rank, count)).items():
            pieces[name].data.copy_(tensor)


def _file(folder: Path, step: int, rank: int, count: int) -> Path:
    return folder / f"step-{step:08d}" / f"rank-{rank:05d}-of-{count:05d}.safetensors"


def _places(pieces: Mapping[str, FlatPiece]) -> dict[str, list[int]]:
    """Where in the whole tensors the pieces lie: [total, offset, length] by name."""
    return {name: [piece.total, piece.offset, piece.data.numel()] for name, piece in pieces.items()}


def _is_whole(sidecar: Path, pieces: Mapping[str, FlatPiece], latest: str | None) -> bool:
    try:
        described = parse_json(sidecar.read_text())
        if described["places"] != _places(pieces) or described["latest"] != latest:
            return False
        return described["file"] == checksums([sidecar.with_suffix(".safetensors")])
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or written by a version before `latest`
        return False
