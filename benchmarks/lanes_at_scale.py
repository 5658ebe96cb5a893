"""What a shard set of 100,000 shards asks of each of 4,096 ranks: start-up, memory, open shards, bytes, balance.

Manifest and shards lie on disk, the shards as holes of their full size; indexes are made when they are asked for. What
the training loop's own classes do with them is counted and timed; no latent is read.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from measure import Row, environment, peak_beyond, print_table, write_result
from options import add_measuring, count, start

from far_scale.data.loader.lanes import LaneOrder
from far_scale.data.loader.packing import Clip, PackedLane, PackingConfig
from far_scale.data.shards.index import ChannelSums, IndexRow, ShardIndex, parse_index
from far_scale.data.shards.manifest import AutoencoderInfo, Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.table import ShardEntry, ShardTable
from far_scale.utils.command_line import command_line

LATENT_SHAPE = (32, 8, 8)
FRAME_BYTES = 2 * 32 * 8 * 8
TOKENS_A_FRAME = 64
JSON_BYTES, HEADER_BYTES, MEMBER_BYTES = 100, 152, 1024  # a sample's facts, its tensors' header, a tar header

Result = TypeVar("Result")


class PaperSet(ShardSet):
    """A shard set with synthetic, deterministic indexes; it counts the requests."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        self.index_bytes, self.index_reads, self.touched = 0, 0, set[int]()

    def _load_index(self, shard: int) -> ShardIndex:
        index = index_of(self.manifest.shards[shard], shard)
        self.index_reads += 1
        self.index_bytes += len(index.model_dump_json())
        return index


def index_of(entry: ShardEntry, shard: int) -> ShardIndex:
    """An index with the manifest's counts: all samples of the shard have the same frames but the last."""
    frames = [entry.min_frames] * (entry.samples - 1)
    frames.append(entry.frames - sum(frames))
    rows, at = [], 0
    for sample, there in enumerate(frames):
        tensors = HEADER_BYTES + there * FRAME_BYTES
        offset = at + MEMBER_BYTES
        rows.append(IndexRow(f"video_{shard:06d}_{sample:04d}", there, at, JSON_BYTES, offset, HEADER_BYTES, tensors))
        at = offset + tensors + MEMBER_BYTES
    zeros = (0.0,) * LATENT_SHAPE[0]
    sums = ChannelSums(values=entry.frames * 64, total=zeros, squares=zeros)
    return ShardIndex.model_construct(
        file=entry.file, bytes=entry.bytes, sha256=entry.sha256, fps=8.0, sums=sums, samples=rows
    )


def make_set(folder: Path, shards: int, samples: int) -> None:
    """A manifest of uneven shards, `samples` in one on average of 300 to 600 frames, and their tars as holes."""
    draw, entries = np.random.default_rng(0), []
    for number in range(shards):
        inside, shortest = int(draw.integers(samples // 2, samples * 3 // 2 + 1)), int(draw.integers(300, 601))
        frames, digest = inside * shortest, hashlib.sha256(str(number).encode()).hexdigest()
        size = frames * FRAME_BYTES + inside * (HEADER_BYTES + 2 * MEMBER_BYTES)
        name = f"shard-{number:06d}.tar"
        entries.append(
            ShardEntry(
                file=name,
                samples=inside,
                frames=frames,
                min_frames=shortest,
                bytes=size,
                sha256=digest,
                index_sha256=digest,
            )
        )
        (folder / name).touch()
        os.truncate(folder / name, size)
    Manifest(
        latent_shape=LATENT_SHAPE,
        latent_dtype="bfloat16",
        mean=(0.0,) * 32,
        std=(1.0,) * 32,
        autoencoder=AutoencoderInfo(name="on-paper", weight_hash="0" * 64, scaling_factor=1.0),
        actions=0,
        labels=0,
        fps=8.0,
        shards=ShardTable(entries),
    ).write(folder)


def resident() -> int:
    """Bytes of this process in memory, without what the allocator has free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds(function: Callable[[], Result]) -> tuple[float, Result]:
    begun = time.perf_counter()
    result = function()
    return time.perf_counter() - begun, result


def start_up(folder: Path, args: argparse.Namespace) -> tuple[list[Row], Manifest]:
    """Each part of a rank's start, the median of the repeats."""
    manifest = Manifest.read(folder)
    entry = manifest.shards[0]
    text = index_of(entry, 0).model_dump_json().encode()
    shard_set = ShardSet(folder, manifest)
    counts = shard_set.samples_per_shard

    def order() -> None:
        LaneOrder(counts, args.lanes, 0, args.shuffle_window).sample_in_segment(
            1, 0, 0
        )  # two permutations, as an epoch's edge needs

    parts: dict[str, Callable[[], object]] = {
        "manifest read and checked": lambda: Manifest.read(folder),
        "size of every shard asked for, as by a single rank": lambda: list(shard_set.missing_shards()),
        f"size of one rank's share of {args.ranks} asked for": lambda: list(shard_set.missing_shards(0, args.ranks)),
        "manifest's fingerprint": manifest.fingerprint,
        "order of an epoch": order,
        f"one index of {entry.samples} samples parsed": lambda: parse_index(
            text, folder / "shard-000000.index.json", ShardIndex
        ),
    }
    rows: list[Row] = []
    for name, part in parts.items():
        taken = [seconds(part)[0] for _ in range(args.repeats)]
        rows.append({"part": name, "seconds": statistics.median(taken), "all": taken})
    rows[0]["bytes"] = (folder / "manifest.json").stat().st_size
    for row in rows:
        row.setdefault("bytes", len(text) if row["part"].startswith("one index") else None)
    return [{key: row[key] for key in ("part", "seconds", "bytes", "all")} for row in rows], manifest


def walk_rank(paper: PaperSet, lanes: dict[int, PackedLane], steps: int) -> tuple[list[int], int, int, int]:
    """Tokens of each step, bytes of the frames wanted, bytes read with headers, shards touched in the worst step."""
    tokens, wanted, read, most = [], 0, 0, 0
    for _ in range(steps):
        clips: list[Clip] = [clip for lane in lanes.values() for clip in next(lane)]
        shards = {clip.sample.shard for clip in clips}
        paper.touched |= shards
        most = max(most, len(shards))
        frames = sum(clip.frames for clip in clips)
        tokens.append(frames * TOKENS_A_FRAME)
        wanted += frames * FRAME_BYTES
        read += frames * FRAME_BYTES + len(clips) * (JSON_BYTES + HEADER_BYTES)
    return tokens, wanted, read, most


def walk(folder: Path, manifest: Manifest, packing: PackingConfig, name: str, args: argparse.Namespace) -> Row:
    """Whole nodes from all over the cluster, one rank after another."""
    nodes = args.ranks // args.node
    chosen = np.unique(np.linspace(0, nodes - 1, min(args.nodes, nodes)).round().astype(int))
    tokens, starts, touched, at_once, node_ratio, reads = [], [], [], [], [], []
    for node in chosen.tolist():
        wanted = read = 0
        for rank in range(node * args.node, (node + 1) * args.node):
            paper = PaperSet(folder, manifest)
            mine = range(rank, args.lanes, args.ranks)
            taken, lanes = seconds(lambda paper=paper, mine=mine: packing.make_lanes(paper, mine))  # type: ignore[misc]
            first, _ = seconds(lambda lanes=lanes: [lane.state_dict() for lane in lanes.values()])  # type: ignore[misc]
            rank_tokens, rank_wanted, rank_read, most = walk_rank(paper, lanes, args.steps)
            tokens.append(rank_tokens)
            starts.append(taken + first)
            touched.append(len(paper.touched))
            at_once.append(most)
            reads.append(paper.index_reads)
            wanted, read = wanted + rank_wanted, read + rank_read + paper.index_bytes
        node_ratio.append(read / wanted)
    per_step = np.asarray(tokens, dtype=float)  # [ranks, steps]
    return {
        "packs": name,
        "ranks walked": len(tokens),
        "steps": args.steps,
        "lanes made, s": statistics.median(starts),
        "shards in a step, most": max(at_once),
        "shards in all steps, most": max(touched),
        "indexes read, most": max(reads),
        "read beyond what a node needs, %": 100 * (statistics.mean(node_ratio) - 1),
        "worst node, %": 100 * (max(node_ratio) - 1),
        "tokens of a step, most / mean": float((per_step.max(0) / per_step.mean(0)).mean()),
        "std / mean": float((per_step.std(0) / per_step.mean(0)).mean()),
    }


def rank_memory(
    folder: Path, manifest: Manifest, packing: PackingConfig, args: argparse.Namespace, cpu: torch.device
) -> list[Row]:
    """Peak of the resident set beyond what lay there before, and what stays of it, of each thing a rank keeps."""
    kept: list[object] = []

    def lanes() -> None:
        paper = PaperSet(folder, manifest)
        mine = packing.make_lanes(paper, range(0, args.lanes, args.ranks))
        walk_rank(paper, mine, args.steps)
        kept.append((paper, mine))

    rows: list[Row] = []
    for name, make in (("manifest", lambda: kept.append(Manifest.read(folder))), ("lanes, order, indexes", lanes)):
        before = resident()
        peak = peak_beyond(make, cpu)
        gc.collect()
        stays = (resident() - before) / 1e6
        rows.append({"what": name, "peak MB": None if peak is None else peak / 1e6, "stays, MB": stays})
    return rows


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=count, default=100_000, help="default: %(default)s")
    parser.add_argument("--samples", type=count, default=100, help="of a shard on average (default: %(default)s)")
    parser.add_argument("--ranks", type=count, default=4096, help="default: %(default)s")
    parser.add_argument("--node", type=count, default=8, help="ranks of a node (default: %(default)s)")
    parser.add_argument("--nodes", type=count, default=16, help="how many nodes are walked (default: %(default)s)")
    parser.add_argument("--lanes", type=count, default=8192, help="default: %(default)s")
    parser.add_argument("--steps", type=count, default=50, help="of each rank (default: %(default)s)")
    parser.add_argument("--shuffle-window", type=count, default=256, help="default: %(default)s")
    add_measuring(parser, repeats=3, minutes=5, device="cpu")
    args = parser.parse_args()
    cpu = start(args)
    facts = environment(
        cpu,
        {
            "on paper": f"{args.shards} shards, {args.ranks} ranks, {args.lanes} lanes",
            "load average": f"{os.getloadavg()[0]:.1f} at the beginning",
        },
    )
    frames, stride, seed = (16, 300), 1, 0
    full = 300 * TOKENS_A_FRAME

    def packing(clips: int | None, tokens: int | None) -> PackingConfig:
        shape = (args.lanes, frames, stride, args.shuffle_window, seed)
        return PackingConfig(*shape, clips, tokens, lambda count: count * TOKENS_A_FRAME)

    with tempfile.TemporaryDirectory(prefix="lanes-at-scale-") as name:
        folder = Path(name)
        make_set(folder, args.shards, args.samples)
        parts, manifest = start_up(folder, args)
        tables = {
            "Start-up of a rank, files in the page cache, medians": parts,
            "Memory of a rank": rank_memory(folder, manifest, packing(None, 2 * full), args, cpu),
            "Walk": [
                walk(folder, manifest, packing(2, None), "2 clips of 16 to 300 frames", args),
                walk(folder, manifest, packing(None, 2 * full), f"at most {2 * full} tokens", args),
            ],
        }
    for title, rows in tables.items():
        print_table(title, rows)
    print(f"\n{write_result(args.out, 'lanes-at-scale', facts, tables)}")


if __name__ == "__main__":
    main()
