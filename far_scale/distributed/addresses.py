"""The network addresses of this host, and which of them gloo and NCCL use."""

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
"""Environment variables that name network interfaces."""

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>: the IPv4 address of an interface


@dataclass(frozen=True)
class Endpoint:
    """An address at which other hosts should reach this one.

    Attributes:
        address: numeric, IPv4 or IPv6; empty if there is none.
        origin: where it comes from, or why there is none, for messages.
        variable: the environment variable that sets another one.
    """

    address: str
    origin: str
    variable: str

    def problem(self, single_host: bool) -> str | None:
        """Why this address cannot be used; None if it can."""
        if not self.address:
            return self.origin
        if single_host or not ipaddress.ip_address(self.address).is_loopback:
            return None
        return f"other hosts cannot reach {self.address}, {self.origin}"

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return socket.AF_INET if ipaddress.ip_address(self.address).version == 4 else socket.AF_INET6


def network_stack() -> str:
    """An id that processes have in common if they share loopback addresses: one kernel and network namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")]
    return "/".join(parts)


def endpoints(cuda: bool, named_only: bool) -> list[Endpoint]:
    """The addresses that gloo uses on this host, and those of NCCL if a variable names its interface.

    Args:
        cuda: whether NCCL is used.
        named_only: only interfaces named by a variable, without the one that gloo chooses itself.
    """
    result = []
    if names := os.environ.get(GLOO):
        result += [_interface_endpoint(name, GLOO) for name in names.split(",")]
    elif not named_only:
        result.append(_host_name_endpoint())
    # NCCL uses the first interface that matches. If the list only excludes some, its choice is not known here.
    if cuda and (names := os.environ.get(NCCL)) and not names.startswith("^"):
        result.append(_interface_endpoint(_nccl_interface(names), NCCL))
    return result


def interfaces() -> dict[str, str]:
    """The interfaces of this host except loopback, with the first address of each."""
    by_name = {name: _interface_address(name) for _, name in socket.if_nameindex()}
    return {name: ip for name, ip in by_name.items() if ip is not None and not ipaddress.ip_address(ip).is_loopback}


def interface_list() -> str:
    """The interfaces as text: `eth0 10.0.0.5, ib0 10.1.0.5`."""
    return ", ".join(f"{name} {address}" for name, address in interfaces().items()) or "none but loopback"


def _interface_endpoint(name: str, variable: str) -> Endpoint:
    if variable == GLOO and (not name or name[0] in "^=" or name != name.strip()):
        return Endpoint("", f"{variable} holds {name!r}; it takes whole names with only commas between them", variable)
    if name not in (existing for _, existing in socket.if_nameindex()):
        return Endpoint("", f"there is no interface {name}, which {variable} names", variable)
    if (address := _interface_address(name)) is None:
        return Endpoint("", f"the interface {name}, which {variable} names, has no address", variable)
    return Endpoint(address, f"interface {name} by {variable}", variable)


def _host_name_endpoint() -> Endpoint:
    """The choice of torch's gloo without the variable: the first own address of the host's name, else loopback."""
    name = socket.gethostname()
    with contextlib.suppress(socket.gaierror):
        for family, kind, protocol, _, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return Endpoint(str(address[0]).partition("%")[0], f"what the name {name} resolves to", GLOO)
    return Endpoint("127.0.0.1", f"since the name {name} resolves to no address of this host", GLOO)


def _nccl_interface(names: str) -> str:
    """The first interface that NCCL_SOCKET_IFNAME matches: it has prefixes, or whole names after `=`."""
    patterns = [part.partition(":")[0] for part in names.removeprefix("=").split(",")]
    existing = [name for _, name in socket.if_nameindex()]
    whole = names.startswith("=")
    matching = [name for name in existing if any(name == p if whole else name.startswith(p) for p in patterns)]
    return next((name for name in matching if _interface_address(name) is not None), matching[0] if matching else names)


def _interface_address(name: str) -> str | None:
    """The first IPv4 address of an interface, else its first IPv6 address that is not link-local, else None."""
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
