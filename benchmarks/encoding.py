"""How busy encoding keeps the autoencoder: recorded VizDoom episodes at 64 px, as mp4 and as npz, on two CPU cores."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from measure import Row, environment, interleaved, print_table, write_result
from options import add_measuring, count, start
from torch import Tensor

from far_scale import autoencoder as autoencoders
from far_scale.data.demo.episodes import record_episodes
from far_scale.data.encode.plan import plan_encoding
from far_scale.data.encode.tasks import encode_task
from far_scale.data.video.find import find_videos
from far_scale.data.video.sources import find_sources
from far_scale.data.video.transforms import FrameTransform, to_pixels
from far_scale.data.video.videos import read_video, write_mp4
from far_scale.utils.command_line import command_line

SEED = 700_000  # episodes that the autoencoder was not trained on
ALONE = "the autoencoder alone"


class Timed:
    """An autoencoder that counts the seconds of its encoder: of the clock, and those that this thread computed."""

    def __init__(self, autoencoder: autoencoders.Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._busy, self._computed = 0.0, 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._autoencoder, name)

    def encode(self, pixels: Tensor) -> Tensor:
        begun, computed = time.perf_counter(), time.thread_time()
        latents = self._autoencoder.encode(pixels)
        self._computed += time.thread_time() - computed
        self._busy += time.perf_counter() - begun
        return latents

    def seconds(self, begun: float, before: float) -> dict[str, float]:
        """Since that reading of the clock and of the process's time: all, and those of the encoder."""
        wall, process = time.perf_counter() - begun, time.process_time() - before
        return {"wall": wall, "busy": self._busy, "process": process, "computed": self._computed}


def encode_share(videos: Path, out: Path, name: str, task: int, tasks: int) -> dict[str, float]:
    """One task of an encoding, in this process: seconds of the clock, of the encoder; computed by it, and by all."""
    timed = Timed(autoencoders.load(name))
    job = plan_encoding(find_sources(videos), out, name, "bfloat16", 16, 4, 0, 1, FrameTransform(64), "cpu")
    with_timer: Callable[..., object] = lambda *_: timed  # noqa: E731
    autoencoders.load = with_timer  # type: ignore[assignment]
    begun, before = time.perf_counter(), time.process_time()
    encode_task(job, task, tasks, 1, 0.0)
    return timed.seconds(begun, before)


def encode_only(videos: Path, out: Path, name: str, task: int, tasks: int) -> dict[str, float]:
    """The autoencoder on the frames that this task would encode, which lie in memory already."""
    torch.set_num_threads(1)
    timed = Timed(autoencoders.load(name))
    frames = [torch.from_numpy(read_video(path).frames) for path in find_videos(videos)[task::tasks]]
    begun, before = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for video in frames:
            for part in video.split(32):
                timed.encode(to_pixels(part))
    return timed.seconds(begun, before)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=count, default=32, help="recorded episodes (default: %(default)s)")
    parser.add_argument("--frames", type=count, default=300, help="of each of them (default: %(default)s)")
    parser.add_argument("--workers", type=count, default=2, help="processes of one thread (default: %(default)s)")
    parser.add_argument("--autoencoder", default="compact-vizdoom-f8c32", help="default: %(default)s")
    add_measuring(parser, repeats=5, minutes=10, device="cpu")
    args = parser.parse_args()
    facts = environment(
        start(args),
        {
            "set": f"{args.videos} episodes of {args.frames} frames 64x64, 16 in a shard; {args.workers} workers",
            "autoencoder": args.autoencoder,
            "load average": f"{os.getloadavg()[0]:.1f} at the beginning",
        },
    )
    with tempfile.TemporaryDirectory(prefix="encoding-") as name:
        folder = Path(name)
        record_episodes(folder / "npz", range(SEED, SEED + args.videos), args.frames, workers=args.workers)
        for path in find_videos(folder / "npz"):
            video = read_video(path)
            assert video.actions is not None
            write_mp4(folder / "mp4" / f"{path.stem}.mp4", video.frames, video.fps)
            np.savez(folder / "mp4" / path.name, actions=video.actions)
        rows = measure(folder, args)
    title = "Encoding, medians; busy: share of the time that a worker's encoder runs"
    print_table(title, rows)
    print(f"\n{write_result(args.out, 'encoding', facts, {title: rows})}")


def measure(folder: Path, args: argparse.Namespace) -> list[Row]:
    """All workers of a side at the same time, the sides in turn."""
    with ProcessPoolExecutor(args.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        rounds = iter(range(10**9))

        def side(function: Callable[..., dict[str, float]], videos: str) -> Callable[[], Mapping[str, float]]:
            def run() -> Mapping[str, float]:
                out = folder / f"set-{next(rounds)}"
                parts = [
                    pool.submit(function, folder / videos, out, args.autoencoder, task, args.workers)
                    for task in range(args.workers)
                ]
                found = [part.result() for part in parts]
                return {name: sum(part[name] for part in found) / len(found) for name in found[0]}

            return run

        taken = interleaved(
            {"mp4": side(encode_share, "mp4"), "npz": side(encode_share, "npz"), ALONE: side(encode_only, "npz")},
            args.repeats,
            args.minutes,
            "encoding",
        )
    frames = args.videos * args.frames
    alone = statistics.median(taken[ALONE]["wall"])
    return [
        {
            "side": name,
            "frames/s": frames / statistics.median(seconds["wall"]),
            "busy": _median_ratio(seconds, "busy", "wall"),
            "of the CPU time": _median_ratio(seconds, "computed", "process"),
            "cores": _median_ratio(seconds, "process", "wall"),
            "of the autoencoder alone": alone / statistics.median(seconds["wall"]),
            "repeats": len(seconds["wall"]),
            "seconds": seconds,
        }
        for name, seconds in taken.items()
    ]


def _median_ratio(seconds: Mapping[str, list[float]], part: str, whole: str) -> float:
    return statistics.median(mine / all_of_it for mine, all_of_it in zip(seconds[part], seconds[whole], strict=True))


if __name__ == "__main__":
    main()
