"""Run by test_slow_ranks.py: one of two ranks that compares itself with the other at ten log lines.

usage: slow_ranks_worker.py OUT
The last rank calculates slowly at lines 1 to 3 and 7 to 10, and waits for data from line 2 on; at line 5 all do.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from far_scale.distributed.process_group import Processes
from far_scale.health.gemm_probe import GemmProbe
from far_scale.health.straggler import StragglerDetector
from far_scale.utils.event_log import EventLog


def main() -> None:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    processes = Processes(rank, count, torch.device("cpu"), dist.new_group(backend="gloo"))
    slow = StragglerDetector(
        processes, torch.float32, EventLog(Path(sys.argv[1]), processes.is_main_process), ["n0", "n1"]
    )
    for line in range(1, 11):
        time.sleep(0.1)
        # The machine's own load must not count, so the product's time is given.
        product = 0.004 if rank == count - 1 and line not in (4, 5, 6) else 0.001
        waited = 0.05 if line == 5 or (rank == count - 1 and line >= 2) else 0.001
        with mock.patch.object(GemmProbe, "seconds", lambda *_, product=product: product):
            slow.report(line, waited)
    dist.destroy_process_group()


main()
