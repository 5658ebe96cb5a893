"""The network addresses of this host, and which of them gloo and NCCL take."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
"""The variables by which a user names interfaces."""

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>: the IPv4 address of an interface


@dataclass(frozen=True)
class Endpoint:
    """An address at which the other hosts are to reach this one.

    Attributes:
        address: numeric, IPv4 or IPv6; empty where there is none.
        origin: where it comes from, or why there is none, for a message.
        variable: the variable that sets another one.
    """

    address: str
    origin: str
    variable: str

    def problem(self, alone: bool) -> str | None:
        """Why this address will not do, if so.

        Args:
            alone: whether there are no other hosts.
        """
        if not self.address:
            return self.origin
        if alone or not ipaddress.ip_address(self.address).is_loopback:
            return None
        return f"other hosts cannot reach {self.address}, {self.origin}"

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return socket.AF_INET if ipaddress.ip_address(self.address).version == 4 else socket.AF_INET6


def network_stack() -> str:
    """The same text for processes that share loopback addresses: of one network namespace of one running kernel."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")]
    return "/".join(parts)


def endpoints(cuda: bool, named_alone: bool) -> list[Endpoint]:
    """The addresses that gloo takes on this host, and NCCL's where a variable names its interface.

    Args:
        cuda: whether NCCL is used.
        named_alone: only of interfaces that a variable names; else also the one that gloo takes by itself.
    """
    found = []
    if names := os.environ.get(GLOO):
        found += [_of_interface(name, GLOO) for name in names.split(",")]
    elif not named_alone:
        found.append(_of_host_name())
    # NCCL takes the first that matches. What it takes where a list only excludes interfaces is its own affair.
    if cuda and (names := os.environ.get(NCCL)) and not names.startswith("^"):
        found.append(_of_interface(_nccl_interface(names), NCCL))
    return found


def interfaces() -> dict[str, str]:
    """Interfaces of this host besides loopback, with the first address of each."""
    found = {name: _interface_address(name) for _, name in socket.if_nameindex()}
    return {name: at for name, at in found.items() if at is not None and not ipaddress.ip_address(at).is_loopback}


def interface_list() -> str:
    """`eth0 10.0.0.5, ib0 10.1.0.5`, for a message."""
    return ", ".join(f"{name} {address}" for name, address in interfaces().items()) or "none but loopback"


def _of_interface(name: str, variable: str) -> Endpoint:
    if variable == GLOO and (not name or name[0] in "^=" or name != name.strip()):
        return Endpoint("", f"{variable} holds {name!r}; it takes whole names with only commas between them", variable)
    if name not in (there for _, there in socket.if_nameindex()):
        return Endpoint("", f"there is no interface {name}, which {variable} names", variable)
    if (address := _interface_address(name)) is None:
        return Endpoint("", f"the interface {name}, which {variable} names, has no address", variable)
    return Endpoint(address, f"interface {name} by {variable}", variable)


def _of_host_name() -> Endpoint:
    """As torch's gloo without the variable: the first address of the host's name that is its own, else loopback."""
    name = socket.gethostname()
    with contextlib.suppress(socket.gaierror):
        for family, kind, protocol, _, where in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(where)
                return Endpoint(str(where[0]).partition("%")[0], f"what the name {name} resolves to", GLOO)
    return Endpoint("127.0.0.1", f"since the name {name} resolves to no address of this host", GLOO)


def _nccl_interface(names: str) -> str:
    """The first interface that NCCL_SOCKET_IFNAME matches: prefixes, or whole names after a `=`."""
    wanted = [part.partition(":")[0] for part in names.removeprefix("=").split(",")]
    there = [name for _, name in socket.if_nameindex()]
    whole = names.startswith("=")
    matching = [name for name in there if any(name == want if whole else name.startswith(want) for want in wanted)]
    return next((name for name in matching if _interface_address(name) is not None), matching[0] if matching else names)


def _interface_address(name: str) -> str | None:
    """The first IPv4 address of an interface, without one the first IPv6 address that is not link-local, else None."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, owner = line.split()
            address = ipaddress.IPv6Address(bytes.fromhex(digits))
            if owner == name and not address.is_link_local:
                return str(address)
    return None
