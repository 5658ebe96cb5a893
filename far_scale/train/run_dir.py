"""The run directory: the checkpoint that a run resumes from, and the run that the directory belongs to.

Loads no torch, so that the launchers can use it in a job that is being killed.

    checkpoints/step-00001000/   a checkpoint
    checkpoints/latest           the name of the checkpoint to resume from
    identity                     the run's identity
    identity.place               the directory that the identity was given to
    lease.json                   the job that trains here now, see `lease`
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Any

from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, read_json, write_json

_STEP = re.compile(r"step-(\d{8})")


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damaged_folder(folder: Path) -> Path:
    """The name of a checkpoint after `quarantine`."""
    return folder.with_name(folder.name + ".damaged")


def existing_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, newest first, whole or not."""
    matches = [_STEP.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted((int(match.group(1)) for match in matches if match), reverse=True)


def read_latest(run: Path) -> int | None:
    """The step that `latest` names; None where there is no such file.

    Raises:
        UserError: it names no checkpoint.
    """
    path = run / "checkpoints" / "latest"
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    match = _STEP.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{path}: this does not name a checkpoint; write the name of a folder beside it, step-XXXXXXXX")
    return int(match.group(1))


def steps_to_try(run: Path) -> list[int]:
    """The steps that a run can resume from, newest first.

    They begin with the one that `latest` names, so that a user can send a run back to an earlier checkpoint. Without
    `latest`, or if the checkpoint that it names is gone, they begin with the newest. A damaged one is not gone: a run
    that was sent back to it resumes from an earlier one, never from a later.

    Raises:
        UserError: `latest` is not readable; or there is no checkpoint, or only later ones, where it names one.
    """
    existing, named = existing_steps(run), read_latest(run)
    if named is not None and not existing:
        raise UserError(
            f"{run}/checkpoints/latest: names step {named}, and there is no checkpoint; put it back, or remove "
            "`latest` to train from the start"
        )
    if named is None or not (named in existing or damaged_folder(step_folder(run, named)).exists()):
        return existing
    up_to_named = [step for step in existing if step <= named]
    if existing and not up_to_named:
        raise UserError(no_step_up_to(run, named, existing))
    return up_to_named


def no_step_up_to(run: Path, named: int, existing: list[int]) -> str:
    """The error text if the checkpoint that `latest` names is damaged and all others are later."""
    later = ", ".join(step_folder(run, step).name for step in reversed(existing))
    return (
        f"{run}/checkpoints/latest: the checkpoint that it names, step {named}, is damaged, and there is none before; "
        f"write the name of a later one into it to resume from there: {later}"
    )


def latest_step(run: Path) -> int | None:
    """The first of `steps_to_try`; None where there is no checkpoint yet.

    Raises:
        UserError: as `steps_to_try`.
    """
    return next(iter(steps_to_try(run)), None)


def latest_stamp(run: Path) -> str | None:
    """A text that changes whenever `latest` is written; None where there is no such file.

    The name in it and its time in whole seconds: some file systems keep no fractions, or no inode numbers.
    """
    path = run / "checkpoints" / "latest"
    try:
        with open(path, "rb") as file:
            return f"{file.read(100).decode(errors='replace').strip()} {int(os.fstat(file.fileno()).st_mtime)}"
    except FileNotFoundError:
        return None


def directory_id(run: Path) -> dict[str, Any]:
    """The path and inode of a directory, recorded so that `is_copy` recognizes a copy."""
    return {"path": str(run.resolve()), "inode": run.stat().st_ino}


def is_copy(run: Path, recorded: Any) -> bool:
    """Whether the `recorded` directory (by `directory_id`) is another one than `run`.

    A renamed directory keeps its inode number; a restored one, or one on a file system without stable numbers, keeps
    its path.
    """
    now = directory_id(run)
    return isinstance(recorded, dict) and all(recorded.get(key) != now[key] for key in now)


def run_identity(run: Path) -> tuple[str, str | None]:
    """The identity of the run in a directory, made at the run's first start; a copy of a directory gets a new one.

    It names the node-local checkpoints and the wandb run. Call it on one process.

    Returns:
        The identity, and, if the directory is a copy, a line that says so.
    """
    path, directory_path = run / "identity", run / "identity.place"
    identity = path.read_text().strip() if path.exists() else secrets.token_hex(8)
    recorded: Any = None
    with contextlib.suppress(UserError):  # an unreadable file counts as none
        recorded = read_json(directory_path, "place of a run")
    copied = None
    if isinstance(recorded, dict) and recorded.get("identity") == identity:
        if not is_copy(run, recorded):
            if recorded != (now := {"identity": identity, **directory_id(run)}):
                write_json(directory_path, now)  # renamed or restored: later copies are recognized by the new values
            return identity, None
        old, identity = identity, secrets.token_hex(8)
        copied = (
            f"{run} is a copy of {recorded.get('path')}: from now on it is the run {identity}, which does not use the "
            f"other's node-local checkpoints and wandb run; to continue as the other, write {old} into {path}"
        )
    with atomic_write(path) as temporary:
        temporary.write_text(identity + "\n")
    write_json(directory_path, {"identity": identity, **directory_id(run)})
    return identity, copied
