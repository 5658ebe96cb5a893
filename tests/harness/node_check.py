"""For workers that train several recipes in one start of the processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from far_scale.train import loop


@contextlib.contextmanager
def nodes_checked_once() -> Iterator[None]:
    """Check the nodes before the first training only: the same processes start the others."""
    check_nodes, hosts = loop.check_nodes, list[str]()

    def check_first(*given: Any) -> list[str]:
        if not hosts:
            hosts.extend(check_nodes(*given))
        return hosts

    with mock.patch.object(loop, "check_nodes", check_first):
        yield
