"""The folders that checkpoints lie in: which there are, which is whole, which may go."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from far_scale.train.checkpoint.run_dir import damaged_folder, step_folder, steps_there
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, read_json, sha256, sync_folder, write_json

FORMAT = "far_scale.checkpoint/2"
_UNSEALED = "far_scale.checkpoint/1"  # before there were checksums
CHECKSUMS = "checksums.json"
EPHEMERAL = "ephemeral"
"""The key in state.json of a checkpoint that stays only until the next one."""


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        UserError: there is no checkpoint, it is half-written, or of another format.
    """
    if not folder.is_dir():
        there = [step_folder(folder.parent.parent, step).name for step in reversed(steps_there(folder.parent.parent))]
        raise UserError(f"{folder}: there is no such checkpoint; there are: {', '.join(there) or 'none'}")
    if not (folder / ".metadata").exists() or not (folder / "state.json").exists():
        raise UserError(f"{folder}: this checkpoint is half-written; remove it and use an earlier one")
    state = read_json(folder / "state.json", "checkpoint state")
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, _UNSEALED):
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"{folder}/state.json: format {found!r}, this version reads {FORMAT!r}")
    return state


def finalize(folder: Path, state: dict[str, Any], sums: dict[str, dict[str, Any]]) -> None:
    """Write state.json and, over it and all other files, checksums.json; then make the folder durable.

    Args:
        sums: `checksums` of the other files.
    """
    text = write_json(folder / "state.json", {"format": FORMAT, **state}).encode()
    own = {"state.json": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}}
    if ".metadata" not in sums:  # of a PyTorch that writes it in another way
        own |= checksums([folder / ".metadata"])
    write_json(folder / CHECKSUMS, dict(sorted({**sums, **own}.items())))
    sync_folder(folder)


def checksums(files: Any) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each of the files, by name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, in one line that names the file; None where it is whole.

    Args:
        folder: the checkpoint.
        part, parts: check each `parts`-th file from number `part` on, so that ranks can share the work.
    """
    try:
        state = read_state(folder)
        if state["format"] == _UNSEALED:
            return None
        sums = read_json(folder / CHECKSUMS, "list of checksums")
    except UserError as error:
        return str(error)
    if not isinstance(sums, dict) or not {".metadata", "state.json"} <= sums.keys():
        return f"{folder / CHECKSUMS}: this is no list of checksums"
    for name in sorted(sums)[part::parts]:
        path, expected = folder / name, sums[name]
        if not isinstance(expected, dict):
            return f"{folder / CHECKSUMS}: this is no list of checksums"
        if not path.is_file():
            return f"{path}: this file is missing"
        if path.stat().st_size != expected.get("bytes"):
            return f"{path}: has {path.stat().st_size} bytes, was written with {expected.get('bytes')}"
        if sha256(path) != expected.get("sha256"):
            return f"{path}: does not have the SHA-256 it was written with"
    return None


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names, sizes and SHA-256 of a checkpoint's files: the same for the same content alone.

    That the files are those of the checksums is not looked at, see `damage`.
    """
    if (folder / CHECKSUMS).is_file():
        sums = read_json(folder / CHECKSUMS, "list of checksums")
    else:  # of the format before there were checksums
        sums = checksums(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def is_ephemeral(folder: Path) -> bool:
    """Whether a checkpoint stays only until the next one; False where that cannot be read."""
    try:
        state = read_json(folder / "state.json", "checkpoint state")
    except UserError:
        return False
    return isinstance(state, dict) and state.get(EPHEMERAL) is True


def commit(beside: Path, folder: Path, keep: int, ephemeral: bool = False) -> None:
    """Give a written checkpoint its name, point `latest` at it, then remove all but the newest `keep` up to it.

    Ephemeral ones are not counted, and all before this one are removed. Later ones, of a run that went back to an
    earlier checkpoint, are left where they are until they are overwritten.
    """
    if folder.exists():  # of a run that died between this rename and `latest`, or went back
        _remove(folder)
    beside.rename(folder)
    sync_folder(folder.parent)
    point_at(folder)
    run = folder.parent.parent
    before = [old for step in steps_there(run) if (old := step_folder(run, step)).name < folder.name]
    passing = [old for old in before if is_ephemeral(old)]
    lasting = [old for old in before if old not in passing]
    for old in [*lasting[keep if ephemeral else keep - 1 :], *passing]:
        _remove(old)


def point_at(folder: Path) -> None:
    """Make `latest` name this checkpoint."""
    with atomic_write(folder.parent / "latest") as latest:
        latest.write_text(folder.name + "\n")


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for a whole one; returns where it is now."""
    aside = damaged_folder(folder)
    if folder.exists():
        _clear(aside)
        folder.rename(aside)
    return aside


def clear_parts(checkpoints: Path) -> None:
    """Remove what runs that died have left half-written or half-removed."""
    for part in checkpoints.glob("step-*.part"):
        _clear(part)
    for part in checkpoints.glob(".latest.*.part"):
        part.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    # Under another name first: killed in the middle of it, no half of a checkpoint is left under this one.
    part = folder.with_name(folder.name + ".old.part")
    _clear(part)
    folder.rename(part)
    _clear(part)


def _clear(path: Path) -> None:
    """Remove a folder; of a link, as to a checkpoint that was moved to another disk, only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
