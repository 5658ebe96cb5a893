"""Record episodes of the demo world (ViZDoom mazes) as .npz files. Complete episodes are kept."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from far_scale.data.demo.episodes import record_episodes
from far_scale.data.demo.explorer import Habits
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError
from far_scale.utils.rng import MAX_SEED


@command_line
def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the episodes' folder")
    parser.add_argument("--episodes", type=int, default=64, help="number of episodes")
    parser.add_argument("--frames", type=int, default=256, help="frames of an episode")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first episode; the next ones count up")
    parser.add_argument(
        "--wander",
        type=float,
        default=0.0,
        help="probability, at each decision, of up to 10 frames without a goal, which also walk into walls",
    )
    parser.add_argument(
        "--look-around",
        type=float,
        default=0.0,
        help="probability, at each decision, of 48 to 96 frames that turn on the spot and show the same views again",
    )
    parser.add_argument("--workers", type=int, default=cores, help="processes; the result is the same")
    arguments = parser.parse_args()
    for name, least in (("episodes", 1), ("frames", 1), ("seed", 0), ("workers", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} {getattr(arguments, name)}: it must be at least {least}")
    habits = Habits(arguments.wander, arguments.look_around)
    for name, probability in habits._asdict().items():
        if not 0 <= probability <= 1:
            raise UserError(f"--{name.replace('_', '-')} {probability:g}: is a probability, from 0 to 1")
    if arguments.seed + arguments.episodes - 1 > MAX_SEED:
        raise UserError(
            f"--seed {arguments.seed}: the seeds of {arguments.episodes} episodes go past 2^64 - 1; lower it"
        )
    seeds = range(arguments.seed, arguments.seed + arguments.episodes)
    paths = record_episodes(arguments.out, seeds, arguments.frames, arguments.workers, habits)
    print(f"{arguments.out}: {len(paths)} episodes of {arguments.frames} frames")
