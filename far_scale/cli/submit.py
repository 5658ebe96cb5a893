"""Submit training to SLURM: tools/submit.py RECIPE [key=value ...] --nodes N --gpus-per-node G --time 2-00:00:00.

Options of sbatch may follow after `--`: ... -- --account=mine --qos=high
"""

from __future__ import annotations

import argparse
import sys

from far_scale.config.recipe import load_recipe
from far_scale.config.yaml_loader import CHECKOUT
from far_scale.slurm.job_request import JobSize, parse_minutes
from far_scale.slurm.snapshot import ACCEPT
from far_scale.slurm.submit import draft, submit, train_here
from far_scale.utils.command_line import at_least, command_line
from far_scale.utils.errors import UserError


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a recipe as a SLURM job, which starts again after preemption and at its time limit.",
        epilog="Options after -- go to sbatch as they are: ... -- --account=mine --exclude=n3",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--nodes", type=at_least(1), default=1)
    parser.add_argument(
        "--gpus-per-node", type=at_least(0), default=8, help="one process for each; 0: one process, no GPU"
    )
    parser.add_argument("--cpus-per-task", type=at_least(1), default=8, help="cores of a process")
    parser.add_argument("--time", default="2-00:00:00", help="time limit, as sbatch takes it")
    parser.add_argument("--partition", help="default: the cluster's")
    chain_help = "K jobs one after another, where jobs cannot be requeued; each resumes where the previous one stopped"
    parser.add_argument("--chain", type=at_least(1), metavar="K", help=chain_help)
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and print the sbatch file")
    parser.add_argument("--local", action="store_true", help="train on this machine, without SLURM")
    parser.add_argument("--accept-changes", action="store_true", help="resume although it changes the result")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_intermixed_args(sys.argv[1:end]), sys.argv[end + 1 :]
    recipe = load_recipe(args.recipe, args.overrides)
    minutes = parse_minutes(args.time)
    size = JobSize(args.nodes, args.gpus_per_node, args.cpus_per_task, minutes, args.partition)
    command = [args.recipe, *args.overrides, *([ACCEPT] if args.accept_changes else [])]
    if args.local and (args.chain or args.dry_run):
        raise UserError("--local goes with neither --chain nor --dry-run; python -m far_scale.train has a --dry-run")
    if args.local and options:
        raise UserError(f"-- {' '.join(options)}: are options of sbatch; leave them out with --local")
    if args.dry_run:
        print(draft(recipe, size, args.chain, CHECKOUT, options))
    elif args.local:
        sys.exit(train_here(recipe, command, size))
    else:
        for job in submit(recipe, command, size, args.chain, CHECKOUT, options):
            print(job)
