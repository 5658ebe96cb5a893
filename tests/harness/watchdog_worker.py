"""Run by test_watchdog.py: one rank of a loop of small all-reduces under the watchdog.

usage: watchdog_worker.py RUN SECONDS CASE
CASE is what the last rank does before the first step or after step 3; at step 3 rank 0 leaves RUN/step-3.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from far_scale.health import watchdog
from far_scale.utils.event_log import EventLog


def spin_forever() -> None:
    while True:
        pass


def hold_pythons_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)  # PyDLL calls do not release it


def main() -> None:
    run, seconds, case = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watchdog.GRACE_SECONDS, watchdog.START_SECONDS = 1.0, 2.0
    if case == "dead disk":
        watchdog.Watchdog._write_stacks = lambda _: time.sleep(1000)
    after_step_3 = {
        "waits for the test": lambda: time.sleep(2),
        "spins": spin_forever,
        "holds Python's lock": hold_pythons_lock,
        "dead disk": lambda: time.sleep(1000),
    }
    dist.init_process_group("gloo")
    with watchdog.Watchdog(run, rank, seconds, EventLog(run, rank == 0), [f"n{n}" for n in range(count)]) as dog:
        if case in ("slow start", "stuck start"):
            time.sleep(2 * seconds if case == "slow start" else 1000)
        for step in range(1, 7):
            dist.all_reduce(torch.ones(1))
            dog.beat(step)
            if step == 3 and rank == 0:
                (run / "step-3").touch()
            if step == 3 and rank == count - 1 and case in after_step_3:
                after_step_3[case]()
    print("all steps done", flush=True)
    dist.destroy_process_group()


main()
