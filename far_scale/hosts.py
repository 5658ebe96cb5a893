"""What this machine is called."""

from __future__ import annotations

import os
import socket


def host_name() -> str:
    """This machine's name: as SLURM calls the node, for `sbatch --exclude`, where it runs under SLURM."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
