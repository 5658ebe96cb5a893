"""`python -m far_scale.train RECIPE [key=value ...] [--dry-run]`, by itself or under torchrun, deepspeed or srun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from far_scale.config.recipe import load_recipe
from far_scale.distributed.exit_codes import DONE, REQUEUE, exit_process, exit_status_of
from far_scale.distributed.signals import StopSignals
from far_scale.utils.command_line import never_fail_to_print


def run(arguments: Sequence[str]) -> int:
    """Train by a command line; returns the exit status (see `distributed/exit_codes.py`) and raises nothing.

    Except in a dry run, the stop signals (see `StopSignals`) are handled for the rest of the process. Standard output
    and error are replaced by streams that never fail. If the status is neither DONE nor REQUEUE, other ranks may still
    wait for this one: end the process by `exit_process`, which then waits for no thread.
    """
    never_fail_to_print()
    parser = argparse.ArgumentParser(prog="python -m far_scale.train", description="Train FAR by a recipe.")
    parser.add_argument("recipe", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, e.g. train.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, shards and memory, run one batch, stop")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps into run_dir/profile, e.g. 20:22")
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume although recipe or data would now give another result"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_intermixed_args(arguments)
    signals = None if options.dry_run else StopSignals()  # a dry run has nothing to save
    return exit_status_of(lambda: _train(options, signals))


def _train(options: argparse.Namespace, signals: StopSignals | None) -> int:
    recipe = load_recipe(options.recipe, options.overrides)

    # Imported late: a wrong recipe is refused before torch and DeepSpeed are loaded.
    from far_scale.distributed.process_group import stop_processes
    from far_scale.evaluation.validation_videos import open_validation_videos
    from far_scale.health.watchdog import collective_timeout
    from far_scale.train.deepspeed_adapter import start_deepspeed_processes
    from far_scale.train.lease import Lease
    from far_scale.train.loop import train
    from far_scale.train.plan import dry_run
    from far_scale.train.profiler import parse_steps

    steps_to_profile = parse_steps(options.profile, recipe.train.steps) if options.profile else range(0)
    processes = start_deepspeed_processes(collective_timeout(recipe.faults.watchdog_seconds))
    if options.dry_run:
        dry_run(recipe, processes, open_validation_videos, options.accept_changes)
        trained = None
    else:
        with Lease(Path(recipe.run_dir), processes):
            trained = train(
                recipe, processes, open_validation_videos, steps_to_profile, signals, options.accept_changes
            )
    stop_processes()
    return DONE if trained is None or trained.step == recipe.train.steps else REQUEUE


if __name__ == "__main__":
    exit_process(run(sys.argv[1:]))
