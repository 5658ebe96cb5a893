"""Where the ranks first meet, before there is a process group: who does not come, or has no GPU, is named."""

from __future__ import annotations

import contextlib
import datetime
import os
import time

import torch.distributed as dist

from far_scale.errors import UserError
from far_scale.hosts import host_name
from far_scale.train.faults.ranks import rank_list, ranks_on_hosts

PATIENCE = datetime.timedelta(minutes=10)
"""How long the ranks wait for each other: the last node of a large job may load torch from a slow file system."""
_READING = datetime.timedelta(seconds=20)


def meet(rank: int, count: int, device: str) -> dist.Store:
    """Wait until all ranks are here; returns the store that they share, for the process group.

    Args:
        rank, count: this process's number, of how many.
        device: the kind that it will compute on, cuda or cpu.

    Raises:
        UserError: on all ranks that came: some did not, or not all have the same kind of device.
    """
    store = _store(rank, count)
    store.set(f"here/{rank}", f"{device} {host_name()}")
    if rank == 0:
        store.set("verdict", _verdict(store, count))
    else:
        store.wait(["verdict"], 2 * PATIENCE)
    verdict = store.get("verdict").decode()
    if verdict:
        if rank == 0:
            _wait_for_readers(store, count)
        else:
            store.set(f"read/{rank}", "")
        raise UserError(verdict)
    return store


def _wait_for_readers(store: dist.Store, count: int) -> None:
    """Wait until all other ranks that came have read the verdict: the store ends with rank 0."""
    readers = [f"read/{rank}" for rank in range(1, count) if store.check([f"here/{rank}"])]
    with contextlib.suppress(RuntimeError):  # one of them has died since; it is told by its launcher
        store.wait(readers, _READING)


def _store(rank: int, count: int) -> dist.Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has one already
        return next(iter(dist.rendezvous("env://", rank, count)))[0]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(address, port, count, rank == 0, PATIENCE, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} on {host_name()} cannot reach rank 0 at {address}:{port} ({reason}); is that node up, and "
            "its port open? MASTER_ADDR and MASTER_PORT set another"
        ) from error


def _verdict(store: dist.Store, count: int) -> str:
    """What is wrong with those who came, or did not, in one line; empty where nothing is."""
    end = time.monotonic() + PATIENCE.total_seconds()
    devices, hosts, missing = {}, {}, []
    for rank in range(count):
        left = max(0.001, end - time.monotonic())
        try:
            store.wait([f"here/{rank}"], datetime.timedelta(seconds=left))
        except RuntimeError:
            missing.append(rank)
        else:
            devices[rank], hosts[rank] = store.get(f"here/{rank}").decode().split(" ", 1)
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
