"""Plan a training before it starts, or measure a machine for plans.

tools/plan.py RECIPE [key=value ...] --nodes N --gpus-per-node G --gpu h100     memory, time, traffic and disk of a run
tools/plan.py RECIPE [key=value ...] --measure                                  a profile of this machine, for the times
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from far_scale.config.recipe import check_ranks, load_recipe
from far_scale.train.planner.changes import cheapest_change
from far_scale.train.planner.checkpoints import best_interval, measured_save, save_by_disk
from far_scale.train.planner.estimate import GPU_BYTES, Cluster, RunPlan, plan_run
from far_scale.train.planner.profile import FOLDER
from far_scale.train.planner.report import change_lines, interval_lines, plan_lines
from far_scale.utils.command_line import above_zero, at_least, command_line
from far_scale.utils.errors import UserError


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Plan a training before it starts: memory, time, traffic and disk. Needs no GPU and no shard set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--nodes", type=at_least(1), default=1)
    parser.add_argument("--gpus-per-node", type=at_least(1), default=8)
    parser.add_argument("--gpu", choices=sorted(GPU_BYTES), help="of the nodes; required without --measure")
    parser.add_argument("--mtbf", type=above_zero, metavar="HOURS", help="mean time between failures of the whole job")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run directory, whose saves are taken for --mtbf")
    parser.add_argument("--profiles", type=Path, default=FOLDER, metavar="DIR", help="folder of measured profiles")
    parser.add_argument(
        "--measure", action="store_true", help="train a few steps of a few shapes here, and write a profile"
    )
    args = parser.parse_intermixed_args()
    if args.run is not None and args.mtbf is None:
        raise UserError("--run: its saves are for the checkpoint interval; give --mtbf HOURS, too")
    if args.measure:
        _measure(args)
    elif args.gpu is None:
        raise UserError(f"--gpu: missing; give {' or '.join(sorted(GPU_BYTES))}, or --measure to measure this machine")
    else:
        _plan(args)


def _plan(args: argparse.Namespace) -> None:
    from far_scale.train.curriculum import stages
    from far_scale.train.planner.shapes import StageShapes, draw_stages, local_sources

    overrides, ranks = list(args.overrides), args.nodes * args.gpus_per_node
    recipe = load_recipe(args.recipe, overrides)
    shared_by, heads = recipe.train.sequence_parallel, recipe.model.heads
    if (changes := _changes_to_start(recipe.data.lanes, shared_by, heads, ranks)) is not None:
        key, text = changes
        print(f"it does not start like this: {text}")
        overrides.append(key)
        recipe = load_recipe(args.recipe, overrides)
    sources = local_sources(stages(recipe))

    @functools.cache
    def drawn(keys: tuple[str, ...]) -> list[StageShapes]:
        changed = load_recipe(args.recipe, [*overrides, *keys])
        return draw_stages(stages(changed), sources, changed.seed)

    def replan(more: tuple[str, ...], nodes: int) -> RunPlan:
        changed = load_recipe(args.recipe, [*overrides, *more])
        cluster = Cluster(nodes, args.gpus_per_node, args.gpu, GPU_BYTES[args.gpu])
        check_ranks(changed, cluster.ranks)
        # Packs depend on the data alone.
        shapes = drawn(tuple(key for key in more if not key.startswith("train.")))
        return plan_run(changed, cluster, sources, args.profiles, shapes=shapes)

    plan = replan((), args.nodes)
    when_to_save = [] if args.mtbf is None else _interval_lines(args, plan)
    print("\n".join(plan_lines(plan)))
    if not plan.fits:
        change = cheapest_change(plan, recipe.train, recipe.data, recipe.curriculum, replan)
        print("\n".join(change_lines(plan, change)))
    for line in when_to_save:
        print(line)


def _changes_to_start(lanes: int, size: int, heads: int, ranks: int) -> tuple[str, str] | None:
    """Where so many ranks in groups of `size` cannot share the lanes: the override to plan with, and why."""
    if not ranks % size and not lanes % (ranks // size):
        return None
    sizes = [n for n in range(size, min(ranks, heads) + 1) if not ranks % n and not lanes % (ranks // n)]
    if sizes:
        key = f"train.sequence_parallel={sizes[0]}"
        shared = f"data.lanes is {lanes}, which {ranks} ranks cannot share one by one"
        return key, f"{shared}. The plan is for {key}: groups of {sizes[0]} ranks share each pack, with the same result"
    groups = max(ranks // size, 1)
    more = -(-lanes // groups) * groups
    usable = ", ".join(str(size * n) for n in range(1, lanes + 1) if lanes % n == 0)
    return f"data.lanes={more}", (
        f"data.lanes is {lanes}, which {ranks} ranks cannot share; {usable} can. "
        f"The plan is for data.lanes={more}, {more / lanes:g} times the clips a step, which changes the result"
    )


def _interval_lines(args: argparse.Namespace, plan: RunPlan) -> list[str]:
    if args.run is not None:
        save = measured_save(args.run)
    elif plan.profile is not None:
        profile = plan.profile
        source = f"{plan.checkpoint_bytes / 1e9:.3g} GB at {profile.disk_write / 1e9:.3g} GB/s to {profile.disk_folder}"
        save = save_by_disk(plan.checkpoint_bytes, profile.disk_write, source)
    else:
        raise UserError(
            "--mtbf: the time of a save is not known; name a run that has saved checkpoints by --run DIR, or measure "
            "the disk by --measure"
        )
    seconds = [stage.step_seconds for stage in plan.stages if stage.step_seconds is not None]
    mtbf = 3600 * args.mtbf
    return interval_lines(save, best_interval(save, mtbf), mtbf, max(seconds, default=None))


def _measure(args: argparse.Namespace) -> None:
    from far_scale.distributed.process_group import stop_processes
    from far_scale.train.curriculum import stages
    from far_scale.train.deepspeed_adapter import start_deepspeed_processes
    from far_scale.train.engine import check_computation
    from far_scale.train.planner.measure import measure
    from far_scale.train.planner.shapes import draw_stages, local_sources
    from far_scale.train.planner.time_model import predict_seconds

    recipe = load_recipe(args.recipe, args.overrides)
    plan = stages(recipe)
    shapes = max(draw_stages(plan, local_sources(plan), recipe.seed), key=lambda stage: stage.largest.tokens)
    processes = start_deepspeed_processes()

    def print_line(text: str) -> None:
        if processes.is_main_process:
            print(text)

    print_line(check_computation(recipe.train, processes.device).why)
    profile = measure(
        shapes.stage, shapes.largest, recipe.optimizer, recipe.objective, recipe.train, args.profiles, processes,
        print_line,
    )  # fmt: skip
    errors = [abs(predict_seconds(profile.coefficients, m.work) / m.seconds - 1) for m in profile.measurements]
    print_line(f"the fitted times differ from the measured ones by at most {max(errors):.0%}")
    print_line(f"disk: writes {profile.disk_write / 1e6:.3g} MB/s, reads {profile.disk_read / 1e6:.3g} MB/s")
    if processes.is_main_process:
        print(f"profile: {profile.write(args.profiles)}")
    stop_processes()
