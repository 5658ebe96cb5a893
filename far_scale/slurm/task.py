"""One training process of a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from far_scale.distributed.exit_codes import DONE, REFUSED, exit_process
from far_scale.slurm.snapshot import ACCEPT, REFUSED_MARKER, read_submission
from far_scale.train.__main__ import run


def train(snapshot: Path) -> NoReturn:
    """Train by the snapshot's recipe and leave with the exit status, see `far_scale.distributed.exit_codes`."""
    exit_process(train_in_process(snapshot))


def train_for_submitit(snapshot: str) -> int:
    """Train in a process that submitit started; on SLURM it returns only where the exit status is 0."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    port = 20000 + int(job.raw_job_id) % 20000
    # The site may have set MASTER_ADDR to an address of the first host that the others reach.
    host = "127.0.0.1" if job.num_nodes == 1 else os.environ.get("MASTER_ADDR", job.hostnames[0])
    os.environ.update(
        RANK=str(job.global_rank),
        WORLD_SIZE=str(job.num_tasks),
        LOCAL_RANK=str(job.local_rank),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    status = train_in_process(Path(snapshot))
    if job.cluster == "slurm" and status != DONE:
        exit_process(status)  # after a return submitit would store a result
    return status


def train_in_process(snapshot: Path) -> int:
    """Train by the snapshot's recipe; returns the exit status."""
    # Only if they are not set: settings of the site or the user take precedence.
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    os.environ.setdefault("NCCL_DEBUG", "WARN")  # names the host and link that failed
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a failed collective ends the process
    accept = [ACCEPT] if ACCEPT in read_submission(snapshot).command else []
    status = run([str(snapshot / "recipe.yaml"), *accept])
    if status == REFUSED:
        # srun returns the highest status of all processes, and those that it then kills have higher ones.
        (snapshot / REFUSED_MARKER).touch()
    return status
