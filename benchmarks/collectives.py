"""What a training step sends: worked out for FAR's sizes on a cluster, and recorded on four CPU ranks as two nodes.

No times: bytes and counts do not depend on the machine. far_scale/distributed/ledger.py says what counts as sent.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import Row, environment, print_table, write_result
from options import count
from ranks import Ranks

from far_scale.config.recipe import load_recipe
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.writer import ShardSetSpec, ShardWriter
from far_scale.distributed.collective_costs import ModelShapes, ParallelSetup, step_collectives
from far_scale.model import FAR, FARConfig
from far_scale.model.presets import PRESETS
from far_scale.train.collectives import collective_setup
from far_scale.train.sharding import Sharding
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import read_events

RANKS, RANKS_A_NODE, CLIPS, SHAPE = 4, 2, 16, (32, 8, 8)
PATIENCE_SECONDS = 900.0
# So that backward gathers all weights again, as it does most of a model of many billion parameters.
GATHER_AGAIN = ["train.deepspeed.stage3_max_reuse_distance=0", "train.deepspeed.stage3_prefetch_bucket_size=0"]
RECORDED = {
    "ZeRO-1": Sharding(1),
    "ZeRO-3": Sharding(3),
    "ZeRO-3, gathered again": Sharding(3),
    "hpZ, gathered again": Sharding(3, 2),
    "hpZ, 4 packs, reduced once": Sharding(3, 2, reduce_once=True),
}
"""On two nodes of two ranks."""


def shapes_of(size: str) -> ModelShapes:
    with torch.device("meta"):
        return ModelShapes.from_model(FAR(FARConfig(*PRESETS[size])))


def worked_out(size: str, nodes: int, node: int) -> list[Row]:
    """A row for each way to share out the model over `nodes` of `node` ranks, in bf16."""
    shapes, rows = shapes_of(size), []
    common: dict[str, Any] = {"ranks": nodes * node, "nodes": nodes, "number_bytes": 2, "gradient_bytes": 2}
    for packs in (1, 4):
        for name, given in {
            "ZeRO-1": {"stage": 1},
            "ZeRO-3": {"stage": 3},
            f"ZeRO-3, hpZ {node}": {"stage": 3, "hpz": node},
            f"ZeRO-3, hpZ {node}, reduced once": {"stage": 3, "hpz": node, "reduces_once": True},
        }.items():
            if packs == 1 and "once" in name:
                continue  # it is anyhow
            entries = step_collectives(shapes, ParallelSetup(**common, packs=packs, **given))
            total = sum(entry.between for entry in entries) / 1e6
            weights = {
                phase: sum(e.between for e in entries if e.key[:2] == (phase, "all-gather")) / 1e6
                for phase in ("forward", "backward", "update")
            }
            rows.append(
                {
                    "model": f"FAR-{size}" if size in ("B", "M", "L", "XL") else size,
                    "shared out by": name,
                    "packs": packs,
                    "calls": sum(entry.calls for entry in entries),
                    "MB sent in the node": sum(entry.within for entry in entries) / 1e6,
                    "to other nodes": total,
                    "of it weights, forward": weights["forward"],
                    "weights, backward": weights["backward"],
                    "weights, after the update": weights["update"],
                    "gradients": total - sum(weights.values()),
                    "GB out of a node": node * total / 1e3,
                }
            )
    return rows


def make_set(folder: Path) -> None:
    """Clips of two frames of noise."""
    info = AutoencoderInfo(name="none", weight_hash="0" * 64, scaling_factor=1.0)
    facts = ShardSetSpec(latent_shape=SHAPE, latent_dtype="bfloat16", autoencoder=info, actions=0, labels=0)
    with ShardWriter(folder, facts, CLIPS) as writer:
        for number in range(CLIPS):
            writer.write(Sample(f"clip_{number}", torch.randn(2, *SHAPE).bfloat16(), None, None, 8.0, f"{number}.mp4"))


def recorded(name: str, size: str, folder: Path) -> Row:
    """The third step of FAR of this size on four ranks of this machine as two nodes, beside what was worked out."""
    sharding = RECORDED[name]
    packs = 4 if "4 packs" in name else 1
    run = folder / name.replace(" ", "-")
    arguments = [
        "far_b_ucf101_64", f"model.preset={size}", f"data.shards={folder / 'set'}", "data.autoencoder=none",
        "data.frames=2", "data.clips_per_pack=1", f"data.lanes={RANKS * packs}", "data.shuffle_window=1",
        "sample.given=1", "train.compile=false", "train.steps=1000", f"train.zero_stage={sharding.stage}",
        *(GATHER_AGAIN if "again" in name else []),
    ]  # fmt: skip
    if sharding.stage == 3:
        arguments += [
            f"train.deepspeed.zero_hpz_partition_size={sharding.hpz}",
            f"train.reduce_once={str(sharding.reduce_once).lower()}",
        ]
    recipe = load_recipe(arguments[0], [*arguments[1:], f"run_dir={run}"])
    expected = step_collectives(shapes_of(size), collective_setup(recipe, sharding, RANKS, RANKS // RANKS_A_NODE))
    output = folder / f"{run.name}.txt"
    event = None
    began = time.monotonic()
    with Ranks(RANKS, [*arguments, f"run_dir={run}"], output, ranks_a_node=RANKS_A_NODE) as ranks:
        while event is None:
            if ranks.ended() is not None or time.monotonic() - began > PATIENCE_SECONDS:
                raise UserError(f"{name}: the training did not come to its third step:\n{output.read_text()[-2000:]}")
            time.sleep(0.5)
            event = next((each for each in read_events(run) if each["event"] == "collectives"), None)
    found = event["collectives"]
    calls, sizes = sum(entry.calls for entry in expected), sum(entry.message_bytes for entry in expected)
    return {
        "shared out by": name,
        "packs": packs,
        "calls worked out": calls,
        "recorded": sum(row["calls"] for row in found),
        "message bytes worked out": sizes,
        "bytes recorded": sum(row["message_bytes"] for row in found),
        "MB sent in the node": event["within"] / 1e6,
        "to other nodes": event["between"] / 1e6,
        "same": {(entry.key, entry.calls, entry.message_bytes) for entry in expected}
        == {
            ((row["phase"], row["operation"], row["ranks"], row["nodes"]), row["calls"], row["message_bytes"])
            for row in found
        },
        "collectives": found,
    }


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = parser.add_argument("--sizes", nargs="+", choices=PRESETS, default=["B", "XL", "1.3B", "3B"])
    sizes.help = "of FAR, to work out (default: B XL 1.3B 3B)"
    parser.add_argument("--nodes", type=count, default=8, help="default: %(default)s")
    parser.add_argument("--node", type=count, default=8, help="ranks of a node (default: %(default)s)")
    parser.add_argument("--record", nargs="*", choices=RECORDED, default=list(RECORDED), help="default: all")
    parser.add_argument("--record-size", choices=PRESETS, default="B", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    args = parser.parse_args()
    facts = environment(torch.device("cpu"), {"load average": f"{os.getloadavg()[0]:.1f} at the beginning"})
    cluster = f"Worked out: {args.nodes} nodes of {args.node} ranks, bf16; MB (10^6 bytes) of a rank and step"
    tables = {cluster: [row for size in args.sizes for row in worked_out(size, args.nodes, args.node)]}
    print_table(cluster, tables[cluster])
    if args.record:
        title = f"Recorded: {args.record_size} on 2 nodes of 2 CPU ranks, bf16, third step"
        with tempfile.TemporaryDirectory(prefix="collectives-") as name:
            make_set(Path(name) / "set")
            tables[title] = [recorded(each, args.record_size, Path(name)) for each in args.record]
        print_table(title, tables[title])
    print(f"\n{write_result(args.out, 'collectives', facts, tables)}")


if __name__ == "__main__":
    main()
