"""A snapshot: the code and the recipe that a job trains with from its first start to its last.

    run_dir/snapshots/NAME/
      __main__.py       so that `python run_dir/snapshots/NAME ...` runs the code beside it and no other
      far_scale/        the code
      recipe.yaml       the resolved recipe
      code_version.json the commit of the code, and what differs from it
      submission.json   the command line, and the values of the recipe that the launcher needs without loading torch

So edits of the checkout never change a run that has started, not even when it restarts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import far_scale
from far_scale.utils import code_version
from far_scale.utils.io import read_json, sync_folder, write_json

if TYPE_CHECKING:
    from far_scale.config.recipe import Recipe  # a job's host may have no third-party packages

ACCEPT = "--accept-changes"
"""The flag of `python -m far_scale.train` that a job's overrides may include."""

REFUSED_MARKER = "refused"
"""The file that a training process leaves in the snapshot when it refuses to continue."""

_MAIN = '''"""Runs the code of this folder: Python puts the folder of what it runs first on its path."""

from far_scale.slurm.__main__ import main

main()
'''


@dataclass(frozen=True)
class Submission:
    """The command that a snapshot was made for.

    Attributes:
        command: the recipe and the overrides as the user wrote them, with ACCEPT if given.
        run_dir: the run directory, absolute.
        steps: train.steps of the recipe.
        starts_without_progress: faults.starts_without_progress of the recipe.
    """

    command: list[str]
    run_dir: str
    steps: int
    starts_without_progress: int


def make_snapshot(recipe: Recipe, command: Sequence[str], name: str) -> Path:
    """Copy code and recipe into the run directory; returns the snapshot's folder, absolute.

    Atomic. A snapshot of that name is replaced: it is of an older job that had the same number.
    """
    run = Path(recipe.run_dir).absolute()
    folder = run / "snapshots" / name
    temporary = folder.with_name(f".{name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    code = Path(far_scale.__file__).parent
    shutil.copytree(code, temporary / "far_scale", ignore=shutil.ignore_patterns("__pycache__"))
    (temporary / "__main__.py").write_text(_MAIN)
    code_version.record(code_version.running_code(), temporary)
    recipe.save(temporary / "recipe.yaml")
    steps, limit = recipe.train.steps, recipe.faults.starts_without_progress
    write_json(temporary / "submission.json", asdict(Submission(list(command), str(run), steps, limit)))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder.parent)
    return folder


def read_submission(snapshot: Path) -> Submission:
    """Read a snapshot's submission.json.

    Raises:
        UserError: it is not a snapshot.
    """
    return Submission(**read_json(snapshot / "submission.json", "snapshot of a job"))
