"""Two hosts on this machine: joined network namespaces, each with its own host name and /etc/hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Host:
    """A namespace.

    Attributes:
        name: its host name.
        keeper: the process that keeps it.
    """

    name: str
    keeper: subprocess.Popen[str]

    def command(self, *words: object) -> list[str]:
        """What runs `words` in it."""
        return ["nsenter", f"--target={self.keeper.pid}", "--net", "--uts", "--mount", "--", *map(str, words)]

    def run(self, words: str) -> None:
        """Run a command in it, which must succeed."""
        subprocess.run(self.command(*words.split()), check=True, capture_output=True, text=True)


@contextlib.contextmanager
def joined_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts n0 and n1. Their interfaces `net0`, 10.77.0.1 and .2, are joined; `lost0`, 10.78.0.1 and .2, are not.

    Each resolves its own name to 127.0.1.1, as Debian has it, and the other's to its address of `net0`. Without the
    right to make them the test is skipped.
    """
    _install_iproute2()
    with contextlib.ExitStack() as kept:
        try:
            hosts = (kept.enter_context(_host(folder, 0)), kept.enter_context(_host(folder, 1)))
            hosts[0].run(f"ip link add net0 type veth peer name net0 netns {hosts[1].keeper.pid}")
            for number, host in enumerate(hosts, 1):
                host.run("ip link set lo up")
                host.run("ip link add lost0 type veth peer name lost1")
                host.run("ip link set lost1 up")
                for name, address in (("net0", f"10.77.0.{number}/24"), ("lost0", f"10.78.0.{number}/24")):
                    host.run(f"ip addr add {address} dev {name}")
                    host.run(f"ip link set {name} up")
        except (subprocess.CalledProcessError, OSError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"network namespaces cannot be made here: {' '.join(reason.split())}")
        yield hosts


@contextlib.contextmanager
def _host(folder: Path, number: int) -> Iterator[Host]:
    name, other = f"n{number}", 1 - number
    hosts_file = folder / f"{name}.hosts"
    hosts_file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.0.{other + 1} n{other}\n")
    script = f"mount --bind {hosts_file} /etc/hosts && hostname {name} && echo ready && exec sleep 600"
    with subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "bash", "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as keeper:  # fmt: skip
        try:
            assert keeper.stdout is not None and keeper.stderr is not None
            if keeper.stdout.readline() != "ready\n":
                raise OSError(keeper.stderr.read())
            yield Host(name, keeper)
        finally:
            keeper.kill()


def _install_iproute2() -> None:
    """Debian's package, where root may install it."""
    if shutil.which("ip") is None and os.getuid() == 0 and shutil.which("apt-get"):
        install = "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq iproute2"
        subprocess.run(["bash", "-c", install], capture_output=True)
