"""Names of hosts, and text about ranks and their hosts for operators: `ranks 0-7, 12 on n2`."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence


def host_name() -> str:
    """This host's name; under SLURM that of the node, as for `sbatch --exclude`."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(nodes: str) -> str:
    """The first host of SLURM's list of nodes: `n001` of `n[001-004,7],login1`.

    As `scontrol show hostnames`, which a container does not have.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


def rank_list(ranks: Sequence[int]) -> str:
    """Ascending `ranks` as text with ranges: `rank 3`, `ranks 0-7, 12`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'' if len(ranks) == 1 else 's'} {text}"


def ranks_by_host(hosts: Sequence[str]) -> dict[str, list[int]]:
    """The ranks on each host, from every rank's host by rank."""
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    return nodes


def ranks_on_hosts(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ascending `ranks` as text with their hosts, from every rank's host by rank."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    return ", ".join(f"{rank_list(on_host)} on {host}" for host, on_host in by_host.items())
