#!/usr/bin/env python
"""Encode videos, npz files or recorded episodes to a latent shard set. Run it again to go on after a kill.

To deal the work over N tasks, run each with `--task 0 --tasks N` to `--task N-1 --tasks N`, anywhere and at any time,
and when all have ended once with `--merge --tasks N`. The set is the same, to the last byte, for every N.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from far_scale.data.encode.plan import MAX_REJECTED, plan
from far_scale.data.encode.tasks import encode_task, merge
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.rejects import REJECTED_NAME
from far_scale.data.shards.store import read_manifest_bytes
from far_scale.data.video.pictures import Framing
from far_scale.data.video.sources import find_labelled, read_class_names, with_flips
from far_scale.utils.command_line import at_least, command_line, share
from far_scale.utils.errors import UserError


def class_names(file: Path | None, of: str | None) -> tuple[str, ...] | None:
    """The names of --classes or --classes-of, where one of them is given."""
    if of is None:
        return None if file is None else read_class_names(file)
    classes = Manifest.parse(read_manifest_bytes(of), of).classes
    if classes is None:
        raise UserError(f"--classes-of {of}: this set has no names of classes; give --classes, a file of them")
    return classes


@command_line
def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    videos_help = "a folder of videos (also in its folders), one video, a list of them as .jsonl or .csv, or one of "
    videos_help += "the official code's data lists, .json, also of latents (.pt)"
    parser.add_argument("--videos", type=Path, required=True, help=videos_help)
    parser.add_argument("--split", type=Path, help="one of UCF-101's lists: take only these videos of the folder")
    parser.add_argument("--out", type=Path, required=True, help="the shard set's folder")
    autoencoder_help = "name of the autoencoder, or a path to one; of latents: the one that made them"
    parser.add_argument("--autoencoder", required=True, help=autoencoder_help)
    parser.add_argument("--size", type=at_least(1), default=64, help="height and width in pixels")
    resize_help = "how frames are scaled to it by their shorter side: in 8 bits, or in float32 as officially"
    parser.add_argument("--resize", choices=["pillow", "torch"], default="pillow", help=resize_help)
    crop_help = "the square that is taken: the centre, or as the official code trains on UCF-101 a random one a sample"
    parser.add_argument("--crop", choices=["centre", "random"], default="centre", help=crop_help)
    parser.add_argument("--flip", action="store_true", help="give every video a second sample, mirrored: KEY-flip")
    stride_help = "keep every n-th frame and its action; a recipe's data.frame_stride does that with all frames stored"
    parser.add_argument("--frame-stride", type=at_least(1), default=1, help=stride_help)
    precision_help = "what the autoencoder computes in; officially bf16"
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help=precision_help)
    parser.add_argument("--actions", type=at_least(0), default=0, help="number of action classes; 0 stores no actions")
    labels_help = "number of label classes; 0 stores no labels, or with class names as many as these; a video without "
    labels_help += "one has its folder's: the number that is its name, or its place among the folders' names"
    parser.add_argument("--labels", type=at_least(0), default=0, help=labels_help)
    named = parser.add_mutually_exclusive_group()
    classes_help = "a file of the classes' names, one a line: folders with these names are the classes 0, 1, ..."
    named.add_argument("--classes", type=Path, help=classes_help)
    named.add_argument("--classes-of", help="a shard set, such as that of the training: take its classes' names")
    parser.add_argument("--min-frames", type=at_least(1), default=1, help="reject videos that are shorter")
    rejected_help = "the largest share of videos that may be broken or too short; rejected.jsonl lists them"
    parser.add_argument("--max-rejected", type=share, default=MAX_REJECTED, help=rejected_help)
    parser.add_argument("--samples-per-shard", type=at_least(1), default=64, help="videos in a shard")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="how latents are stored")
    parser.add_argument("--workers", type=at_least(1), default=cores, help="processes; the result is the same")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to encode")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--task", type=at_least(0), help="make only this task's shards, of --tasks, and no manifest")
    part.add_argument("--merge", action="store_true", help="make only the manifest, of shards that tasks have made")
    parser.add_argument("--tasks", type=at_least(1), help="number of tasks that the work is dealt over")
    arguments = parser.parse_args()
    if (arguments.tasks is None) != (arguments.task is None and not arguments.merge):
        parser.error("--tasks N goes with --task or --merge, and they with it")
    names = class_names(arguments.classes, arguments.classes_of)
    labels = arguments.labels or len(names or ())
    found = find_labelled(arguments.videos, arguments.split, labels, names)
    job = plan(
        with_flips(found.sources) if arguments.flip else found.sources,
        arguments.out,
        arguments.autoencoder,
        dtype=arguments.dtype,
        samples_per_shard=arguments.samples_per_shard,
        actions=arguments.actions,
        labels=labels,
        min_frames=arguments.min_frames,
        framing=Framing(arguments.size, arguments.resize, arguments.crop, arguments.frame_stride),
        device=None if arguments.merge else arguments.device,
        precision=arguments.precision,
        classes=found.classes,
        named_by_folder=found.by_folder,
    )
    if not arguments.merge:
        task, tasks = (0, 1) if arguments.task is None else (arguments.task, arguments.tasks)
        shards = encode_task(job, task, tasks, arguments.workers, arguments.max_rejected)
    if arguments.task is not None:
        print(f"{arguments.out}: task {task} of {tasks} has made its {shards} of {job.shards} shards")
        return
    manifest = merge(job, arguments.tasks or 1, arguments.max_rejected)
    rejected = len(job.sources) - manifest.samples
    print(
        f"{arguments.out}: {len(manifest.shards)} shards, {manifest.samples} samples, {manifest.frames} frames"
        + (f"; {rejected} videos rejected, see {arguments.out / REJECTED_NAME}" if rejected else "")
    )


if __name__ == "__main__":
    main()
