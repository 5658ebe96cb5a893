"""Reading a shard set in both formats, against plain tar reading and WebDataset; and restoring a lane's state."""

from __future__ import annotations

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Row, environment, interleaved, print_table, timed, write_result
from options import add_measuring, count, start

from far_scale.data.loader.lanes import LaneOrder
from far_scale.data.loader.mixture import Mixture
from far_scale.data.loader.packing import PackedLane, PackingConfig
from far_scale.data.shards.convert import convert
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.stream import stream
from far_scale.data.shards.writer import ShardSetSpec, ShardWriter
from far_scale.utils.command_line import command_line

FRAMES, SHAPE, WINDOW = 300, (32, 8, 8), 256
FACTS = ShardSetSpec(
    latent_shape=SHAPE,
    latent_dtype="bfloat16",
    autoencoder=AutoencoderInfo(name="none", weight_hash="0" * 64, scaling_factor=1.0),
    actions=4,
    labels=0,
)
TAR = "plain tar"


def make_sets(tars: Path, mds: Path, samples: int, per_shard: int) -> None:
    """Clips of 300 frames `[32, 8, 8]` in bfloat16 with actions, of noise, in both formats."""
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(tars, FACTS, per_shard) as writer:
        for number in range(samples):
            latents = torch.randn(FRAMES, *SHAPE, generator=generator).bfloat16()
            actions = torch.randint(4, (FRAMES,), generator=generator)
            writer.write(Sample(f"clip_{number:05d}", latents, actions, None, 8.0, f"clip {number}.mp4"))
    convert(ShardSet.open(tars), mds, "mds")


def plain_tar(shards: Sequence[str]) -> int:
    """Every member's bytes by Python's tarfile, front to back; returns how many."""
    size = 0
    for shard in shards:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                size += len(file.read())
    return size


def webdataset_loop(shards: Sequence[str]) -> int:
    """Every sample from WebDataset, as undecoded bytes."""
    import webdataset

    found = webdataset.WebDataset(list(shards), shardshuffle=False)
    return sum(len(sample["safetensors"]) + len(sample["json"]) for sample in found)


def every_sample(shard_set: ShardSet) -> int:
    """Every sample as the lanes read it, checked and as tensors, by offset."""
    return sum(
        shard_set.read(shard, number).latents.nbytes
        for shard, inside in enumerate(shard_set.samples_per_shard)
        for number in range(inside)
    )


def streamed(folder: Path) -> int:
    """Every sample by `far_scale.data.shards.stream`, checked and as tensors."""
    return sum(sample.latents.nbytes for sample in stream(folder))


def reading(tars: Path, mds: Path, args: argparse.Namespace, cpu: torch.device) -> list[Row]:
    """MB/s of a single worker, files in the page cache; a set that is opened anew each time, with its indexes."""
    shards = [str(path) for path in sorted(tars.glob("*.tar"))]
    latents = args.samples * FRAMES * 2 * SHAPE[0] * SHAPE[1] * SHAPE[2]
    sides: dict[str, Callable[[], object]] = {
        TAR: lambda: plain_tar(shards),
        "WebDataset's loop": lambda: webdataset_loop(shards),
        "ours, tar by offset": lambda: every_sample(ShardSet.open(tars)),
        "ours, tar streamed": lambda: streamed(tars),
        "ours, MDS by offset": lambda: every_sample(ShardSet.open(mds)),
        "ours, MDS streamed": lambda: streamed(mds),
    }
    for side in sides.values():
        side()
    runs = {name: (lambda side=side: {"seconds": timed(side, cpu)}) for name, side in sides.items()}
    taken = interleaved(runs, args.repeats, args.minutes, "reading")
    median = {name: statistics.median(each["seconds"]) for name, each in taken.items()}
    return [
        {
            "side": name,
            "MB/s": latents / 1e6 / median[name],
            "samples/s": args.samples / median[name],
            "of plain tar": median[TAR] / median[name],
            "of WebDataset's loop": median["WebDataset's loop"] / median[name],
            "repeats": len(taken[name]["seconds"]),
            "seconds": taken[name]["seconds"],
        }
        for name in sides
    ]


def make_lane(source: ShardSet | Mixture, lanes: int) -> PackedLane:
    packing = PackingConfig(lanes, (16, FRAMES), 1, WINDOW, 0, None, 64 * 2 * FRAMES, lambda frames: 64 * frames)
    return packing.make_lanes(source, [0])[0]


def state_after(source: ShardSet | Mixture, position: int, lanes: int) -> dict[str, Any]:
    """Of a lane that has read so many samples; of a mixture, its half of each of two sets."""
    if isinstance(source, Mixture):
        return {"read": [position // 2, position - position // 2], "pending": []}
    epoch, place = LaneOrder(source.samples_per_shard, lanes, 0, WINDOW).segment_position(position)
    return {"epoch": epoch, "position": place, "pending": []}


def state_times(name: str, source: Callable[[], ShardSet | Mixture], positions: Sequence[int], lanes: int) -> list[Row]:
    """Saving a lane's state, and from nothing to the next pack: set opened, lane made, state loaded, pack read."""
    rows: list[Row] = []
    for position in positions:
        lane = make_lane(source(), lanes)
        lane.load_state_dict(state_after(source(), position, lanes))
        next(lane)  # so that clips wait, as in mid-run
        begun = time.perf_counter()
        state = lane.state_dict()
        saved = time.perf_counter()
        opened = source()
        again = make_lane(opened, lanes)
        again.load_state_dict(state)
        first = next(again)
        for clip in first:
            opened.read(*clip.sample, clip.start, clip.frames)
        restored = time.perf_counter()
        packs = [first, *(next(again) for _ in range(99))]
        rows.append(
            {
                "set": name,
                "samples read before": position,
                "save, s": saved - begun,
                "restore and first pack, s": restored - saved,
                "next 100 packs the same": packs == [next(lane) for _ in range(100)],
            }
        )
    return rows


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=count, default=128, help="of 300 frames, 1.2 MB each (default: %(default)s)")
    parser.add_argument("--per-shard", type=count, default=32, help="samples of a shard (default: %(default)s)")
    parser.add_argument("--lanes", type=count, default=4, help="default: %(default)s")
    add_measuring(parser, repeats=10, minutes=5, device="cpu")
    args = parser.parse_args()
    cpu = start(args)
    facts = environment(
        cpu,
        {
            "set": f"{args.samples} clips of {FRAMES} frames, {args.per_shard} in a shard",
            "load average": f"{os.getloadavg()[0]:.1f} at the beginning",
        },
    )
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        tars, mds = Path(name) / "tars", Path(name) / "mds"
        make_sets(tars, mds, args.samples, args.per_shard)
        sources: dict[str, Callable[[], ShardSet | Mixture]] = {
            "tars": lambda: ShardSet.open(tars),
            "MDS": lambda: ShardSet.open(mds),
            "mixture of both": lambda: Mixture([ShardSet.open(tars), ShardSet.open(mds)], [0.5, 0.5]),
        }
        positions = [0, 10, 1000, 10**6, 10**9]
        tables = {
            "Reading of one worker, page cache warm, medians": reading(tars, mds, args, cpu),
            "State of a lane": [
                row for title, source in sources.items() for row in state_times(title, source, positions, args.lanes)
            ],
        }
    for title, rows in tables.items():
        print_table(title, rows)
    print(f"\n{write_result(args.out, 'data', facts, tables)}")


if __name__ == "__main__":
    main()
