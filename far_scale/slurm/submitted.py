"""What a job of tools/submit.py calls in each of its processes.

The class is pickled by value, so that a job loads nothing of the checkout: it takes far_scale from its snapshot. So it
must not use anything else of this module.
"""

from __future__ import annotations

from typing import Any


class SubmittedTraining:
    """Trains on a snapshot, in a process that submitit started.

    Args:
        snapshot: its folder.
        requeue: whether the job may be started again.
    """

    def __init__(self, snapshot: str, requeue: bool) -> None:
        self.snapshot, self.requeue = snapshot, requeue

    def __call__(self) -> int:
        """Train; on SLURM leave with the exit status where it is not 0, on this machine return it."""
        import sys

        sys.path.insert(0, self.snapshot)
        from far_scale.slurm.task import train_for_submitit

        return train_for_submitit(self.snapshot)

    def checkpoint(self) -> Any:
        """What submitit starts again when it is warned before training has taken over the signals."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self) if self.requeue else None
