"""The run directory: which checkpoint a run goes on from, and which run the directory belongs to.

Loads no torch, so that the launchers can use it in a job that is being killed.

    checkpoints/step-00001000/   one for each save that is kept
    checkpoints/latest           the name of the one to go on from
    identity                     the run's identity
    identity.place               the directory that it was given to
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
    """Where a checkpoint that is found damaged is set aside."""
    return folder.with_name(folder.name + ".damaged")


def steps_there(run: Path) -> list[int]:
    """The steps of the checkpoints of a run, newest first, whole or not."""
    found = [_STEP.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def named_step(run: Path) -> int | None:
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
    """The steps that a run can go on from, newest first.

    They begin with the one that `latest` names, so that a run can be sent back to an earlier checkpoint. Where there
    is no `latest`, or the checkpoint that it names is gone, they begin with the newest. One that is damaged is not
    gone: a run that was sent back to it goes on from an earlier one, never from a later.

    Raises:
        UserError: `latest` is not readable; or there is no checkpoint, or only later ones, where it names one.
    """
    there, named = steps_there(run), named_step(run)
    if named is not None and not there:
        raise UserError(
            f"{run}/checkpoints/latest: names step {named}, and there is no checkpoint; put it back, or remove "
            "`latest` to train from the start"
        )
    if named is None or not (named in there or damaged_folder(step_folder(run, named)).exists()):
        return there
    up_to_named = [step for step in there if step <= named]
    if there and not up_to_named:
        raise UserError(no_step_up_to(run, named, there))
    return up_to_named


def no_step_up_to(run: Path, named: int, there: list[int]) -> str:
    """What to say where the checkpoint that `latest` names is damaged and all others are later."""
    later = ", ".join(step_folder(run, step).name for step in reversed(there))
    return (
        f"{run}/checkpoints/latest: the checkpoint that it names, step {named}, is damaged, and there is none before; "
        f"write the name of a later one into it to go on from there: {later}"
    )


def latest_step(run: Path) -> int | None:
    """The first of `steps_to_try`; None where there is no checkpoint yet.

    Raises:
        UserError: as `steps_to_try`.
    """
    return next(iter(steps_to_try(run)), None)


def latest_stamp(run: Path) -> str | None:
    """A text that changes whenever somebody writes `latest`; None where there is no such file.

    Its name and its time in whole seconds: some file systems do not keep fractions, or inode numbers.
    """
    path = run / "checkpoints" / "latest"
    try:
        with open(path, "rb") as file:
            return f"{file.read(100).decode(errors='replace').strip()} {int(os.fstat(file.fileno()).st_mtime)}"
    except FileNotFoundError:
        return None


def place_of(run: Path) -> dict[str, Any]:
    """What is recorded of a directory, so that a copy of it can be recognized by `is_copy`."""
    return {"path": str(run.resolve()), "inode": run.stat().st_ino}


def is_copy(run: Path, place: Any) -> bool:
    """Whether what is recorded as `place` is another directory than `run`.

    A directory that was renamed keeps its inode number, and one that was restored, or lies on a file system without
    stable numbers, its path.
    """
    now = place_of(run)
    return isinstance(place, dict) and all(place.get(key) != now[key] for key in now)


def run_identity(run: Path) -> tuple[str, str | None]:
    """The identity of the run in a directory, made when the run first starts; a copy of a directory gets a new one.

    Node-local checkpoints and the wandb run are found by it. Call it on one process.

    Returns:
        The identity, and for a directory that is found to be a copy a line that says so.
    """
    path, place_path = run / "identity", run / "identity.place"
    own = path.read_text().strip() if path.exists() else secrets.token_hex(8)
    place: Any = None
    with contextlib.suppress(UserError):  # unreadable: as without one
        place = read_json(place_path, "place of a run")
    copied = None
    if isinstance(place, dict) and place.get("identity") == own:
        if not is_copy(run, place):
            if place != (now := {"identity": own, **place_of(run)}):
                write_json(place_path, now)  # renamed or restored: a later copy is found by where this lies now
            return own, None
        old, own = own, secrets.token_hex(8)
        copied = (
            f"{run} is a copy of {place.get('path')}: from now on it is the run {own}, which does not use the other's "
            f"node-local checkpoints and wandb run; to go on as the other, write {old} into {path}"
        )
    with atomic_write(path) as beside:
        beside.write_text(own + "\n")
    write_json(place_path, {"identity": own, **place_of(run)})
    return own, copied
