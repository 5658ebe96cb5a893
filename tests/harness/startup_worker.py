"""Run by test_startup.py: one rank of several start-up checks, in which the last rank's node is broken in some way.

usage: startup_worker.py OUT CASE ...
What a case raised goes to OUT/CASE-RANK.txt, its events to OUT/CASE/events.jsonl. On as many GPUs as ranks where the
machine has them, else on the CPU.
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.distributed import process_group
from far_scale.distributed.process_group import Processes
from far_scale.health import node_check as nodes
from far_scale.health import preflight as startup
from far_scale.health.gemm_probe import GemmProbe
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog

multiply, seconds, version = GemmProbe._multiply, GemmProbe.seconds, nodes.importlib.metadata.version
DiskUsage = collections.namedtuple("DiskUsage", "total used free")


def multiply_wrongly(product: GemmProbe) -> None:
    multiply(product)
    product._out[3, 5] += 2


def ecc_error(product: GemmProbe) -> None:
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")


BREAKS = {
    "wrong product": lambda: mock.patch.object(GemmProbe, "_multiply", multiply_wrongly),
    "device error": lambda: mock.patch.object(GemmProbe, "_multiply", ecc_error),
    "slow product": lambda: mock.patch.object(GemmProbe, "seconds", lambda *given: 20 * seconds(*given)),
    "other code": lambda: mock.patch.object(nodes, "code_hash", lambda _: "0123456789abcdef"),
    "other torch": lambda: mock.patch.object(torch, "__version__", "2.9.0"),
    "other deepspeed": lambda: mock.patch.object(
        nodes.importlib.metadata, "version", lambda name: "0.1.2" if name == "deepspeed" else version(name)
    ),
    "full disk": lambda: mock.patch.object(nodes.shutil, "disk_usage", lambda _: DiskUsage(1, 1, 0)),
    "stuck device": lambda: mock.patch.object(GemmProbe, "is_right", lambda _: time.sleep(1000)),
    "lost messages": lambda: mock.patch.object(dist, "batch_isend_irecv", lambda _: []),
    "stuck link": lambda: mock.patch.object(dist, "batch_isend_irecv", lambda _: time.sleep(1000)),
}


@contextlib.contextmanager
def broken(case: str, recipe: Recipe) -> Iterator[Recipe]:
    """This rank's recipe in a case, and its node broken accordingly."""
    if case == "other recipe":
        train = recipe.train.model_copy(update={"zero_stage": 2})
        yield recipe.model_copy(update={"train": train})
    elif case == "other local folders":
        checkpoint = recipe.checkpoint.model_copy(update={"local_dir": "/tmp"})
        yield recipe.model_copy(update={"checkpoint": checkpoint})
    else:
        with BREAKS[case]() if case in BREAKS else contextlib.nullcontext():
            yield recipe


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= count
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    processes = Processes(rank, count, device, dist.new_group(backend="gloo"))
    process_group.STUCK_SECONDS = 30.0 if len(cases) > 1 else 3.0
    for case in cases:
        recipe = load_recipe("demo_cpu", [f"run_dir={out / case}"])
        result = "sound"
        with broken(case, recipe) if rank == count - 1 else contextlib.nullcontext(recipe) as own:
            try:
                hosts = startup.check_nodes(
                    own.name, own.far_config(), own.shared_values(),
                    {"run_dir": own.run_dir, "checkpoint.local_dir": own.checkpoint.local_dir},
                    processes, torch.float32, EventLog(out / case, processes.is_main_process), 0,
                )  # fmt: skip
                result += f" {hosts}"
            except UserError as error:
                result = str(error)
        (out / f"{case}-{rank}.txt").write_text(result)
    dist.destroy_process_group()


main()
