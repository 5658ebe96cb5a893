"""The processes of a run: who this one is, and the group they talk in.

Whatever started them (torchrun, deepspeed, srun, or nothing: then this process is alone), afterwards RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set and torch.distributed is up: NCCL on GPUs, gloo on CPUs.
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
"""After which what has not come never will; NCCL's first contact on thousands of ranks takes a minute."""


@dataclass(frozen=True)
class Processes:
    """Who this process is.

    Attributes:
        rank: its number.
        world_size: how many there are.
        device: what it computes on.
        host_group: all of them again, over gloo, for what is agreed on between hosts without the device.
        timeout: after which a collective of these processes fails; torch's defaults where None.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    timeout: datetime.timedelta | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over all processes, float64, the same on each."""
        summed = values.detach().to(torch.float64)
        dist.all_reduce(summed)
        return summed / self.world_size


def start_processes(timeout: datetime.timedelta | None = None) -> Processes:
    """Join the group. Call once a process.

    Args:
        timeout: after which a collective fails; torch's defaults (NCCL 10 minutes, gloo 30) where None.

    Raises:
        UserError: the launcher's variables are incomplete, or the processes do not find each other.
    """
    rank, count = take_launcher_variables()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    store = rendezvous(rank, count, device.type)
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
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    return Processes(rank, count, device, dist.new_group(backend="gloo", timeout=timeout), timeout)


def take_launcher_variables() -> tuple[int, int]:
    """This process's rank and the world size, by what its launcher has set; the environment has torchrun's names then.

    Raises:
        UserError: the launcher's variables are incomplete.
    """
    if "RANK" not in os.environ:
        _take_from_slurm() if "SLURM_STEP_ID" in os.environ else _take_alone()
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set but not {', '.join(missing)}: start with torchrun, deepspeed or srun, or unset RANK"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def set_timeouts(processes: Processes) -> None:
    """Give all process groups that there are the timeout of `processes`: a library's own groups have torch's default.

    A new group does not inherit its parent's timeout, and DeepSpeed passes none (0.19.8, `deepspeed.comm.new_group`).
    """
    if processes.timeout is not None:
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(processes.timeout, group)


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, in the order of the ranks, on each of them; of this process alone without groups.

    Args:
        value: anything that can be pickled.
        group: of CPU tensors, such as `Processes.host_group`; the default one where None.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class StuckError(Exception):
    """Some ranks hang.

    Attributes:
        ranks: which.
        what: that they do, a clause after their names.
    """

    def __init__(self, ranks: list[int], what: str) -> None:
        super().__init__(ranks, what)
        self.ranks, self.what = ranks, what


def wait_for_all_ranks(processes: Processes, at: str, seconds: float) -> None:
    """Wait until every rank is here.

    Args:
        processes: who meets; over their host group, so no device is needed.
        at: what they have done by then, a noun.
        seconds: how long rank 0 waits.

    Raises:
        StuckError: some did not come. Only rank 0 learns who, so the others wait longer, for it to say so.
    """
    if processes.world_size == 1:
        return
    limit = datetime.timedelta(seconds=seconds if processes.is_main_process else 2 * seconds)
    try:
        dist.monitored_barrier(processes.host_group, limit, wait_all_ranks=True)
    except RuntimeError as error:
        late = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error)) if processes.is_main_process else None
        if late is None:
            raise StuckError([0], f"did not meet the others after {at}; it says why, or is what hangs") from error
        ranks = sorted(int(rank) for rank in late.group(1).split(","))
        raise StuckError(ranks, f"did not come through {at} in {seconds:g} s") from error


def all_ranks_or_raise(work: Callable[[], T], processes: Processes) -> T:
    """What `work` returns; where it raises a UserError on some rank, all ranks raise the first one.

    So they do where a file cannot be read or written: the others would wait for this rank, and crash when it ends.
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
    if (first := next((each for each in problems if each is not None), None)) is not None:
        raise UserError(first)
    return result  # type: ignore[return-value]


def broadcast_from_main(work: Callable[[], T], processes: Processes) -> T:
    """What `work` returns on the main process, on all of them; where it raises a UserError there, all raise it.

    The main process alone says it: one line, however many ranks there are.
    """
    try:
        value = all_ranks_or_raise(lambda: work() if processes.is_main_process else None, processes)
    except UserError as error:
        raise error if processes.is_main_process else ReportedByMain(str(error)) from None
    result: T = all_gather_objects(value, processes.host_group)[0]
    return result


def stop_processes() -> None:
    """Leave the group, so that nothing is left waiting for this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _take_from_slurm() -> None:
    """The rendezvous of an srun step: its first host, and a port that follows from the job's number.

    On one node no name need resolve.
    """
    alone = os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if alone else first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]


def _take_alone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
