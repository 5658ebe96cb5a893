"""Evaluate a model by a protocol: FVD, LPIPS, PSNR and SSIM of its predictions, beside two baselines.

    python tools/evaluate.py MODEL --protocol vizdoom-8to8 --videos VIDEOS --out DIR
    torchrun --nproc_per_node 8 tools/evaluate.py RUN --protocol ... --out DIR        # or under srun
    python tools/evaluate.py RUN --protocol vizdoom-8to8 --videos VIDEOS --follow     # beside a training
    python tools/evaluate.py --compare DIR1 DIR2 ... --out DIR

To split the work over N tasks of a job array, run `--task 0 --tasks N` to `--task N-1 --tasks N`, on any machine and
at any time, and when all have ended `--merge --tasks N` once. The scores are bitwise the same for every N. A command
that was killed continues where it stopped.

With --follow each checkpoint of a run is evaluated, oldest first, and then each new one until the training is over;
scores_by_step.json and scores_by_step.png in DIR show how the scores change.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import get_args

from far_scale.evaluation.aggregate import SCORES_FILE
from far_scale.evaluation.clip_sets import ClipSource
from far_scale.evaluation.compare import compare
from far_scale.evaluation.follow import follow
from far_scale.evaluation.pipeline import WorkShard, evaluate, open_evaluation, start_processes
from far_scale.evaluation.protocol import Metric, Protocol, load_protocol
from far_scale.evaluation.report import REPORT_FILES, format_table
from far_scale.model.model_files import CONFIG_FILE
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError
from far_scale.utils.io import check_writable


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, nargs="?", help="a model directory, org/name of the hub, or a run with checkpoints"
    )
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the latest)")
    parser.add_argument("--protocol", help="a name in recipes/protocols, or a YAML file")
    parser.add_argument("--out", type=Path, help="folder for scores, tables and pictures")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--videos", type=Path, help="a folder of videos, a list of them, or one video")
    where.add_argument("--shards", type=Path, help="a shard set; its decoded latents are the truth")
    parser.add_argument("--split", type=Path, help="one of UCF-101's lists: take only these videos of the folder")
    parser.add_argument("--clips", type=int, metavar="N", help="another number of clips, so another protocol hash")
    parser.add_argument(
        "--metrics", nargs="+", choices=get_args(Metric), help="compute these of the protocol's metrics only"
    )
    parser.add_argument("--keep-samples", action="store_true", help="leave the samples in DIR/samples")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--task", type=int, help="compute only this task's batches, one part in --tasks, and no scores")
    part.add_argument("--follow", action="store_true", help="every checkpoint of a run; DIR is RUN/evaluation/PROTOCOL")
    part.add_argument("--merge", action="store_true", help="only aggregate the scores of what tasks have computed")
    parser.add_argument("--tasks", type=int, help="number of tasks that the work is split over")
    parser.add_argument("--once", action="store_true", help="with --follow: end instead of waiting for checkpoints")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="DIR", help="one table and plot of evaluations")
    arguments = parser.parse_args()
    if arguments.follow and (arguments.step is not None or arguments.keep_samples or arguments.compare):
        parser.error(
            "--follow evaluates all steps and keeps no samples: leave --step, --keep-samples and --compare out"
        )
    if arguments.once and not arguments.follow:
        parser.error("--once goes with --follow")
    if arguments.out is None and not arguments.follow:
        parser.error("the folder is missing: give --out")
    if arguments.compare:
        if arguments.source is not None or arguments.protocol is not None:
            parser.error("--compare takes folders of evaluations, and nothing else but --out")
        return arguments
    if arguments.source is None or arguments.protocol is None:
        parser.error("give what to evaluate: MODEL or RUN, and --protocol")
    if (arguments.tasks is None) != (arguments.task is None and not arguments.merge):
        parser.error("--tasks N goes with --task or --merge, and they with it")
    if arguments.task is not None and not 0 <= arguments.task < arguments.tasks:
        parser.error(f"--task {arguments.task}: tasks count from 0 to {arguments.tasks - 1}")
    return arguments


def load_chosen_protocol(arguments: argparse.Namespace) -> Protocol:
    protocol = load_protocol(arguments.protocol)
    if arguments.clips is not None:
        if arguments.clips < 1:
            raise UserError(f"--clips {arguments.clips}: at least 1 is needed")
        if arguments.clips != protocol.clips.count:
            protocol = protocol.with_clips(count=arguments.clips, fingerprint=None)
    return protocol if arguments.metrics is None else protocol.with_metrics(tuple(arguments.metrics))


def follow_run(arguments: argparse.Namespace) -> None:
    run, protocol = arguments.source, load_chosen_protocol(arguments)
    if (run / CONFIG_FILE).is_file():
        raise UserError(f"{run}: is a model directory, and --follow takes a run; leave --follow out")
    out = arguments.out or run / "evaluation" / protocol.name
    clips = ClipSource(arguments.videos, arguments.shards, arguments.split)
    with start_processes(arguments.device) as processes:
        follow(run, protocol, out, clips, arguments.once, processes)


def result_files(out: Path) -> list[str]:
    """The names of an evaluation's result files."""
    return [name for name in (SCORES_FILE, "by_frame.png", *REPORT_FILES) if (out / name).is_file()]


@command_line
def main() -> None:
    arguments = parse()
    if arguments.follow:
        follow_run(arguments)
        return
    check_writable(arguments.out / "scores.json")
    if arguments.compare:
        print(compare(arguments.compare, arguments.out))
        return
    protocol = load_chosen_protocol(arguments)
    with start_processes(arguments.device) as processes:
        opener = functools.partial(
            open_evaluation,
            arguments.source,
            arguments.step,
            protocol,
            arguments.out,
            ClipSource(arguments.videos, arguments.shards, arguments.split),
            processes.device,
        )
        shard = None if arguments.task is None else WorkShard(arguments.task, arguments.tasks)
        scores = evaluate(opener, processes, shard, arguments.merge, arguments.keep_samples)
        if scores is None and shard is not None:
            print(f"{arguments.out}: task {shard.task} of {shard.tasks} has computed its batches")
        elif scores is not None and processes.is_main_process:
            print(f"{format_table(scores)}\n{arguments.out}: {', '.join(result_files(arguments.out))}")
