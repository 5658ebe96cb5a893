"""Check that the hosts reach each other at the addresses that gloo and NCCL use, before the process group is made.

Gloo uses the address that a host's own name resolves to. If that is 127.0.1.1, as in Debian's /etc/hosts, or belongs to
an interface without a route, gloo fails after 10 to 30 minutes with a message that names neither. So the first rank on
each host listens at its addresses, and connects to those of the next host.
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

_CONNECT_SECONDS = 8.0
"""For one connection; usually there are two, of gloo and NCCL."""

_NEIGHBOUR_TIMEOUT = timedelta(seconds=15)
"""For the next host to publish its addresses."""

_TOTAL_SECONDS = 35.0
"""For all hosts to report, including the two timeouts above; so every refusal comes within a minute."""

_SHARED = "in slurm/site.sh to an interface that all hosts share"


def wait_for_route(rank: int, address: str, port: int) -> None:
    """Wait until the host of rank 0 answers. It may refuse the connection, since its rank 0 may start later.

    Raises:
        UserError: for 35 seconds its name does not resolve, or resolves to this host, or there is no route, or no
            answer.
    """
    end = time.monotonic() + _TOTAL_SECONDS
    while reason := _unreachable_reason(address, port):
        if time.monotonic() > end:
            raise UserError(
                f"rank {rank} on {host_name()} cannot reach rank 0 at {address}:{port}: {reason}; set MASTER_ADDR in "
                "slurm/site.sh to an address of the first host that all others reach"
            )
        time.sleep(1)


def _unreachable_reason(name: str, port: int) -> str:
    """Why no address of `name` answers; empty if one does, also by refusing the connection."""
    try:
        candidates = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return _reason(error)
    addresses = [str(address[0]) for *_, address in candidates]
    # If MASTER_ADDR is a loopback address and not a name, the user may run all ranks on one machine.
    if os.environ.get("SLURM_NODEID", "0") != "0" and name not in addresses and all(map(_is_loopback, addresses)):
        return f"{name} resolves to {addresses[0]}, which is this host itself"
    reason = ""
    for family, kind, protocol, _, address in candidates:
        with socket.socket(family, kind, protocol) as probe:
            probe.settimeout(_CONNECT_SECONDS)
            try:
                probe.connect(address)
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
    """Check the network. Every rank must stay in the context until all ranks know the result of rank 0.

    Args:
        store: shared by all ranks.
        rank: of this process.
        leaders: for each host its lowest rank, which checks for all of its ranks, and its name.
        cuda: whether NCCL is used.

    Yields:
        On rank 0 the problems, in one line, or an empty text; on other ranks an empty text.
    """
    ranks = [leader for leader, _ in leaders]
    if rank not in ranks:
        yield ""
        return
    end = time.monotonic() + _TOTAL_SECONDS
    neighbour = leaders[(ranks.index(rank) + 1) % len(leaders)]
    with contextlib.ExitStack() as listeners:
        problem = _check_host(store, rank, neighbour, cuda, listeners)
        store.set(f"network/result/{rank}", problem)
        yield _all_problems(store, leaders, end) if rank == 0 else ""


def _check_host(
    store: dist.Store, rank: int, neighbour: tuple[int, str], cuda: bool, listeners: contextlib.ExitStack
) -> str:
    """The problem of this host, or of its connection to the next one; listens until `listeners` is closed."""
    host, single_host = host_name(), neighbour[0] == rank
    local_endpoints, token = endpoints(cuda, named_only=single_host), uuid.uuid4().hex
    published = []
    for endpoint in local_endpoints:
        problem, port = endpoint.problem(single_host), 0
        if problem is None and not single_host:
            try:
                port = listeners.enter_context(_listening(endpoint, token))
            except OSError as error:
                problem = f"nothing can listen at {endpoint.address}, {endpoint.origin}: {_reason(error)}"
        if problem is not None:
            store.set(f"network/at/{rank}", json.dumps({"listening": []}))
            return f"{host}: {problem}; set {endpoint.variable} {_SHARED}; {host} has {interface_list()}"
        published.append({**asdict(endpoint), "port": port})
    if single_host:
        return ""
    store.set(
        f"network/at/{rank}", json.dumps({"listening": published, "token": token, "interfaces": interface_list()})
    )
    return _check_neighbour(store, local_endpoints, neighbour)


def _check_neighbour(store: dist.Store, local_endpoints: Sequence[Endpoint], neighbour: tuple[int, str]) -> str:
    host, (next_rank, next_host) = host_name(), neighbour
    try:
        store.wait([f"network/at/{next_rank}"], _NEIGHBOUR_TIMEOUT)
    except RuntimeError:
        return f"{next_host}: rank {next_rank} has not published its addresses; look at its output"
    published = json.loads(store.get(f"network/at/{next_rank}"))
    for fields in published["listening"]:
        port = fields.pop("port")
        remote = Endpoint(**fields)
        same_variable = [local for local in local_endpoints if local.variable == remote.variable]
        reason = _connect(remote, port, published["token"])
        if not reason and same_variable and remote.family not in [local.family for local in same_variable]:
            reason = f"{host} itself uses {same_variable[0].address}, of the other IP version"
        if reason:
            return (
                f"{host} does not reach {next_host} at {remote.address} ({remote.origin}): {reason}; set "
                f"{remote.variable} {_SHARED}; {next_host} has {published['interfaces']}"
            )
    return ""


@contextlib.contextmanager
def _listening(endpoint: Endpoint, token: str) -> Iterator[int]:
    """Send `token` to every connection at `endpoint`; yields the port."""

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
    """Why `endpoint` cannot be reached; empty if it can."""
    try:
        with socket.create_connection((endpoint.address, port), timeout=_CONNECT_SECONDS) as connection:
            answer = connection.recv(len(token), socket.MSG_WAITALL).decode(errors="replace")
    except OSError as error:
        return _reason(error)
    return "" if answer == token else "another host answers at this address"


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)


def _all_problems(store: dist.Store, leaders: Sequence[tuple[int, str]], end: float) -> str:
    """The first problem that hosts report until `end` on the monotonic clock, and the other hosts with problems."""
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
