"""Submission through submitit: the same snapshot and the same start and end of a job as slurm/launch.sh has."""

from __future__ import annotations

import datetime
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far_scale.config.recipe import Recipe, check_ranks
from far_scale.slurm import submitted
from far_scale.slurm.job import refuse_early_warning
from far_scale.slurm.sbatch_options import check_options
from far_scale.slurm.snapshot import make_snapshot
from far_scale.slurm.start import NOTHING_LEFT
from far_scale.utils.errors import UserError

if TYPE_CHECKING:
    from submitit import SlurmExecutor

_WARNING = 300  # seconds ahead of the time limit


@dataclass(frozen=True)
class JobSize:
    """What a job asks SLURM for.

    Attributes:
        nodes: how many.
        gpus_per_node: GPUs of each, with one process a GPU; 0 for one process on the CPU.
        cpus_per_task: cores of a process.
        minutes: time limit of one start; 0 for none, as sbatch takes it.
        partition: where; None for the cluster's default.
    """

    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    minutes: int
    partition: str | None

    @property
    def tasks_per_node(self) -> int:
        """Processes on a node."""
        return max(1, self.gpus_per_node)

    def check(self, recipe: Recipe) -> None:
        """Refuse what cannot train `recipe`.

        Raises:
            UserError: the processes cannot share its lanes, or the time limit is so short that a start is warned of it
                as soon as it runs.
        """
        check_ranks(recipe, self.nodes * self.tasks_per_node)
        if self.minutes:
            refuse_early_warning(60 * self.minutes, _WARNING, "--time")


def parse_minutes(text: str) -> int:
    """Minutes of a time as sbatch takes it: `90`, `12:00:00`, `2-00`, `2-12:30:00`.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?", text)
    if match is None:
        raise UserError(f"--time {text}: write minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, first, second, third = (int(match[name] or 0) for name in ("days", "first", "second", "third"))
    if match["days"] is None and match["third"] is None:  # minutes, or minutes:seconds
        return first + (second > 0)
    return days * 1440 + first * 60 + second + (third > 0)


def submit(
    recipe: Recipe, command: Sequence[str], size: JobSize, chain: int | None, checkout: Path, options: Sequence[str]
) -> list[str]:
    """Submit `recipe` to SLURM; returns the numbers of the jobs.

    Args:
        command: the recipe's name and the overrides, as they were asked for.
        chain: so many jobs in place of one that is started again, each after the end of the one before.
        checkout: where the jobs find slurm/environment.sh and the site's settings.
        options: further ones for sbatch, see `check_options`.

    Raises:
        UserError: as `JobSize.check` and `check_options`, or there is no SLURM here, or it refuses the job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    size.check(recipe)
    check_options(options, chain)
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit on a login node of the cluster, or train here with --local")
    snapshot = make_snapshot(recipe, command, new_name())
    jobs: list[str] = []
    for _ in range(chain or 1):
        job = _Batch(checkout, tuple(options), chained=chain is not None, after=jobs[-1] if jobs else None)
        executor = _executor(recipe, snapshot, size, job)
        try:
            jobs.append(executor.submit(_training(snapshot, requeue=chain is None)).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from error
    return jobs


def draft(recipe: Recipe, size: JobSize, chain: int | None, checkout: Path, options: Sequence[str]) -> str:
    """The sbatch file that `submit` would hand to SLURM; nothing is written, and no SLURM is needed.

    It ends with the options of sbatch's command line, where there are any.

    Raises:
        UserError: as `JobSize.check` and `check_options`.
    """
    size.check(recipe)
    check_options(options, chain)
    snapshot = Path(recipe.run_dir).absolute() / "snapshots" / new_name()
    executor = _executor(recipe, snapshot, size, _Batch(checkout, tuple(options), chain is not None, after=None))
    text = executor._make_submission_file_text(executor._submitit_command_str, "draft")
    return f"{text}\n# submitted by: sbatch {shlex.join(options)} FILE" if options else text


def train_here(recipe: Recipe, command: Sequence[str], size: JobSize) -> int:
    """Train on this machine, with one process a GPU, through submitit's local executor; returns the exit status.

    Raises:
        UserError: more than one node is asked for, or no time limit, or as `JobSize.check`.
    """
    from submitit import LocalExecutor
    from submitit.core.utils import UncompletedJobError

    if size.nodes != 1:
        raise UserError(f"--nodes {size.nodes}: this machine is one; leave it out with --local")
    if not size.minutes:
        raise UserError("--time 0: means no limit to SLURM alone; with --local give one that is long enough")
    size.check(recipe)
    snapshot = make_snapshot(recipe, command, new_name())
    executor = LocalExecutor(folder=_folder(recipe))
    executor.update_parameters(
        timeout_min=size.minutes,
        signal_delay_s=_WARNING,
        tasks_per_node=size.tasks_per_node,
        gpus_per_node=size.gpus_per_node,
        stderr_to_stdout=True,
    )
    job = executor.submit(_training(snapshot, requeue=False))
    print(f"training here; its output goes to {job.paths.stdout}", flush=True)
    try:
        return max(job.results())
    except UncompletedJobError:
        raise UserError(f"training ended without a result; its output is in {job.paths.stdout}") from None
    except KeyboardInterrupt:
        job.cancel()
        raise


def new_name() -> str:
    """A name for the snapshot of jobs that have no number yet."""
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def _training(snapshot: Path, requeue: bool) -> Any:
    from submitit.core.utils import cloudpickle

    cloudpickle.register_pickle_by_value(submitted)
    return submitted.SubmittedTraining(str(snapshot), requeue)


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.run_dir).absolute() / "submitit"


@dataclass(frozen=True)
class _Batch:
    """What a job's sbatch file is made of besides its size; see `submit`."""

    checkout: Path
    options: tuple[str, ...]
    chained: bool
    after: str | None


def _executor(recipe: Recipe, snapshot: Path, size: JobSize, batch: _Batch) -> SlurmExecutor:
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # a draft is made without SLURM, too; `submit` looks for sbatch itself

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            return ["sbatch", *batch.options, str(submission_file_path)]

    folder, checkout = shlex.quote(str(snapshot)), shlex.quote(str(batch.checkout))
    more: dict[str, Any] = {"no-requeue" if batch.chained else "requeue": True}
    if batch.after is not None:
        more["dependency"] = f"afterany:{batch.after}"
    # submitit writes this between srun's options and its own command; the variables are those of environment.sh.
    executor = Executor(folder=_folder(recipe), python='"${in_step[@]}" "$python"')
    executor.update_parameters(
        job_name=recipe.name,
        nodes=size.nodes,
        ntasks_per_node=size.tasks_per_node,
        cpus_per_task=size.cpus_per_task,
        time=size.minutes,
        signal_delay_s=_WARNING,
        stderr_to_stdout=True,
        # A trap that does nothing: the shell outlives the end of the step, and says what follows.
        setup=[
            "trap : TERM USR1 USR2",
            f"checkout={checkout} python={shlex.quote(sys.executable)}",
            'source "$checkout/slurm/environment.sh" || exit 2',
            f'"$host_python" {folder} start {folder} || exit $(($? == {NOTHING_LEFT} ? 0 : $?))',
        ],
        teardown=[f'"$host_python" {folder} after {folder} $?'],
        srun_args=[
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={size.cpus_per_task}",
            *(["--gpu-bind=none"] if size.gpus_per_node else []),
        ],
        additional_parameters=more,
        **({"gpus_per_node": size.gpus_per_node} if size.gpus_per_node else {}),
        **({"partition": size.partition} if size.partition else {}),
    )
    return executor
