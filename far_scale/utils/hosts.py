"""What this machine is called."""

from __future__ import annotations

import os
import re
import socket


def host_name() -> str:
    """This machine's name: as SLURM calls the node, for `sbatch --exclude`, where it runs under SLURM."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: `n001` of `n[001-004,7],login1`.

    `scontrol show hostnames` gives the same, but a container has no scontrol.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")
