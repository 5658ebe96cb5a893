"""The folders of checkpoints: read, checked, finalized, committed, pruned, forked."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from far_scale.config.recipe import load_recipe
from far_scale.train.run_dir import damaged_folder, existing_steps, latest_step, step_folder
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog, lines_up_to
from far_scale.utils.io import atomic_write, read_json, sha256, sync_folder, write_json

FORMAT = "far_scale.checkpoint/2"
_FORMAT_WITHOUT_CHECKSUMS = "far_scale.checkpoint/1"
CHECKSUMS = "checksums.json"
EPHEMERAL = "ephemeral"
"""The key in state.json of a checkpoint that is removed after the next one."""


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        UserError: there is no checkpoint, or it is half-written or of another format.
    """
    if not folder.is_dir():
        run = folder.parent.parent
        existing = [step_folder(run, step).name for step in reversed(existing_steps(run))]
        raise UserError(f"{folder}: there is no such checkpoint; there are: {', '.join(existing) or 'none'}")
    if not (folder / ".metadata").exists() or not (folder / "state.json").exists():
        raise UserError(f"{folder}: this checkpoint is half-written; remove it and use an earlier one")
    state = read_json(folder / "state.json", "checkpoint state")
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, _FORMAT_WITHOUT_CHECKSUMS):
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"{folder}/state.json: format {found!r}, this version reads {FORMAT!r}")
    return state


def finalize(folder: Path, state: dict[str, Any], sums: dict[str, dict[str, Any]]) -> None:
    """Write state.json and checksums.json, and sync the folder.

    Args:
        sums: `checksums` of the other files, on this or other ranks.
    """
    text = write_json(folder / "state.json", {"format": FORMAT, **state}).encode()
    sums = {**sums, "state.json": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}}
    if ".metadata" not in sums:  # some PyTorch writes it in another way
        sums |= checksums([folder / ".metadata"])
    write_json(folder / CHECKSUMS, dict(sorted(sums.items())))
    sync_folder(folder)


def checksums(files: Any) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each of the files, by name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first problem of a checkpoint, in one line that names the file; None if it is whole.

    Args:
        folder: the checkpoint.
        part, parts: check every `parts`-th file from number `part` on, so that ranks can share the work.
    """
    try:
        state = read_state(folder)
        if state["format"] == _FORMAT_WITHOUT_CHECKSUMS:
            return None
        sums = read_json(folder / CHECKSUMS, "list of checksums")
    except UserError as error:
        return str(error)
    if not isinstance(sums, dict) or not {".metadata", "state.json"} <= sums.keys():
        return f"{folder / CHECKSUMS}: this is not a list of checksums"
    for name in sorted(sums)[part::parts]:
        path, expected = folder / name, sums[name]
        if not isinstance(expected, dict):
            return f"{folder / CHECKSUMS}: this is not a list of checksums"
        if not path.is_file():
            return f"{path}: this file is missing"
        if path.stat().st_size != expected.get("bytes"):
            return f"{path}: has {path.stat().st_size} bytes, was written with {expected.get('bytes')}"
        if sha256(path) != expected.get("sha256"):
            return f"{path}: does not have the SHA-256 it was written with"
    return None


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names, sizes and SHA-256 of a checkpoint's files, which identifies its content.

    Trusts checksums.json; `damage` verifies it.
    """
    if (folder / CHECKSUMS).is_file():
        sums = read_json(folder / CHECKSUMS, "list of checksums")
    else:  # of the format before there were checksums
        sums = checksums(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def is_ephemeral(folder: Path) -> bool:
    """Whether a checkpoint is removed after the next one; False if its state cannot be read."""
    try:
        state = read_json(folder / "state.json", "checkpoint state")
    except UserError:
        return False
    return isinstance(state, dict) and state.get(EPHEMERAL) is True


def commit(temporary: Path, folder: Path, keep: int, ephemeral: bool = False) -> None:
    """Give a written checkpoint its name, point `latest` at it, then remove all but the newest `keep` up to it.

    Ephemeral ones are not counted, and all before this one are removed. Later ones, of a run that was sent back to an
    earlier checkpoint, stay until they are overwritten.
    """
    if folder.exists():  # of a run that died between this rename and `latest`, or went back
        _remove(folder)
    temporary.rename(folder)
    sync_folder(folder.parent)
    point_at(folder)
    run = folder.parent.parent
    earlier = [old for step in existing_steps(run) if (old := step_folder(run, step)).name < folder.name]
    ephemeral_ones = [old for old in earlier if is_ephemeral(old)]
    lasting = [old for old in earlier if old not in ephemeral_ones]
    for old in [*lasting[keep if ephemeral else keep - 1 :], *ephemeral_ones]:
        _remove(old)


def point_at(folder: Path) -> None:
    """Make `latest` name this checkpoint."""
    with atomic_write(folder.parent / "latest") as latest:
        latest.write_text(folder.name + "\n")


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is not loaded; returns its new path."""
    damaged = damaged_folder(folder)
    if folder.exists():
        _remove_tree(damaged)
        folder.rename(damaged)
    return damaged


def clear_parts(checkpoints: Path) -> None:
    """Remove half-written and half-removed files of runs that died."""
    for part in checkpoints.glob("step-*.part"):
        _remove_tree(part)
    for part in checkpoints.glob(".latest.*.part"):
        part.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    # Rename first, so that a kill leaves no half-removed checkpoint under this name.
    part = folder.with_name(folder.name + ".old.part")
    _remove_tree(part)
    folder.rename(part)
    _remove_tree(part)


def _remove_tree(path: Path) -> None:
    """Remove a folder, or a link (to a checkpoint that was moved to another disk) but not its target."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def fork(run: Path, step: int | None, out: Path) -> int:
    """Make `out` a new run, with an identity of its own, that resumes from a checkpoint of `run`.

    It gets the checkpoint, the lines of log.jsonl up to it, and the recipe with its own run_dir. `run` is only read.

    Args:
        run: a run directory.
        step: of the checkpoint; None for the one that the run would resume from.
        out: the new run directory, which must not exist.

    Returns:
        The step.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or `out` exists.
    """
    step = latest_step(run) if step is None else step
    if step is None:
        raise UserError(f"{run}/checkpoints: there is no checkpoint to fork")
    folder = step_folder(run, step)
    if (problem := damage(folder)) is not None:
        raise UserError(problem)
    if out.exists():
        raise UserError(f"{out}: exists already; name a folder that does not")
    recipe = load_recipe(str(run / "recipe.yaml"), [f"run_dir={out}"])
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(folder, step_folder(temporary, step))
        point_at(step_folder(temporary, step))
        recipe.save(temporary / "recipe.yaml")
        (temporary / "log.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in lines_up_to(run / "log.jsonl", step))
        )
        EventLog(temporary, is_main_process=True).emit(
            "forked", step, f"{out} resumes from step {step} of {run}", source=str(run)
        )
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return step
