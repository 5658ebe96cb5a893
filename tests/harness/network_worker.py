"""One of two ranks, on a host of its own, that meet again and again with other interfaces: network_worker.py CASES

CASES is JSON: a list of cases, each the variables of rank 0, those of rank 1, and the kind of device. The last must be
a good one: over its store the ranks make a process group of gloo. For each it prints `case`, with seconds and what was
refused as JSON; rank 1 also `unreachable`, with the reason, for some addresses.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch.distributed as dist

from far_scale.distributed import network
from far_scale.distributed.rendezvous import rendezvous
from far_scale.utils.errors import UserError

UNREACHABLE = ["10.78.0.1", "nobody.invalid", "n1"]


def main() -> None:
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    for number, (*variables, device) in enumerate(json.loads(sys.argv[1])):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.pop(name, None)
        os.environ.update(variables[rank], MASTER_PORT=str(port + number))
        begun, refused, store = time.monotonic(), "", None
        try:
            store = rendezvous(rank, 2, device)
        except UserError as error:
            refused = str(error)
        print("case", json.dumps([time.monotonic() - begun, refused]), flush=True)
    assert store is not None
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    dist.barrier()
    if rank == 1:
        network._TOTAL_SECONDS = 1.0
        os.environ["SLURM_NODEID"] = "1"
        for address in UNREACHABLE:
            try:
                network.wait_for_route(1, address, port)
            except UserError as error:
                print("unreachable", error, flush=True)
    dist.barrier()
    dist.destroy_process_group()


main()
