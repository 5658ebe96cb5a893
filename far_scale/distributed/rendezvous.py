"""The rendezvous of the ranks before there is a process group; names ranks that do not come or have no GPU.

The store may be older than these processes: torchrun's agent keeps its store over restarts, with all keys of dead
workers. So rank 0 of each start makes a new group of keys under a random name, and gives this name only to processes
that ask for it under a random name of their own. Keys of dead processes are therefore never read. torchrun's restart
count cannot serve as the name: it may differ between nodes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
import uuid

import torch.distributed as dist

from far_scale.distributed.addresses import network_stack
from far_scale.distributed.network import checked_network, wait_for_route
from far_scale.utils.errors import UserError
from far_scale.utils.hosts import host_name, rank_list, ranks_on_hosts

PATIENCE = datetime.timedelta(minutes=10)
"""How long the ranks wait for each other: a node of a large job may load torch from a slow file system."""
_READ_TIMEOUT = datetime.timedelta(seconds=20)
_POLL_SECONDS = 0.05


def rendezvous(rank: int, world_size: int, device: str) -> dist.Store:
    """Wait until all ranks are here; returns their common store, for the process group.

    Args:
        device: type of this rank's device, cuda or cpu.

    Raises:
        UserError: on all ranks that came: some did not come, or the types of devices differ, or the hosts do not reach
            each other; on a single rank: it cannot reach the host of rank 0.
    """
    store = _open_store(rank, world_size)
    own_name = uuid.uuid4().hex
    if rank == 0:
        group_name = own_name
    else:
        store.set(f"asking/{rank}", own_name)
        store.wait([f"group_of/{own_name}"], 2 * PATIENCE)
        group_name = store.get(f"group_of/{own_name}").decode()
    group = dist.PrefixStore(group_name, store)
    group.set(f"here/{rank}", json.dumps({"device": device, "host": host_name(), "stack": network_stack()}))
    problem = ""
    if rank == 0:
        missing = _admit(store, group, group_name, world_size)
        problem, leaders = _check_ranks(group, world_size, missing)
        group.set("leaders", json.dumps(leaders))
    _raise_on_all(group, rank, world_size, "verdict", problem)
    with checked_network(group, rank, json.loads(group.get("leaders")), device == "cuda") as problem:
        _raise_on_all(group, rank, world_size, "network", problem)
    return group


def _raise_on_all(group: dist.Store, rank: int, world_size: int, key: str, problem: str) -> None:
    """Share the problem that rank 0 found under `key`; raise it on every rank if it is not empty."""
    if rank == 0:
        group.set(key, problem)
    else:
        group.wait([key], 2 * PATIENCE)
    if problem := group.get(key).decode():
        if rank == 0:
            _wait_for_readers(group, world_size)
        else:
            group.set(f"read/{rank}", "")
        raise UserError(problem)


def _admit(store: dist.Store, group: dist.Store, group_name: str, world_size: int) -> list[int]:
    """Give the group's name to all ranks that ask for it, until all are here; returns those that did not come."""
    end = time.monotonic() + PATIENCE.total_seconds()
    missing = list(range(1, world_size))
    answered: set[bytes] = set()
    while missing and time.monotonic() < end:
        for rank in missing:
            # A dead process may have asked as this rank; the live one overwrites its name now or later.
            if store.check([f"asking/{rank}"]) and (asking := store.get(f"asking/{rank}")) not in answered:
                store.set(f"group_of/{asking.decode()}", group_name)
                answered.add(asking)
        missing = [rank for rank in missing if not group.check([f"here/{rank}"])]
        time.sleep(_POLL_SECONDS if missing else 0)
    return missing


def _wait_for_readers(group: dist.Store, world_size: int) -> None:
    """Wait until all other ranks that came have read the problem: the store ends with rank 0."""
    readers = [f"read/{rank}" for rank in range(1, world_size) if group.check([f"here/{rank}"])]
    with contextlib.suppress(RuntimeError):  # a rank that has died since is reported by its launcher
        group.wait(readers, _READ_TIMEOUT)


def _open_store(rank: int, world_size: int) -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent serves it
    if not serves:
        wait_for_route(rank, address, port)
    try:
        return dist.TCPStore(address, port, world_size, serves, PATIENCE, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} on {host_name()} cannot reach rank 0 at {address}:{port} ({reason}); is that node up, and "
            "its port open? MASTER_ADDR and MASTER_PORT set another"
        ) from error


def _check_ranks(group: dist.Store, world_size: int, missing: list[int]) -> tuple[str, list[tuple[int, str]]]:
    """The problem in one line, empty if there is none; and the first rank and the name of each host."""
    devices: dict[int, str] = {}
    hosts: dict[int, str] = {}
    leaders: dict[str, tuple[int, str]] = {}
    for rank in sorted(set(range(world_size)) - set(missing)):
        here = json.loads(group.get(f"here/{rank}"))
        devices[rank], hosts[rank] = here["device"], here["host"]
        leaders.setdefault(here["stack"], (rank, here["host"]))
    return _problem(world_size, missing, devices, hosts), list(leaders.values())


def _problem(world_size: int, missing: list[int], devices: dict[int, str], hosts: dict[int, str]) -> str:
    if missing:
        present = ", ".join(dict.fromkeys(hosts.values()))
        return (
            f"{rank_list(missing)} of {world_size} did not come in {PATIENCE.total_seconds():g} s; those that did are "
            f"on {present}: look at the output of the others, and leave their nodes out by sbatch --exclude"
        )
    usual = "cuda" if "cuda" in devices.values() else "cpu"
    odd = [rank for rank, device in devices.items() if device != usual]
    if odd:
        names = ",".join(dict.fromkeys(hosts[rank] for rank in odd))
        ranks = ranks_on_hosts(odd, [hosts[rank] for rank in range(world_size)])
        return f"{ranks} found no GPU, others did; is the driver broken? Leave the node out: sbatch --exclude={names}"
    return ""
