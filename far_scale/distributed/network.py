"""Whether the hosts reach each other at the addresses that gloo and NCCL take, found before these find out.

Gloo takes the address that a host's own name resolves to. Where that is 127.0.1.1, as in Debian's /etc/hosts, or an
interface that leads nowhere, it fails after 10 to 30 minutes with a message that names neither. So the first rank on
each host listens at its addresses, and connects to those of the next host, before there is a process group.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from far_scale.distributed.addresses import Endpoint, endpoints, interface_list
from far_scale.utils.errors import UserError
from far_scale.utils.hosts import host_name

_CONNECTING = 8.0
"""Seconds for one connection; there are two as a rule, gloo's and NCCL's."""

_PUBLISHING = timedelta(seconds=15)
"""For the next host to say where it listens."""

_ALL = 35.0
"""Seconds for all hosts to report, with both of the above; so every refusal comes within a minute."""

_SHARED = "in slurm/site.sh to an interface that all hosts share"


def wait_for_route(rank: int, address: str, port: int) -> None:
    """Wait until the host of rank 0 answers, be it by refusing: then it is there, and its rank 0 may come late.

    Raises:
        UserError: for 35 seconds its name does not resolve, or leads back to this host, or there is no route to it, or
            nothing answers.
    """
    end = time.monotonic() + _ALL
    while reason := _no_answer(address, port):
        if time.monotonic() > end:
            raise UserError(
                f"rank {rank} on {host_name()} cannot reach rank 0 at {address}:{port}: {reason}; set MASTER_ADDR in "
                "slurm/site.sh to an address of the first host that all others reach"
            )
        time.sleep(1)


def _no_answer(name: str, port: int) -> str:
    """Why nothing answers there; empty where something does at any address of `name`, be it by refusing."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return _reason(error)
    addresses = [str(where[0]) for *_, where in found]
    # Where somebody wrote an address, and not a name, all may run on one machine.
    if os.environ.get("SLURM_NODEID", "0") != "0" and name not in addresses and all(map(_is_loopback, addresses)):
        return f"{name} resolves to {addresses[0]}, which is this host itself"
    reason = ""
    for family, kind, protocol, _, where in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.settimeout(_CONNECTING)
            try:
                probe.connect(where)
            except ConnectionRefusedError:
                return ""
            except OSError as error:
                reason = _reason(error)
            else:
                return ""
    return reason


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


@contextlib.contextmanager
def checked_network(store: dist.Store, rank: int, leaders: Sequence[tuple[int, str]], cuda: bool) -> Iterator[str]:
    """Check the network while the context is open; every rank must stay in it until rank 0's result is known to all.

    Args:
        store: what all ranks share.
        rank: this process's.
        leaders: for each host the lowest of its ranks, which checks for all of them, and the host's name.
        cuda: whether the ranks compute on GPUs, so that NCCL is used.

    Yields:
        On rank 0 what is wrong, one line, empty where nothing is; on others an empty text.
    """
    ranks = [leader for leader, _ in leaders]
    if rank not in ranks:
        yield ""
        return
    end = time.monotonic() + _ALL
    neighbour = leaders[(ranks.index(rank) + 1) % len(leaders)]
    with contextlib.ExitStack() as listening:
        problem = _check_host(store, rank, neighbour, cuda, listening)
        store.set(f"network/result/{rank}", problem)
        yield _all_problems(store, leaders, end) if rank == 0 else ""


def _check_host(
    store: dist.Store, rank: int, neighbour: tuple[int, str], cuda: bool, listening: contextlib.ExitStack
) -> str:
    """What is wrong with this host, or between it and the next; listens until `listening` is closed."""
    host, alone = host_name(), neighbour[0] == rank
    own, token = endpoints(cuda, named_alone=alone), uuid.uuid4().hex
    there = []
    for each in own:
        problem, port = each.problem(alone), 0
        if problem is None and not alone:
            try:
                port = listening.enter_context(_listening(each, token))
            except OSError as error:
                problem = f"nothing can listen at {each.address}, {each.origin}: {_reason(error)}"
        if problem is not None:
            store.set(f"network/at/{rank}", json.dumps({"listening": []}))
            return f"{host}: {problem}; set {each.variable} {_SHARED}; {host} has {interface_list()}"
        there.append({**asdict(each), "port": port})
    if alone:
        return ""
    store.set(f"network/at/{rank}", json.dumps({"listening": there, "token": token, "interfaces": interface_list()}))
    return _check_neighbour(store, own, neighbour)


def _check_neighbour(store: dist.Store, own: Sequence[Endpoint], neighbour: tuple[int, str]) -> str:
    host, (next_rank, next_host) = host_name(), neighbour
    try:
        store.wait([f"network/at/{next_rank}"], _PUBLISHING)
    except RuntimeError:
        return f"{next_host}: rank {next_rank} has not said where it listens; look at what it printed"
    said = json.loads(store.get(f"network/at/{next_rank}"))
    for at in said["listening"]:
        port = at.pop("port")
        there = Endpoint(**at)
        same = [each for each in own if each.variable == there.variable]
        reason = _connect(there, port, said["token"])
        if not reason and same and there.family not in [each.family for each in same]:
            reason = f"{host} itself takes {same[0].address}, of the other kind"
        if reason:
            return (
                f"{host} does not reach {next_host} at {there.address} ({there.origin}): {reason}; set "
                f"{there.variable} {_SHARED}; {next_host} has {said['interfaces']}"
            )
    return ""


@contextlib.contextmanager
def _listening(endpoint: Endpoint, token: str) -> Iterator[int]:
    """Answer `token` to whoever connects to `endpoint`; yields the port."""

    def answer() -> None:
        with contextlib.suppress(OSError):  # the socket is shut down
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(token.encode())

    with socket.create_server((endpoint.address, 0), family=endpoint.family) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _connect(endpoint: Endpoint, port: int, token: str) -> str:
    """Why `endpoint` cannot be reached; empty where it can."""
    try:
        with socket.create_connection((endpoint.address, port), timeout=_CONNECTING) as connection:
            answered = connection.recv(len(token), socket.MSG_WAITALL).decode(errors="replace")
    except OSError as error:
        return _reason(error)
    return "" if answered == token else "another host answers at this address"


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)


def _all_problems(store: dist.Store, leaders: Sequence[tuple[int, str]], end: float) -> str:
    """The first problem that any host has found until `end` on the monotonic clock, and which others have one."""
    problems: dict[str, str] = {}
    for rank, host in leaders:
        with contextlib.suppress(RuntimeError):
            store.wait([f"network/result/{rank}"], timedelta(seconds=max(0.01, end - time.monotonic())))
        key = f"network/result/{rank}"
        problem = store.get(key).decode() if store.check([key]) else f"{host}: its rank {rank} has not answered"
        if problem:
            problems[host] = problem
    if not problems:
        return ""
    first, *others = problems
    return problems[first] + (f" (also: {', '.join(others)})" if others else "")
