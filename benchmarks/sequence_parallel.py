"""What sequence parallelism costs: timed on CPU ranks over gloo, and worked out for GPUs in a node.

    python benchmarks/sequence_parallel.py

See benchmarks/README.md for what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from measure import Row, environment, print_table, write_result
from options import add_measuring, count, start

from far_scale.distributed.process_group import Processes
from far_scale.distributed.sequence_parallel import exchanges, start_sequence_group
from far_scale.model import FAR, FARConfig
from far_scale.model.attention import exchange
from far_scale.model.layout import FrameLayout
from far_scale.model.presets import PRESETS
from far_scale.model.sharded_layout import SequenceRank, ShardedLayout, even_split
from far_scale.train.costs import train_flops
from far_scale.utils.command_line import command_line

SIDE = 8
H100 = 989e12
TIMED = "Timed on CPU ranks: seconds of as many packs as ranks, forward and backward, medians"
WORKED_OUT = "Worked out for FAR-XL in bf16, one clip a pack, GPUs of one node"


def pass_over(model: FAR, layout: FrameLayout, shard: SequenceRank | None) -> None:
    """Forward and backward of a pack, or of this rank's frames of it."""
    used = layout if shard is None else ShardedLayout(layout, shard)
    frames = layout.frames if shard is None else len(ShardedLayout(layout, shard).rows)
    latents = torch.ones(frames, model.config.channels, SIDE, SIDE)
    model(latents, torch.ones(frames), layout=used).sum().backward()


def measure(rank: int, ranks: int, args: argparse.Namespace, folder: str) -> None:
    """A rank: each has packs of its own, or all share each of as many packs; rank 0 writes the seconds."""
    torch.set_num_threads(args.threads or 1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(minutes=30))
    shard = start_sequence_group(ranks, Processes(rank, ranks, torch.device("cpu"))).shard
    spent = [0.0]
    all_to_all = dist.all_to_all_single

    def timed_exchange(*given, **named):
        begin = time.perf_counter()
        all_to_all(*given, **named)
        spent[0] += time.perf_counter() - begin

    exchange.dist.all_to_all_single = timed_exchange
    seconds: dict[str, dict[str, list[float]]] = {}
    for frames in args.frames:
        config = FARConfig(args.layers, args.heads, window=frames)
        torch.manual_seed(0)
        model, layout = FAR(config), config.layout((frames,), (SIDE, SIDE))
        found = seconds[str(frames)] = {"own packs": [], "shared packs": [], "of it exchange": []}
        for turn in range(args.repeats + 1):
            for side, packs, used in (("own packs", 1, None), ("shared packs", ranks, shard)):
                spent[0] = 0.0
                dist.barrier()
                begin = time.perf_counter()
                for _ in range(packs):
                    pass_over(model, layout, used)
                dist.barrier()
                if turn:  # the first warms up
                    found[side].append(time.perf_counter() - begin)
                    if used is not None:
                        found["of it exchange"].append(spent[0])
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def timed(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (args.ranks, args, folder), nprocs=args.ranks)
        for frames, sides in json.loads(Path(folder, "seconds.json").read_text()).items():
            medians = {side: statistics.median(values) for side, values in sides.items()}
            rows.append(
                {
                    "frames": int(frames),
                    "heads": "+".join(map(str, even_split(args.heads, args.ranks))),
                    **medians,
                    "shared / own": medians["shared packs"] / medians["own packs"],
                    "all": sides,
                }
            )
    return rows


def worked_out(gigabytes: float, mfu: float) -> list[Row]:
    """The exchange and the imbalance beside the arithmetic.

    Args:
        gigabytes: that a GPU sends a second to the others of its node.
        mfu: fraction of an H100's peak that the arithmetic reaches.
    """
    layers, heads = PRESETS["XL"]
    rows: list[Row] = []
    for frames in (16, 64, 300):
        config = FARConfig(layers, heads, window=frames)
        layout = config.layout((frames,), (SIDE, SIDE))
        total = train_flops(config, layout)
        attention = 3 * 4 * layers * config.width * layout.attended_pairs
        for size in (2, 4, 8):
            messages = [2 * elements for _, elements in exchanges(layout, layers, heads, size, 2, recomputed=False)]
            sent = sum(messages) * (size - 1) / size
            largest = max(even_split(frames, size)) * size / frames, max(even_split(heads, size)) * size / heads
            compute = (largest[0] * (total - attention) + largest[1] * attention) / size / (mfu * H100)
            rows.append(
                {
                    "frames": frames,
                    "GPUs a pack": size,
                    "MB sent by a GPU": sent / 1e6,
                    "ms exchange": 1e3 * sent / (gigabytes * 1e9),
                    "ms arithmetic": 1e3 * compute,
                    "even": 1e3 * total / size / (mfu * H100),
                    "overhead": f"{(compute + sent / (gigabytes * 1e9)) / (total / size / (mfu * H100)) - 1:.1%}",
                }
            )
    return rows


@command_line
def main() -> None:
    args = arguments()
    device = start(args)
    tables = {}
    assumed = {"assumed GB/s": f"{args.gigabytes:g}", "assumed MFU": f"{args.mfu:g} of {H100 / 1e12:.0f} TFLOP/s"}
    facts = environment(device, {"load average": f"{os.getloadavg()[0]:.1f} at the beginning", **assumed})
    tables[TIMED] = timed(args)
    tables[WORKED_OUT] = worked_out(args.gigabytes, args.mfu)
    path = write_result(args.out, "sequence-parallel", facts, tables)
    for title, rows in tables.items():
        print_table(title, rows)
    print(f"\nwritten: {path} and .json", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure sequence parallelism on CPU ranks, work it out for GPUs.")
    parser.add_argument("--ranks", type=count, default=2, help="CPU ranks that share a pack (default: %(default)s)")
    parser.add_argument("--frames", type=count, nargs="+", default=[16, 32], help="of a clip (default: 16 32)")
    parser.add_argument("--layers", type=count, default=2, help="default: %(default)s")
    parser.add_argument("--heads", type=count, default=12, help="default: %(default)s")
    parser.add_argument("--gigabytes", type=float, default=300.0, help="GB/s a GPU sends by NVLink (default: 300)")
    parser.add_argument("--mfu", type=float, default=0.3, help="of the arithmetic (default: %(default)s)")
    add_measuring(parser, repeats=5, minutes=0, device="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
