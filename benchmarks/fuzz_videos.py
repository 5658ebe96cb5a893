"""Thousands of damaged videos: which are refused, which are still read, and how wrong their frames are."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
from damaged_videos import DAMAGE, FPS, KINDS, damage, moving_picture, write_video
from measure import Row, environment, print_table, write_result
from options import count, start
from tqdm import tqdm

from far_scale.data.video.videos import read_video
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError

REFUSED, RIGHT, WRONG, FEWER, MORE = "refused", "right", "wrong pixels", "FEWER FRAMES", "more frames"
ERROR, CRASH, HANG = "ANOTHER ERROR", "CRASH", "HANG"
NEVER = (FEWER, ERROR, CRASH, HANG)


def outcome(path: Path, whole: Path) -> dict[str, Any]:
    """What reading the damaged file at `path` gives, beside the undamaged one."""
    truth = read_video(whole)
    try:
        video = read_video(path)
    except UserError as error:
        lines = str(error).splitlines()
        if len(lines) != 1 or not lines[0].startswith(str(path)):
            return {"outcome": ERROR, "said": str(error)}
        return {"outcome": REFUSED, "said": str(error).removeprefix(f"{path}: ")}
    except Exception:
        return {"outcome": ERROR, "said": traceback.format_exc()}
    facts: dict[str, Any] = {"frames": len(video.frames), "fps": video.fps, "rate is right": video.fps == truth.fps}
    if len(video.frames) != len(truth.frames):
        return facts | {"outcome": FEWER if len(video.frames) < len(truth.frames) else MORE}
    if video.frames.shape != truth.frames.shape:
        return facts | {"outcome": WRONG, "mean": 255.0, "frames wrong": len(truth.frames)}
    off = np.abs(video.frames.astype(np.int16) - truth.frames)
    if not off.any():
        return facts | {"outcome": RIGHT}
    wrong = int(off.any((1, 2, 3)).sum())
    return facts | {"outcome": WRONG, "mean": float(off.mean((1, 2, 3)).max()), "frames wrong": wrong}


def answer(connection: Connection) -> None:
    """The loop of a child process: read files until there are no more."""
    while (paths := connection.recv()) is not None:
        connection.send(outcome(*paths))


class Child:
    """A process that reads damaged files, since a decoder may crash or never end; another one takes its place then."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._process: Any = None

    def read(self, path: Path, whole: Path) -> dict[str, Any]:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=answer, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._connection.send((whole, whole))  # imports take longer than any file
            self._connection.recv()
        self._connection.send((path, whole))
        try:
            if self._connection.poll(self._limit):
                found: dict[str, Any] = self._connection.recv()
                return found
            found = {"outcome": HANG}
        except EOFError:
            self._process.join()
            found = {"outcome": CRASH, "said": f"status {self._process.exitcode}"}
        self.end()
        return found

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def fuzz(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Damage each kind of video in each way, in turn, and read what came of it."""
    frames = moving_picture()
    wholes = [folder / f"whole-{number}{kind.suffix}" for number, kind in enumerate(KINDS)]
    for kind, path in zip(KINDS, wholes, strict=True):
        write_video(path, frames, kind.codec, sound=kind.sound, options=kind.options, encoding=kind.encoding)
        read = read_video(path)
        if len(read.frames) != len(frames) or read.fps != FPS:
            raise UserError(f"{path}: {len(read.frames)} frames at {read.fps}; {len(frames)} at {FPS} were written")

    def share(worker: int) -> list[dict[str, Any]]:
        child, found = Child(args.seconds), []
        for number in range(worker, args.mutations, args.workers):
            kind, whole = KINDS[number % len(KINDS)], wholes[number % len(KINDS)]
            how = DAMAGE[number // len(KINDS) % len(DAMAGE)]
            chance = random.Random(f"{args.seed} {number}")
            path = folder / f"damaged-{worker}{kind.suffix}"
            path.write_bytes(damage(whole.read_bytes(), how, chance))
            row = {"number": number, "video": kind.name, "damage": how, **child.read(path, whole)}
            if row["outcome"] in NEVER and args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / f"{number}{kind.suffix}").write_bytes(path.read_bytes())
            found.append(row)
            bar.update()
        child.end()
        return found

    with tqdm(total=args.mutations, unit="video") as bar, ThreadPoolExecutor(args.workers) as pool:
        rows = [row for part in pool.map(share, range(args.workers)) for row in part]
    return sorted(rows, key=lambda row: row["number"])


def summary(rows: list[dict[str, Any]], column: str, names: list[str]) -> list[Row]:
    """Counts by kind of video or of damage, and how wrong the pictures are of those that are read."""
    table = []
    for name in [*names, "all"]:
        own = [row for row in rows if name in ("all", row[column])]
        counts = Counter(row["outcome"] for row in own)
        wrong = [row for row in own if row["outcome"] == WRONG]
        table.append(
            {
                column: name,
                "damaged": len(own),
                **{what: counts[what] for what in (REFUSED, RIGHT, WRONG, MORE, *NEVER)},
                "rate wrong": sum(not row.get("rate is right", True) for row in own),
                "frames wrong, median": statistics.median(row["frames wrong"] for row in wrong) if wrong else "-",
                "grey levels, median": round(statistics.median(row["mean"] for row in wrong), 1) if wrong else "-",
                "most": round(max(row["mean"] for row in wrong), 1) if wrong else "-",
            }
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=count, default=2000, help="damaged files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    parser.add_argument("--workers", type=count, default=2, help="processes that read (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="longer than this is a hang (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="a folder for the files that show a fault")
    parser.add_argument("--threads", type=count, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu",), default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = fuzz(Path(folder), args)
    more = {"seed": str(args.seed), "seconds": f"{time.monotonic() - begun:.0f}"}
    more["PyAV"], more["FFmpeg's libavcodec"] = av.__version__, ".".join(map(str, av.library_versions["libavcodec"]))
    facts = environment(start(args), more)
    tables: dict[str, list[Row]] = {
        "Damaged videos, by container and codec": summary(rows, "video", [kind.name for kind in KINDS]),
        "Damaged videos, by damage": summary(rows, "damage", list(DAMAGE)),
    }
    for title, table in tables.items():
        print_table(title, table)
    faults = [row for row in rows if row["outcome"] in NEVER]
    for row in faults:
        print(
            f"{row['number']}: {row['video']}, {row['damage']}: {row['outcome']}: {row.get('said', row.get('frames'))}"
        )
    read = [row for row in rows if row["outcome"] not in (REFUSED, RIGHT)]
    tables["Damaged videos, by damage"][-1]["files"] = read  # every single one, in the JSON only
    print(f"\n{write_result(args.out, 'fuzz-videos', facts, tables)}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(command_line(main)())
