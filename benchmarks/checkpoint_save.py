"""A checkpoint's save with its SHA-256 computed while writing, against one that reads all files again."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from measure import Row, environment, interleaved, print_table, write_result
from options import add_measuring, count, start

from far_scale.train.checkpoint import FlatPiece
from far_scale.train.checkpoint import pieces as writing
from far_scale.train.checkpoint.folders import checksums
from far_scale.utils.command_line import command_line

WHILE, NONE = "while writing", "no checksums"
AGAIN, COLD = "read again", "read again from the disk"
"""From pages that are still in memory, or as where they are not: of a network file system, or larger than memory."""


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=count, default=512, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--tensors", type=count, default=16, help="that it has (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write it (default: the system's temporary folder)")
    add_measuring(parser, repeats=9, minutes=10, device="cpu")
    args = parser.parse_args()
    facts = environment(
        start(args),
        {
            "checkpoint": f"{args.megabytes} MB in {args.tensors} tensors, one process",
            "load average": f"{os.getloadavg()[0]:.1f} at the beginning",
        },
    )
    length = args.megabytes * 10**6 // 4 // args.tensors
    pieces = {f"weight/{number}": FlatPiece(length, 0, torch.randn(length)) for number in range(args.tensors)}

    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.folder) as name:
        folder = Path(name) / "checkpoint"

        def side(sums: str) -> Callable[[], Mapping[str, float]]:
            def run() -> Mapping[str, float]:
                shutil.rmtree(folder, ignore_errors=True)
                begun, computed = time.perf_counter(), time.process_time()
                save(folder, pieces, sums)
                return {"wall": time.perf_counter() - begun, "CPU": time.process_time() - computed}

            return run

        sides = {sums: side(sums) for sums in (WHILE, AGAIN, COLD, NONE)}
        taken = interleaved(sides, args.repeats, args.minutes, "saves")
    median = {sums: statistics.median(seconds["wall"]) for sums, seconds in taken.items()}
    rows: list[Row] = [
        {
            "checksums": sums,
            "seconds": median[sums],
            "quickest": min(seconds["wall"]),
            "CPU seconds": statistics.median(seconds["CPU"]),
            "MB/s": args.megabytes / median[sums],
            "of the save without": median[sums] / median[NONE],
            "repeats": len(seconds["wall"]),
            "all": seconds,
        }
        for sums, seconds in taken.items()
    ]
    title = "Saves to synced files, medians"
    print_table(title, rows)
    print(f"\n{write_result(args.out, 'checkpoint-save', facts, {title: rows})}")


def save(folder: Path, pieces: Mapping[str, FlatPiece], sums: str) -> None:
    """Write the pieces as `checkpoint.save` does, with checksums computed in this way."""
    if sums == WHILE:
        assert "__0_0.distcp" in writing.write(folder, pieces, None)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(dict(pieces), checkpoint_id=str(folder), planner=writing._SavePlanner(), no_dist=True)
    if sums == COLD:
        for path in folder.glob("__0_*"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sums in (AGAIN, COLD):
        checksums(folder.glob("__0_*"))


if __name__ == "__main__":
    main()
