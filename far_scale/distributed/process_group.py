"""The processes of a run and their process groups: NCCL on GPUs, gloo on CPUs.

They may be started by torchrun, deepspeed or srun, or be a single process. Afterwards RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT are set and torch.distributed is initialized.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from far_scale.distributed.rendezvous import rendezvous
from far_scale.utils.errors import ReportedByMain, UserError, file_problem
from far_scale.utils.hosts import first_host, host_name

T = TypeVar("T")

STUCK_SECONDS = 120.0
"""Time after which a rank counts as stuck; NCCL's first contact on thousands of ranks takes a minute."""


@dataclass(frozen=True)
class Processes:
    """The rank of this process, and the process groups.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        device: of this process.
        host_group: all processes over gloo, for CPU tensors.
        timeout: of collectives; torch's defaults where None.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    timeout: datetime.timedelta | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over all processes, float64."""
        summed = values.detach().to(torch.float64)
        dist.all_reduce(summed)
        return summed / self.world_size


def start_processes(timeout: datetime.timedelta | None = None) -> Processes:
    """Initialize the process groups. Call once per process.

    Args:
        timeout: of collectives; torch's defaults (NCCL 10 minutes, gloo 30) where None.

    Raises:
        UserError: the launcher's variables are incomplete, or the processes do not find each other.
    """
    rank, world_size = read_launcher_variables()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    store = rendezvous(rank, world_size, device.type)
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            host, reason = host_name(), str(error).splitlines()[0]
            raise UserError(
                f"rank {rank} on {host}: GPU {device.index} (its LOCAL_RANK) cannot be used: {reason}; start one rank "
                f"a GPU, or leave the node out: sbatch --exclude={host}"
            ) from error
        backend = "nccl"
    else:
        backend = "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Processes(rank, world_size, device, dist.new_group(backend="gloo", timeout=timeout), timeout)


def read_launcher_variables() -> tuple[int, int]:
    """The rank and the world size, from the launcher's variables; sets those that torchrun sets.

    Raises:
        UserError: the launcher's variables are incomplete.
    """
    if "RANK" not in os.environ:
        _set_from_slurm() if "SLURM_STEP_ID" in os.environ else _set_for_single_process()
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set but not {', '.join(missing)}: start with torchrun, deepspeed or srun, or unset RANK"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def set_timeouts(processes: Processes) -> None:
    """Set the timeout of `processes` for all existing process groups.

    A new group does not inherit its parent's timeout but has torch's default, and DeepSpeed passes none for its groups
    (0.19.8, `deepspeed.comm.new_group`).
    """
    if processes.timeout is not None:
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(processes.timeout, group)


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` of every rank, by rank; of only this process where there are no process groups.

    Args:
        value: picklable.
        group: for CPU tensors, such as `Processes.host_group`; the default one where None.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class StuckError(Exception):
    """Some ranks hang.

    Attributes:
        ranks: the ranks.
        what: what they do, a predicate for the message.
    """

    def __init__(self, ranks: list[int], what: str) -> None:
        super().__init__(ranks, what)
        self.ranks, self.what = ranks, what


def wait_for_all_ranks(processes: Processes, after: str, seconds: float) -> None:
    """Wait until every rank is here, over the host group.

    Args:
        after: what the ranks have done before, a noun for the message.
        seconds: how long rank 0 waits.

    Raises:
        StuckError: some ranks did not arrive. Only rank 0 can tell which, so the others wait longer until it reports.
    """
    if processes.world_size == 1:
        return
    limit = datetime.timedelta(seconds=seconds if processes.is_main_process else 2 * seconds)
    try:
        dist.monitored_barrier(processes.host_group, limit, wait_all_ranks=True)
    except RuntimeError as error:
        missing = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error)) if processes.is_main_process else None
        if missing is None:
            raise StuckError([0], f"did not meet the others after {after}; its output says why, or it hangs") from error
        ranks = sorted(int(rank) for rank in missing.group(1).split(","))
        raise StuckError(ranks, f"did not come through {after} in {seconds:g} s") from error


def all_ranks_or_raise(work: Callable[[], T], processes: Processes) -> T:
    """Run `work` on all ranks and return its result; if any rank raises a UserError, all raise the first one.

    An OSError of a file counts as a UserError. Without this, the other ranks would wait for the failed one.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if (problem := file_problem(error)) is None:
            raise
    problems = all_gather_objects(problem, processes.host_group)
    if (first := next((text for text in problems if text is not None), None)) is not None:
        raise UserError(first)
    return result  # type: ignore[return-value]


def broadcast_from_main(work: Callable[[], T], processes: Processes) -> T:
    """Run `work` on the main process and return its result on all; if it raises a UserError, all processes raise one.

    Only the main process prints it: one line for any number of ranks.
    """
    try:
        value = all_ranks_or_raise(lambda: work() if processes.is_main_process else None, processes)
    except UserError as error:
        raise error if processes.is_main_process else ReportedByMain(str(error)) from None
    result: T = all_gather_objects(value, processes.host_group)[0]
    return result


def stop_processes() -> None:
    """Destroy the process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _set_from_slurm() -> None:
    """Set the variables from an srun step: its first host, and a port derived from the job's number.

    On one node no host name has to resolve.
    """
    single_node = os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if single_node else first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]


def _set_for_single_process() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
