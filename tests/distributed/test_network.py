"""The check of the network between hosts: which address gloo and NCCL take, and whether the others reach it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from far_scale.distributed import addresses, network
from far_scale.distributed.addresses import Endpoint, endpoints, network_stack
from far_scale.distributed.network import checked_network
from far_scale.distributed.process_group import read_launcher_variables
from harness.launch import ROOT, environment
from harness.namespaces import joined_hosts
from harness.processes import Rank

SHARED = "in slurm/site.sh to an interface that all hosts share"
HERE = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib1": None, "ib2": "fd00::5", "docker0": "172.17.0.1"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host named n7 with the interfaces HERE, whose name resolves to its own loopback address."""
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(HERE)))
    monkeypatch.setattr(addresses, "_interface_address", HERE.get)
    monkeypatch.setattr(socket, "gethostname", lambda: "n7")
    resolve_to(monkeypatch, "127.0.1.1")
    for name in (addresses.GLOO, addresses.NCCL):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def resolve_to(patch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Whatever name is asked for."""
    infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    patch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)


def test_the_address_of_the_hosts_name(host: pytest.MonkeyPatch) -> None:
    """The first that is this host's own, as gloo takes it."""
    (endpoint,) = endpoints(cuda=True, named_only=False)
    assert endpoint == Endpoint("127.0.1.1", "what the name n7 resolves to", "GLOO_SOCKET_IFNAME")
    assert endpoint.problem(single_host=False) == "other hosts cannot reach 127.0.1.1, what the name n7 resolves to"
    assert endpoint.problem(single_host=True) is None
    resolve_to(host, "192.0.2.1", "127.0.0.3")  # the first belongs to nobody
    assert endpoints(cuda=True, named_only=False)[0].address == "127.0.0.3"
    resolve_to(host)
    (endpoint,) = endpoints(cuda=True, named_only=False)
    assert (endpoint.address, endpoint.origin) == ("127.0.0.1", "since the name n7 resolves to no address of this host")
    assert endpoints(cuda=True, named_only=True) == []


@pytest.mark.parametrize(
    ("gloo", "nccl", "taken"),
    [
        ("eth0", None, ["10.0.0.5"]),
        ("eth0,ib2", "ib", ["10.0.0.5", "fd00::5", "fd00::5"]),  # the first of that prefix with an address
        ("eth0", "=docker0", ["10.0.0.5", "172.17.0.1"]),
        ("eth0", "^docker", ["10.0.0.5"]),
        ("eth0", "xx,doc", ["10.0.0.5", "172.17.0.1"]),
    ],
)
def test_interfaces_that_are_named(host: pytest.MonkeyPatch, gloo: str, nccl: str | None, taken: list[str]) -> None:
    host.setenv("GLOO_SOCKET_IFNAME", gloo)
    if nccl is not None:
        host.setenv("NCCL_SOCKET_IFNAME", nccl)
    assert [each.address for each in endpoints(cuda=True, named_only=True)] == taken
    assert all(each.variable == "GLOO_SOCKET_IFNAME" for each in endpoints(cuda=False, named_only=True))


@pytest.mark.parametrize(("nodes", "address"), [("1", "127.0.0.1"), ("2", "n7")])
def test_a_step_on_one_node_needs_no_name(nodes: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"STEP_ID": "0", "STEP_NUM_NODES": nodes, "STEP_NODELIST": "n[7-8]", "JOB_ID": "41234", "PROCID": "3"}
    kept = {"PATH": "/bin"} | {f"SLURM_{key}": value for key, value in step.items()}
    monkeypatch.setattr("os.environ", kept | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"})
    assert read_launcher_variables() == (3, 4)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (address, "21234")


@pytest.mark.parametrize(("names", "odd"), [("^lo", "^lo"), ("=eth0", "=eth0"), ("eth0,", ""), ("eth0, ib2", " ib2")])
def test_gloo_takes_only_names(host: pytest.MonkeyPatch, names: str, odd: str) -> None:
    host.setenv("GLOO_SOCKET_IFNAME", names)
    said = f"GLOO_SOCKET_IFNAME holds {odd!r}; it takes whole names with only commas between them"
    assert endpoints(cuda=False, named_only=True)[-1].problem(single_host=True) == said


def test_interfaces_that_are_not_there(host: pytest.MonkeyPatch) -> None:
    host.setenv("GLOO_SOCKET_IFNAME", "ib0")
    host.setenv("NCCL_SOCKET_IFNAME", "ib1")
    assert [each.problem(single_host=True) for each in endpoints(cuda=True, named_only=True)] == [
        "there is no interface ib0, which GLOO_SOCKET_IFNAME names",
        "the interface ib1, which NCCL_SOCKET_IFNAME names, has no address",
    ]
    assert addresses.interface_list() == "eth0 10.0.0.5, ib2 fd00::5, docker0 172.17.0.1"


def test_this_machine_is_one_network() -> None:
    code = "from far_scale.distributed.addresses import *; print(network_stack(), *endpoints(False, False))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{network_stack()} Endpoint(")


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    """The store of two hosts, n7 and n8, that take loopback's address for one that others reach."""
    monkeypatch.setattr(
        network, "endpoints", lambda *_, **__: [Endpoint("127.0.0.1", "interface eth0", addresses.GLOO)]
    )
    monkeypatch.setattr(Endpoint, "problem", lambda *_: None)
    monkeypatch.setattr(network, "_NEIGHBOUR_TIMEOUT", timedelta(seconds=0.1))
    monkeypatch.setattr(network, "_TOTAL_SECONDS", 0.2)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    return dist.HashStore()


def test_a_host_that_falls_silent_is_named(first_of_two: dist.HashStore) -> None:
    with checked_network(first_of_two, 0, [(0, "n7"), (8, "n8")], cuda=False) as problem:
        assert problem == "n8: rank 8 has not published its addresses; look at its output (also: n8)"


def test_an_answer_of_another_host_is_recognised(first_of_two: dist.HashStore) -> None:
    """As where each host has a bridge of the same address, such as docker0."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        listens = {"address": "127.0.0.1", "origin": "interface eth0", "variable": addresses.GLOO}
        said = {"listening": [{**listens, "port": other.getsockname()[1]}], "token": "x", "interfaces": "eth0 10.0.0.6"}
        first_of_two.set("network/at/8", json.dumps(said))
        first_of_two.set("network/result/8", "")
        answer = threading.Thread(target=lambda: other.accept()[0].close())
        answer.start()
        with checked_network(first_of_two, 0, [(0, "n7"), (8, "n8")], cuda=False) as problem:
            assert problem == (
                "n7 does not reach n8 at 127.0.0.1 (interface eth0): another host answers at this address; "
                f"set GLOO_SOCKET_IFNAME {SHARED}; n8 has eth0 10.0.0.6"
            )
        answer.join()


@contextlib.contextmanager
def ranks_on_two_hosts(folder: Path, *arguments: str) -> Iterator[list[Rank]]:
    """A rank of `python ARGUMENTS` on each of `joined_hosts`."""
    ranks = []
    with joined_hosts(folder) as hosts:
        try:
            for number, host in enumerate(hosts):
                own = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n0"}
                with (folder / f"rank-{number}.out").open("wb") as output:
                    process = subprocess.Popen(
                        host.command(sys.executable, *arguments),
                        env={**environment(), **own, "MASTER_PORT": "29400"},
                        cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                    )  # fmt: skip
                ranks.append(Rank(process, folder / f"rank-{number}.out"))
            yield ranks
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.wait()


@pytest.mark.slow
def test_two_hosts_that_do_not_reach_each_other(tmp_path: Path) -> None:
    """Refused in time, on both, by a line that names host, address and variable; the right interface is taken."""

    def interface(gloo: str, nccl: str = "net0") -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": gloo, "NCCL_SOCKET_IFNAME": nccl}

    gloo, nccl = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
    has0, has1 = (f"{SHARED}; n{n} has net0 10.77.0.{n + 1}, lost0 10.78.0.{n + 1}" for n in (0, 1))
    lost = "n0 does not reach n1 at 10.78.0.2 (interface lost0 by {0}): No route to host; set {0}"
    cases = [
        (
            [{}, {}, "cpu"],
            f"n0: other hosts cannot reach 127.0.1.1, what the name n0 resolves to; set {gloo} {has0} (also: n1)",
        ),
        (
            [interface("net0"), {}, "cpu"],
            f"n1: other hosts cannot reach 127.0.1.1, what the name n1 resolves to; set {gloo} {has1}",
        ),
        ([interface("lost0"), interface("lost0"), "cpu"], f"{lost.format(gloo)} {has1} (also: n1)"),
        (
            [interface("net0"), interface("ib9"), "cpu"],
            f"n1: there is no interface ib9, which {gloo} names; set {gloo} {has1}",
        ),
        ([interface("net0"), interface("net0", "lost"), "cuda"], f"{lost.format(nccl)} {has1}"),
        ([interface("net0"), interface("net0"), "cpu"], ""),
    ]
    worker = str(ROOT / "tests" / "harness" / "network_worker.py")
    with ranks_on_two_hosts(tmp_path, worker, json.dumps([case for case, _ in cases])) as ranks:
        ends = [rank.end(240) for rank in ranks]
    assert [status for status, _ in ends] == [0, 0], ends
    said = [[line.partition(" ") for line in output.splitlines()] for _, output in ends]
    for lines in said:
        results = [json.loads(rest) for kind, _, rest in lines if kind == "case"]
        assert [refused for _, refused in results] == [refused for _, refused in cases]
        assert all(seconds < 60 for seconds, _ in results[1:])  # the first includes what the other needs to start
    unreachable = [rest for kind, _, rest in said[1] if kind == "unreachable"]
    assert unreachable[0].startswith("rank 1 on n1 cannot reach rank 0 at 10.78.0.1:29400: No route to host; set ")
    assert unreachable[1].startswith("rank 1 on n1 cannot reach rank 0 at nobody.invalid:29400: ")
    assert ": n1 resolves to 127.0.1.1, which is this host itself; set " in unreachable[2]
    assert all("; set MASTER_ADDR in slurm/site.sh" in line for line in unreachable)
