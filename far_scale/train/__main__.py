"""`python -m far_scale.train RECIPE [key=value ...] [--dry-run]`, alone or under torchrun, deepspeed or srun."""

from __future__ import annotations

import argparse

from far_scale.errors import command_line
from far_scale.recipe import load_recipe


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m far_scale.train", description="Train FAR by a recipe.")
    parser.add_argument("recipe", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, e.g. train.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, shards and memory, run one batch, stop")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps into run_dir/profile, e.g. 20:22")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)

    # Only now: a wrong recipe is refused before torch and DeepSpeed are loaded.
    from far_scale.train.dry_run import dry_run
    from far_scale.train.loop import train
    from far_scale.train.processes import start_processes, stop_processes
    from far_scale.train.profiler import parse_steps

    steps_to_profile = parse_steps(arguments.profile) if arguments.profile else range(0)
    processes = start_processes()
    if arguments.dry_run:
        dry_run(recipe, processes)
    else:
        train(recipe, processes, steps_to_profile)
    stop_processes()


if __name__ == "__main__":
    main()
