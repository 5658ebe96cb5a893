#!/usr/bin/env python
"""Train an autoencoder by a recipe, alone or under torchrun, and write its weights and their card.

Killed or stopped, the same command goes on from the last checkpoint, to the same weights.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from far_scale.distributed.exit_codes import DONE, REQUEUE, exit_process, exit_status_of
from far_scale.distributed.signals import StopSignals
from far_scale.utils.command_line import never_fail_to_print


def main() -> int:
    never_fail_to_print()
    signals = StopSignals()
    own_cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("recipe", help="such as recipes/autoencoder_compact.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, e.g. train.steps=100")
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"), help="folder for the weights and card")
    parser.add_argument("--run-dir", type=Path, help="folder for checkpoints and log; default: runs/autoencoder/NAME")
    parser.add_argument("--episodes", type=Path, default=Path("runs/autoencoder/episodes"), help="folder for episodes")
    parser.add_argument("--workers", type=int, default=own_cores, help="processes that record, threads that read")
    return exit_status_of(lambda: _train(parser.parse_intermixed_args(), signals))


def _train(asked: argparse.Namespace, signals: StopSignals) -> int:
    # Late: threads must inherit what StopSignals has set.
    from far_scale.autoencoder.training import TrainingPaths, load_autoencoder_recipe, train_autoencoder
    from far_scale.distributed.process_group import start_processes, stop_processes
    from far_scale.train.lease import Lease

    recipe = load_autoencoder_recipe(asked.recipe, asked.overrides)
    run = asked.run_dir or Path("runs/autoencoder") / recipe.name
    command = " ".join(["python tools/train_autoencoder.py", asked.recipe, *asked.overrides, f"--out {asked.out}"])
    places = TrainingPaths(asked.out, run, asked.episodes, max(1, asked.workers))
    processes = start_processes()
    with Lease(run, processes):
        done = train_autoencoder(recipe, places, command, processes, signals)
    stop_processes()
    return DONE if done else REQUEUE


if __name__ == "__main__":
    exit_process(main())
