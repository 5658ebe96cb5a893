"""The processes of a run: who this one is, and the group they talk in.

Whatever started them (torchrun, deepspeed, srun, or nothing: then this process is alone), afterwards RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set and torch.distributed is up: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from far_scale.distributed.rendezvous import meet
from far_scale.utils.errors import SaidByMain, UserError, file_problem
from far_scale.utils.hosts import first_host, host_name

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Who this process is.

    Attributes:
        rank: its number.
        count: how many there are.
        device: what it computes on.
        host_group: all of them again, over gloo, for what is agreed on between hosts without the device.
        timeout: after which a collective of these processes fails; torch's defaults where None.
    """

    rank: int
    count: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    timeout: datetime.timedelta | None = None

    @property
    def main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over all processes, float64, the same on each."""
        summed = values.detach().to(torch.float64)
        dist.all_reduce(summed)
        return summed / self.count


def start_processes(timeout: datetime.timedelta | None = None) -> Processes:
    """Join the group. Call once a process.

    Args:
        timeout: after which a collective fails; torch's defaults (NCCL 10 minutes, gloo 30) where None.

    Raises:
        UserError: the launcher's variables are incomplete, or the processes do not find each other.
    """
    rank, count = take_launcher_variables()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    store = meet(rank, count, device.type)
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


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
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
    problems = gather(problem, processes.host_group)
    if (first := next((each for each in problems if each is not None), None)) is not None:
        raise UserError(first)
    return result  # type: ignore[return-value]


def from_main(work: Callable[[], T], processes: Processes) -> T:
    """What `work` returns on the main process, on all of them; where it raises a UserError there, all raise it.

    The main process alone says it: one line, however many ranks there are.
    """
    try:
        value = all_ranks_or_raise(lambda: work() if processes.main else None, processes)
    except UserError as error:
        raise error if processes.main else SaidByMain(str(error)) from None
    result: T = gather(value, processes.host_group)[0]
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
