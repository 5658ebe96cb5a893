"""Hosts, origins, tokens and rates."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from far_scale.play.access import Access, RateLimit
from harness.refusal import refused

TOKEN = "0123456789abcdef"


def problem(access: Access, host: str, origin: str | None = None, token: str | None = None) -> str | None:
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    return access.problem(make_mocked_request("GET", "/" if token is None else f"/?token={token}", headers=headers))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_hosts_need_a_token(host: str) -> None:
    refused(lambda: Access(host, None), f"--host {host}", "--token")
    refused(lambda: Access(host, "short"), "--token", "16")
    assert problem(Access(host, TOKEN), "10.0.0.1:80", token=TOKEN) is None


def test_local_servers_answer_to_local_names_only() -> None:
    access = Access("127.0.0.1", None)
    for host in ("127.0.0.1:8760", "localhost:9000", "LOCALHOST", "[::1]:8760", "127.0.0.2"):
        assert problem(access, host) is None, host
    for host in ("rebound.example:8760", "", "192.168.1.5", "127.0.0.1.example", "[", "localhost.example"):
        assert "is not a name of this server" in (problem(access, host) or ""), host


def test_origins_must_be_the_server_itself() -> None:
    access = Access("127.0.0.1", None)
    assert problem(access, "localhost:80", "http://localhost:80") is None
    for origin in ("http://localhost:81", "http://evil.example", "null", "", "http://127.0.0.1:80"):
        assert "another site" in (problem(access, "localhost:80", origin) or ""), origin


def test_tokens() -> None:
    access = Access("0.0.0.0", TOKEN)
    for token in (None, "", "wrong", TOKEN + "0", "%ff"):
        assert "token" in (problem(access, "10.0.0.1", token=token) or ""), token
    assert "name of this server" in (problem(access, "rebound.example", token=TOKEN) or "")


def test_the_rate_limit_is_a_bucket() -> None:
    limit = RateLimit(rate=2.0, burst=3.0)
    assert [limit.allows(100.0) for _ in range(4)] == [True, True, True, False]
    assert [limit.allows(101.0) for _ in range(3)] == [True, True, False]
    assert [limit.allows(200.0) for _ in range(4)] == [True, True, True, False]
