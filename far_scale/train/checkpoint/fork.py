"""A branch of a run: a run directory of its own that goes on from one of the other's checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from far_scale.config.recipe import load_recipe
from far_scale.train.checkpoint.folders import damage, point_at
from far_scale.train.checkpoint.run_dir import latest_step, step_folder
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog, lines_up_to


def fork(run: Path, step: int | None, out: Path) -> int:
    """Make `out` a run that goes on from a checkpoint of `run`, with an identity of its own.

    It gets the checkpoint, the lines of log.jsonl up to it and the recipe with its own run_dir. `run` is only read.

    Args:
        run: a run directory.
        step: of the checkpoint; the one that the run would go on from where None.
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
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(folder, step_folder(beside, step))
        point_at(step_folder(beside, step))
        recipe.save(beside / "recipe.yaml")
        (beside / "log.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in lines_up_to(run / "log.jsonl", step))
        )
        EventLog(beside, is_main_process=True).emit(
            "forked", step, f"{out} goes on from step {step} of {run}", source=str(run)
        )
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return step
