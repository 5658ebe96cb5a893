"""Checkpoints on the nodes' own disks: cheap enough to be frequent, for restarts with the same ranks and nodes.

Every rank writes and reads its own file; none waits for another.

    LOCAL_DIR/RUN-IDENTITY/step-00000100/rank-00003-of-00016.safetensors   its pieces
                                         rank-00003-of-00016.json          their offsets, checksum, the run's state
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

KEEP = 2  # a kill during a save leaves only some ranks with the newer one, but all with the older one


def local_run_folder(section: CheckpointSection, run: Path, identity: str) -> Path | None:
    """The folder of a run's files on this node; None if the recipe has none.

    Args:
        identity: of the run, which differs from that of an earlier run in the same run directory.
    """
    return None if section.local_dir is None else Path(section.local_dir) / f"{run.name}-{identity}"


def save(
    folder: Path,
    step: int,
    rank: int,
    world_size: int,
    pieces: Mapping[str, FlatPiece],
    state: dict[str, Any],
    latest: str | None,
) -> None:
    """Write this rank's file, then remove its others but the `KEEP` newest up to it.

    Args:
        folder: of this run on this node.
        step: steps done.
        rank, world_size: of this process.
        pieces: of this rank, by the tensors' names.
        state: as in state.json.
        latest: `latest_stamp` of the run.

    Raises:
        UserError: the disk is full.
    """
    path = _tensor_file(folder, step, rank, world_size)
    with atomic_write(path) as temporary:
        written = save_tensors({name: piece.data for name, piece in pieces.items()}, temporary)
    sidecar = {
        "places": _offsets(pieces),
        "file": {path.name: written},
        "latest": latest,
        "state": {"step": step, **state},
    }
    write_json(path.with_suffix(".json"), sidecar)
    sidecars = sorted(folder.glob(f"step-{8 * '[0-9]'}/{path.stem}.json"), reverse=True)
    # Later ones are of a history that the run left; they would push out those of this one.
    later = [old for old in sidecars if old.parent.name > path.parent.name]
    for old in [*later, *sidecars[len(later) + KEEP :]]:
        old.with_suffix(".safetensors").unlink(missing_ok=True)
        old.unlink()
        if not any(old.parent.iterdir()):
            old.parent.rmdir()


def newest(
    folder: Path,
    after: int,
    rank: int,
    world_size: int,
    pieces: Mapping[str, FlatPiece],
    latest: str | None,
    group: dist.ProcessGroup | None,
) -> int | None:
    """The newest step after `after` for which every rank finds its own whole file; None without one.

    All ranks of `group` call this and get the same step. `pieces` are those of this rank now: after a change of the
    rank count or ZeRO stage they differ, and no file matches.

    Args:
        latest: `latest_stamp` of the run now. Files that were written with another do not count: the run was sent back
            to an earlier checkpoint since, and they are of the history that it left.
    """
    matching = []
    for sidecar in folder.glob(f"step-{8 * '[0-9]'}/{_tensor_file(folder, 0, rank, world_size).stem}.json"):
        step = int(sidecar.parent.name.removeprefix("step-"))
        if step > after and _is_whole(sidecar, pieces, latest):
            matching.append(step)
    all_matching = all_gather_objects(matching, group)
    return max(set(all_matching[0]).intersection(*all_matching[1:]), default=None)


def read_state(folder: Path, step: int, rank: int, world_size: int) -> dict[str, Any]:
    """The run's state at a step from `newest`."""
    path = _tensor_file(folder, step, rank, world_size).with_suffix(".json")
    state: dict[str, Any] = read_json(path, "node-local checkpoint")["state"]
    return state


def load(folder: Path, step: int, rank: int, world_size: int, pieces: Mapping[str, FlatPiece]) -> None:
    """Load `pieces` in place from this rank's file of a step from `newest`."""
    with torch.no_grad():
        for name, tensor in load_file(_tensor_file(folder, step, rank, world_size)).items():
            pieces[name].data.copy_(tensor)


def _tensor_file(folder: Path, step: int, rank: int, world_size: int) -> Path:
    return folder / f"step-{step:08d}" / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def _offsets(pieces: Mapping[str, FlatPiece]) -> dict[str, list[int]]:
    """[total, offset, length] of the pieces in the whole tensors, by name."""
    return {name: [piece.total, piece.offset, piece.data.numel()] for name, piece in pieces.items()}


def _is_whole(sidecar: Path, pieces: Mapping[str, FlatPiece], latest: str | None) -> bool:
    try:
        content = parse_json(sidecar.read_text())
        if content["places"] != _offsets(pieces) or content["latest"] != latest:
            return False
        return bool(content["file"] == checksums([sidecar.with_suffix(".safetensors")]))
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or written by a version before `latest`
        return False
