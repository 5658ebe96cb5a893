#!/usr/bin/env python
"""Encode video files, npz files or recorded episodes to a latent shard set. Run it again to go on after a kill."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from far_scale.data.encode import encode_videos
from far_scale.data.videos import find_videos
from far_scale.errors import command_line


def at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return number


@command_line
def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="a video, or a folder of them (also in its folders)")
    parser.add_argument("--out", type=Path, required=True, help="the shard set's folder")
    parser.add_argument("--autoencoder", required=True, help="name of the autoencoder, or a path to one")
    parser.add_argument("--size", type=at_least(1), default=64, help="height and width in pixels")
    parser.add_argument("--actions", type=at_least(0), default=0, help="number of action classes; 0 stores no actions")
    labels_help = "number of label classes; 0 stores no labels; a video without one has its folder's number"
    parser.add_argument("--labels", type=at_least(0), default=0, help=labels_help)
    parser.add_argument("--min-frames", type=at_least(1), default=1, help="refuse videos that are shorter")
    parser.add_argument("--samples-per-shard", type=at_least(1), default=64, help="videos in a shard")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="how latents are stored")
    parser.add_argument("--workers", type=at_least(1), default=cores, help="processes; the result is the same")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to encode")
    arguments = parser.parse_args()
    manifest = encode_videos(
        find_videos(arguments.videos),
        arguments.out,
        arguments.autoencoder,
        dtype=arguments.dtype,
        samples_per_shard=arguments.samples_per_shard,
        actions=arguments.actions,
        labels=arguments.labels,
        min_frames=arguments.min_frames,
        size=arguments.size,
        workers=arguments.workers,
        device=arguments.device,
    )
    print(f"{arguments.out}: {len(manifest.shards)} shards, {manifest.samples} samples, {manifest.frames} frames")


if __name__ == "__main__":
    main()
