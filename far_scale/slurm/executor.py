"""A training job for submitit: the sbatch file, and what is pickled into the job. submitit is an optional package."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import submitit

from far_scale.slurm.job_request import WARNING_SECONDS, JobSize
from far_scale.slurm.lifecycle import NOTHING_LEFT


class SubmittedTraining:
    """Trains from a snapshot, in a process that submitit started.

    Its methods import what they need themselves: the job unpickles this class, but must take far_scale from its
    snapshot.

    Args:
        snapshot: its folder.
        requeue: whether the job may be started again.
    """

    def __init__(self, snapshot: Path, requeue: bool) -> None:
        self.snapshot, self.requeue = str(snapshot), requeue

    def __call__(self) -> int:
        """Train; returns the exit status where there is no SLURM or it is 0, else exits with it."""
        import sys

        sys.path.insert(0, self.snapshot)
        from far_scale.slurm.task import train_for_submitit

        return train_for_submitit(self.snapshot)

    def checkpoint(self) -> Any:
        """What submitit starts again after a warning that comes before training handles signals itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self) if self.requeue else None


# By value: by reference, the job would import this module, and with it far_scale, from where it was submitted.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class TrainingExecutor(submitit.SlurmExecutor):
    """Submits a training to SLURM.

    submitit 1.5 has no public way to add options to sbatch's command line (lines in the file would not override the
    SBATCH_* variables) or to show the file without submitting it. For these two its private methods are used, and only
    in this class.

    Args:
        name: of the job.
        folder: for submitit's files and the job's output.
        snapshot: the folder of the code and the recipe.
        checkout: folder with slurm/environment.sh and the site's settings.
        options: further options for sbatch.
        requeue: whether the job may be started again.
        after: number of a job; this one starts after it ends. None to start at once.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        snapshot: Path,
        size: JobSize,
        checkout: Path,
        options: Sequence[str] = (),
        requeue: bool = True,
        after: str | None = None,
    ) -> None:
        # submitit writes `python` between srun's options and its own command; environment.sh sets the variables.
        super().__init__(folder=folder, python='"${in_step[@]}" "$python"')
        self._options = list(options)
        job = shlex.quote(str(snapshot))
        self.update_parameters(
            job_name=name,
            nodes=size.nodes,
            ntasks_per_node=size.tasks_per_node,
            cpus_per_task=size.cpus_per_task,
            time=size.minutes,
            signal_delay_s=WARNING_SECONDS,
            stderr_to_stdout=True,
            # A trap that does nothing keeps the shell alive after the end of the step, to run the teardown.
            setup=[
                "trap : TERM USR1 USR2",
                f"checkout={shlex.quote(str(checkout))} python={shlex.quote(sys.executable)}",
                'source "$checkout/slurm/environment.sh" || exit 2',
                f'"$host_python" {job} start {job} || exit $(($? == {NOTHING_LEFT} ? 0 : $?))',
            ],
            teardown=[f'"$host_python" {job} after {job} $?'],
            srun_args=[
                "--kill-on-bad-exit=1",
                f"--cpus-per-task={size.cpus_per_task}",
                *(["--gpu-bind=none"] if size.gpus_per_node else []),
            ],
            additional_parameters={"requeue" if requeue else "no-requeue": True},
            **({"dependency": f"afterany:{after}"} if after else {}),
            **({"gpus_per_node": size.gpus_per_node} if size.gpus_per_node else {}),
            **({"partition": size.partition} if size.partition else {}),
        )

    @classmethod
    def affinity(cls) -> int:
        """Above 0: available, also without SLURM, where only a draft is made."""
        return 2

    def draft(self) -> str:
        """The sbatch file, followed by the options of sbatch's command line."""
        text = self._make_submission_file_text(self._submitit_command_str, "draft")
        return f"{text}\n# submitted by: sbatch {shlex.join(self._options)} FILE" if self._options else text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self._options, str(submission_file_path)]
