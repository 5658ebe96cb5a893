"""Who may use the server: hosts and origins against DNS rebinding, a token on other than loopback addresses, rates."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from aiohttp import web

from far_scale.utils.errors import UserError

MIN_TOKEN_LENGTH = 16


class Access:
    """Decides about requests, by the address that the server is bound to and its token."""

    def __init__(self, host: str, token: str | None) -> None:
        """
        Args:
            host: address or name that the server is bound to.
            token: what each request must have as `token` in its query; needed beyond this machine.

        Raises:
            UserError: another host than this machine's own without a token, or a token that can be guessed.
        """
        self._is_local = is_loopback(host)
        if token is None and not self._is_local:
            raise UserError(
                f"--host {host}: others could reach the page there, so give --token (at least {MIN_TOKEN_LENGTH} "
                "characters), or leave --host out for this machine only"
            )
        if token is not None and len(token) < MIN_TOKEN_LENGTH:
            raise UserError(f"--token: {len(token)} characters can be guessed; give at least {MIN_TOKEN_LENGTH}")
        self._token = token
        self._names = {host.lower(), "localhost"}
        if not self._is_local:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def problem(self, request: web.Request, needs_token: bool = True) -> str | None:
        """Why a request is refused, or None.

        A page of another site that a browser shows cannot talk to this server: its requests have an `Origin` that is
        not this server's, and if its name was made to point here (DNS rebinding), that name as `Host`.
        """
        host = request.headers.get("Host", "")
        name = _host_name(host)
        if name is None or not (name in self._names or self._is_allowed_address(name)):
            return f"{host[:80]!r} is not a name of this server; open it by the address that it has printed"
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "this page belongs to another site"
        if needs_token and self._token is not None:
            given = request.query.get("token", "")
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                return "the token is missing or wrong; open the address with ?token=... that was chosen at the start"
        return None

    def _is_allowed_address(self, name: str) -> bool:
        """Whether `name` is an address and not a name: those that others' names point to are not sent as `Host`."""
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_local


class RateLimit:
    """A token bucket: `burst` messages at once, and `rate` a second in the long run."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst, self._tokens, self._time = rate, burst, burst, 0.0

    def allows(self, now: float) -> bool:
        """Whether a message may come now; `now` in seconds of any clock."""
        self._tokens = min(self._burst, self._tokens + self._rate * (now - self._time))
        self._time = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or name."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_name(host: str) -> str | None:
    """The name or address in a `Host` header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
