"""Encode videos, .npz files or recorded episodes to a latent shard set. Run it again to resume after a kill.

To divide the work into N tasks, run `--task 0 --tasks N` to `--task N-1 --tasks N`, anywhere and at any time, and when
all have ended run `--merge --tasks N`. The set is the same, to the last byte, for every N.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from far_scale.data.encode.plan import MAX_REJECTED, load_class_names, plan_encoding
from far_scale.data.encode.tasks import encode_task, merge_tasks
from far_scale.data.shards.rejects import REJECTED_NAME
from far_scale.data.video.sources import add_flipped, find_source_set
from far_scale.data.video.transforms import FrameTransform
from far_scale.utils.command_line import at_least, command_line, fraction


@command_line
def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    videos_help = "a folder of videos (also in its folders), one video, a list of them as .jsonl or .csv, or one of "
    videos_help += "the official code's data lists, .json, also of latents (.pt)"
    parser.add_argument("--videos", type=Path, required=True, help=videos_help)
    parser.add_argument("--split", type=Path, help="one of UCF-101's lists: take only its videos of the folder")
    parser.add_argument("--out", type=Path, required=True, help="the shard set's folder")
    autoencoder_help = "name or path of the autoencoder; of latents: the one that made them"
    parser.add_argument("--autoencoder", required=True, help=autoencoder_help)
    parser.add_argument("--size", type=at_least(1), default=64, help="height and width in pixels")
    resize_help = "how the shorter side is resized to it: in 8 bits, or in float32 as in the official code"
    parser.add_argument("--resize", choices=["pillow", "torch"], default="pillow", help=resize_help)
    crop_help = (
        "the square that is taken: the centre, or a random one per sample, as in the official training on UCF-101"
    )
    parser.add_argument("--crop", choices=["centre", "random"], default="centre", help=crop_help)
    parser.add_argument("--flip", action="store_true", help="add a mirrored sample of every video: KEY-flip")
    stride_help = (
        "keep every n-th frame and its action; a recipe's data.frame_stride does so and keeps all frames stored"
    )
    parser.add_argument("--frame-stride", type=at_least(1), default=1, help=stride_help)
    precision_help = "compute precision of the autoencoder; officially bf16"
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help=precision_help)
    parser.add_argument("--actions", type=at_least(0), default=0, help="number of action classes; 0 stores no actions")
    labels_help = "number of label classes; 0 stores no labels, or with class names as many as these; a video without "
    labels_help += "a label has that of its folder: the number that is its name, or its index among the sorted names"
    parser.add_argument("--labels", type=at_least(0), default=0, help=labels_help)
    named = parser.add_mutually_exclusive_group()
    classes_help = "a file of class names, one per line: folders with these names are the classes 0, 1, ..."
    named.add_argument("--classes", type=Path, help=classes_help)
    named.add_argument("--classes-of", help="a shard set, such as the training set: take its class names")
    parser.add_argument("--min-frames", type=at_least(1), default=1, help="reject videos that are shorter")
    rejected_help = "largest fraction of videos that may be broken or too short; rejected.jsonl lists them"
    parser.add_argument("--max-rejected", type=fraction, default=MAX_REJECTED, help=rejected_help)
    parser.add_argument("--samples-per-shard", type=at_least(1), default=64, help="videos in a shard")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="how latents are stored")
    parser.add_argument("--workers", type=at_least(1), default=cores, help="processes; the result is the same")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to encode")
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--task", type=at_least(0), help="encode only the shards of this task, of --tasks, and write no manifest"
    )
    part.add_argument("--merge", action="store_true", help="write only the manifest, for the shards of finished tasks")
    parser.add_argument("--tasks", type=at_least(1), help="number of tasks that the work is divided into")
    arguments = parser.parse_args()
    if (arguments.tasks is None) != (arguments.task is None and not arguments.merge):
        parser.error("--tasks N goes with --task or --merge, and they with it")
    names = load_class_names(arguments.classes, arguments.classes_of)
    labels = arguments.labels or len(names or ())
    source_set = find_source_set(arguments.videos, arguments.split, labels, names)
    job = plan_encoding(
        add_flipped(source_set.sources) if arguments.flip else source_set.sources,
        arguments.out,
        arguments.autoencoder,
        dtype=arguments.dtype,
        samples_per_shard=arguments.samples_per_shard,
        actions=arguments.actions,
        labels=labels,
        min_frames=arguments.min_frames,
        transform=FrameTransform(arguments.size, arguments.resize, arguments.crop, arguments.frame_stride),
        device=None if arguments.merge else arguments.device,
        precision=arguments.precision,
        classes=source_set.classes,
        classes_from_folders=source_set.classes_from_folders,
    )
    if not arguments.merge:
        task, tasks = (0, 1) if arguments.task is None else (arguments.task, arguments.tasks)
        shards = encode_task(job, task, tasks, arguments.workers, arguments.max_rejected)
    if arguments.task is not None:
        print(f"{arguments.out}: task {task} of {tasks} has made its {shards} of {job.shards} shards")
        return
    manifest = merge_tasks(job, arguments.tasks or 1, arguments.max_rejected)
    rejected = len(job.sources) - manifest.samples
    print(
        f"{arguments.out}: {len(manifest.shards)} shards, {manifest.samples} samples, {manifest.frames} frames"
        + (f"; {rejected} videos rejected, see {arguments.out / REJECTED_NAME}" if rejected else "")
    )
