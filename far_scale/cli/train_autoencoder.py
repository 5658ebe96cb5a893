"""Train an autoencoder by a recipe, on one process or under torchrun, and write its weights and their metadata.

If it is killed or stopped, the same command resumes from the last checkpoint and gives the same weights.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from far_scale.distributed.exit_codes import DONE, REQUEUE, exit_process, exit_status_of
from far_scale.distributed.signals import StopSignals
from far_scale.utils.command_line import never_fail_to_print


def main() -> None:
    never_fail_to_print()
    signals = StopSignals()
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("recipe", help="such as recipes/autoencoder_compact.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, e.g. train.steps=100")
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"), help="folder for weights and metadata")
    parser.add_argument("--run-dir", type=Path, help="folder for checkpoints and log; default: runs/autoencoder/NAME")
    parser.add_argument("--episodes", type=Path, default=Path("runs/autoencoder/episodes"), help="folder for episodes")
    parser.add_argument("--workers", type=int, default=cores, help="processes that record, threads that read")
    exit_process(exit_status_of(lambda: _train(parser.parse_intermixed_args(), signals)))


def _train(args: argparse.Namespace, signals: StopSignals) -> int:
    # Imported late: threads of these libraries must inherit the signal mask of StopSignals.
    from far_scale.autoencoder.training import TrainingPaths, load_autoencoder_recipe, train_autoencoder
    from far_scale.distributed.process_group import start_processes, stop_processes
    from far_scale.train.lease import Lease

    recipe = load_autoencoder_recipe(args.recipe, args.overrides)
    run = args.run_dir or Path("runs/autoencoder") / recipe.name
    command = " ".join(["python tools/train_autoencoder.py", args.recipe, *args.overrides, f"--out {args.out}"])
    paths = TrainingPaths(args.out, run, args.episodes, max(1, args.workers))
    processes = start_processes()
    with Lease(run, processes):
        is_done = train_autoencoder(recipe, paths, command, processes, signals)
    stop_processes()
    return DONE if is_done else REQUEUE
