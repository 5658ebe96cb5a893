"""Where the ranks first meet, before there is a process group: who does not come, or has no GPU, is named.

The store may be older than these processes: torchrun's agent keeps its store over restarts, with all keys of the
workers that died. So rank 0 of each start makes a new group of keys under a random name, and gives this name only to
processes that ask for it under a random name of their own. A key of a dead process is never taken for a live one's.
torchrun's restart count cannot be that name: with several nodes it may differ between them.
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
"""How long the ranks wait for each other: the last node of a large job may load torch from a slow file system."""
_READING = datetime.timedelta(seconds=20)
_POLL = 0.05  # seconds between two looks at who has come


def rendezvous(rank: int, count: int, device: str) -> dist.Store:
    """Wait until all ranks are here; returns the store that they share, for the process group.

    Args:
        rank, count: this process's number, of how many.
        device: the kind that it will compute on, cuda or cpu.

    Raises:
        UserError: on all ranks that came: some did not, or not all have the same kind of device, or the hosts do not
            reach each other; on a rank alone, rank 0's host cannot be reached.
    """
    store = _store(rank, count)
    own_name = uuid.uuid4().hex
    if rank == 0:
        group_name = own_name
    else:
        store.set(f"asking/{rank}", own_name)
        store.wait([f"group_of/{own_name}"], 2 * PATIENCE)
        group_name = store.get(f"group_of/{own_name}").decode()
    group = dist.PrefixStore(group_name, store)
    group.set(f"here/{rank}", json.dumps({"device": device, "host": host_name(), "stack": network_stack()}))
    verdict = ""
    if rank == 0:
        missing = _admit(store, group, group_name, count)
        verdict, leaders = _verdict(group, count, missing)
        group.set("leaders", json.dumps(leaders))
    _raise_on_all(group, rank, count, "verdict", verdict)
    with checked_network(group, rank, json.loads(group.get("leaders")), device == "cuda") as problem:
        _raise_on_all(group, rank, count, "network", problem)
    return group


def _raise_on_all(group: dist.Store, rank: int, count: int, key: str, verdict: str) -> None:
    """Wait for the verdict of rank 0, which is kept under `key`; raise it, where it is not empty, on each rank."""
    if rank == 0:
        group.set(key, verdict)
    else:
        group.wait([key], 2 * PATIENCE)
    if verdict := group.get(key).decode():
        if rank == 0:
            _wait_for_readers(group, count)
        else:
            group.set(f"read/{rank}", "")
        raise UserError(verdict)


def _admit(store: dist.Store, group: dist.Store, group_name: str, count: int) -> list[int]:
    """Give the group's name to all ranks that ask for it, until all are here; returns those that did not come."""
    end = time.monotonic() + PATIENCE.total_seconds()
    missing = list(range(1, count))
    answered: set[bytes] = set()
    while missing and time.monotonic() < end:
        for rank in missing:
            # A dead process may have asked under this rank; then the live one overwrites its name, now or later.
            if store.check([f"asking/{rank}"]) and (asking := store.get(f"asking/{rank}")) not in answered:
                store.set(f"group_of/{asking.decode()}", group_name)
                answered.add(asking)
        missing = [rank for rank in missing if not group.check([f"here/{rank}"])]
        time.sleep(_POLL if missing else 0)
    return missing


def _wait_for_readers(group: dist.Store, count: int) -> None:
    """Wait until all other ranks that came have read the verdict: the store ends with rank 0."""
    readers = [f"read/{rank}" for rank in range(1, count) if group.check([f"here/{rank}"])]
    with contextlib.suppress(RuntimeError):  # one of them has died since; its launcher reports it
        group.wait(readers, _READING)


def _store(rank: int, count: int) -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's agent serves one
    if not serves:
        wait_for_route(rank, address, port)
    try:
        return dist.TCPStore(address, port, count, serves, PATIENCE, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} on {host_name()} cannot reach rank 0 at {address}:{port} ({reason}); is that node up, and "
            "its port open? MASTER_ADDR and MASTER_PORT set another"
        ) from error


def _verdict(group: dist.Store, count: int, missing: list[int]) -> tuple[str, list[tuple[int, str]]]:
    """What is wrong with those who came, or did not, in one line; empty where nothing is.

    Also the first rank on each host, and the host's name.
    """
    devices: dict[int, str] = {}
    hosts: dict[int, str] = {}
    leaders: dict[str, tuple[int, str]] = {}
    for rank in sorted(set(range(count)) - set(missing)):
        here = json.loads(group.get(f"here/{rank}"))
        devices[rank], hosts[rank] = here["device"], here["host"]
        leaders.setdefault(here["stack"], (rank, here["host"]))
    return _problem(count, missing, devices, hosts), list(leaders.values())


def _problem(count: int, missing: list[int], devices: dict[int, str], hosts: dict[int, str]) -> str:
    """The text of `_verdict`, by the device and the host of each rank that came."""
    if missing:
        there = ", ".join(dict.fromkeys(hosts.values()))
        return (
            f"{rank_list(missing)} of {count} did not come in {PATIENCE.total_seconds():g} s; those that did are on "
            f"{there}: look at what the others say, and leave their nodes out by sbatch --exclude"
        )
    usual = "cuda" if "cuda" in devices.values() else "cpu"
    odd = [rank for rank, device in devices.items() if device != usual]
    if odd:
        out = ",".join(dict.fromkeys(hosts[rank] for rank in odd))
        who = ranks_on_hosts(odd, [hosts[rank] for rank in range(count)])
        return f"{who} found no GPU, others did; is the driver broken? Leave the node out: sbatch --exclude={out}"
    return ""
