"""Submission of training jobs through submitit; they start and end like those of slurm/launch.sh."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path

from far_scale.config.recipe import Recipe, check_ranks, groups_cross_nodes
from far_scale.slurm.job import refuse_early_warning
from far_scale.slurm.job_request import WARNING_SECONDS, JobSize, check_options
from far_scale.slurm.snapshot import make_snapshot
from far_scale.utils.errors import UserError, print_warning


def check_size(recipe: Recipe, size: JobSize) -> None:
    """Refuse a job that cannot train `recipe`.

    Raises:
        UserError: the processes cannot share its lanes, or the time limit is so short that the warning comes as soon as
            the job runs.
    """
    check_ranks(recipe, size.nodes * size.tasks_per_node)
    if (warning := groups_cross_nodes(recipe, size.tasks_per_node)) is not None:
        print_warning(warning)
    if size.minutes:
        refuse_early_warning(60 * size.minutes, WARNING_SECONDS, "--time")


def check_checkout(checkout: Path) -> None:
    """Refuse to submit from an installed wheel, which lacks the scripts that jobs source.

    Raises:
        UserError: `checkout` has no slurm/environment.sh.
    """
    if not (checkout / "slurm" / "environment.sh").is_file():
        raise UserError(
            f"{checkout}: a job needs slurm/ of a checkout, and far_scale was installed without one; clone the "
            "repository and run its tools/submit.py"
        )


def submit(
    recipe: Recipe, command: Sequence[str], size: JobSize, chain: int | None, checkout: Path, options: Sequence[str]
) -> list[str]:
    """Submit `recipe` to SLURM; returns the numbers of the jobs.

    Args:
        command: the recipe's name and overrides, as the user wrote them.
        chain: number of jobs that run one after another; None for one job that is requeued.
        checkout: where the jobs find slurm/environment.sh and the site's settings.
        options: further ones for sbatch, see `check_options`.

    Raises:
        UserError: as `check_checkout`, `check_size` and `check_options`, or there is no SLURM here, or it refuses the
            job.
    """
    check_checkout(checkout)
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from far_scale.slurm.executor import SubmittedTraining, TrainingExecutor

    check_size(recipe, size)
    check_options(options, chain)
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit on a login node of the cluster, or train here with --local")
    snapshot, requeue = make_snapshot(recipe, command, _new_name()), chain is None
    jobs: list[str] = []
    for _ in range(chain or 1):
        previous = jobs[-1] if jobs else None
        executor = TrainingExecutor(
            recipe.name, _folder(recipe), snapshot, size, checkout, options, requeue, after=previous
        )
        try:
            jobs.append(executor.submit(SubmittedTraining(snapshot, requeue)).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from error
    return jobs


def draft(recipe: Recipe, size: JobSize, chain: int | None, checkout: Path, options: Sequence[str]) -> str:
    """The sbatch file that `submit` would submit; writes nothing and needs no SLURM.

    Raises:
        UserError: as `check_checkout`, `check_size` and `check_options`.
    """
    check_checkout(checkout)
    from far_scale.slurm.executor import TrainingExecutor

    check_size(recipe, size)
    check_options(options, chain)
    snapshot = Path(recipe.run_dir).absolute() / "snapshots" / _new_name()
    return TrainingExecutor(
        recipe.name, _folder(recipe), snapshot, size, checkout, options, requeue=chain is None
    ).draft()


def train_here(recipe: Recipe, command: Sequence[str], size: JobSize) -> int:
    """Train on this machine with submitit's local executor, one process a GPU; returns the exit status.

    Raises:
        UserError: several nodes or no time limit are asked for, or as `check_size`.
    """
    from submitit import LocalExecutor
    from submitit.core.utils import UncompletedJobError

    from far_scale.slurm.executor import SubmittedTraining

    if size.nodes != 1:
        raise UserError(f"--nodes {size.nodes}: this machine is one; leave it out with --local")
    if not size.minutes:
        raise UserError("--time 0: means no limit only to SLURM; with --local give one that is long enough")
    check_size(recipe, size)
    snapshot = make_snapshot(recipe, command, _new_name())
    executor = LocalExecutor(folder=_folder(recipe))
    executor.update_parameters(
        timeout_min=size.minutes,
        signal_delay_s=WARNING_SECONDS,
        tasks_per_node=size.tasks_per_node,
        gpus_per_node=size.gpus_per_node,
        stderr_to_stdout=True,
    )
    job = executor.submit(SubmittedTraining(snapshot, requeue=False))
    print(f"training here; its output goes to {job.paths.stdout}", flush=True)
    try:
        return max(job.results())
    except UncompletedJobError:
        raise UserError(f"training ended without a result; its output is in {job.paths.stdout}") from None
    except KeyboardInterrupt:
        job.cancel()
        raise


def _new_name() -> str:
    """The name of a snapshot, since the job has no number yet."""
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.run_dir).absolute() / "submitit"
