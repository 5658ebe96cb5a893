"""A rank that only meets the others: rendezvous_worker.py RANKS_THAT_ARE_WAITED_FOR DEVICES PATIENCE

DEVICES has a kind of device for each rank, with commas between them.
"""

from __future__ import annotations

import datetime
import os
import sys

import torch.distributed as dist

from far_scale.distributed import rendezvous
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    count, devices, patience = int(sys.argv[1]), sys.argv[2].split(","), float(sys.argv[3])
    rank = int(os.environ["RANK"])
    os.environ["WORLD_SIZE"] = str(count)
    rendezvous.PATIENCE = datetime.timedelta(seconds=patience)
    store = rendezvous.rendezvous(rank, count, devices[rank])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    dist.barrier()
    print("met")
    dist.destroy_process_group()


main()
