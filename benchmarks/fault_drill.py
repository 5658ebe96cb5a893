"""A training under random faults, and moved to another number of ranks, compared with the same training undisturbed.

    python benchmarks/fault_drill.py [--minutes 20] [--ranks 2] [--seed 0] [--shards DIR] [--recipe R] [key=value ...]

See benchmarks/README.md for the faults and the tables. Exit status 1: something differs, or was not recovered from.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from faults import Drill, Fault, Kind, Pace, SmallDisk
from measure import Row, environment, print_table, write_result
from options import count
from ranks import FailedError, Training, tail
from sameness import compare, each_step_once, lanes, logged, loss_difference

from far_scale.config.recipe import Recipe, check_ranks, load_recipe
from far_scale.distributed.exit_codes import DONE, REQUEUE
from far_scale.train import checkpoint
from far_scale.train.shard_sets import open_source
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError

SMALL = (
    "model.layers=2", "model.heads=2", "data.frames=8", "data.lanes=4", "data.clips_per_pack=2",
    "data.shuffle_window=4", "sample.given=4", "optimizer.warmup_steps=4", "checkpoint.every=10", "checkpoint.keep=2",
    "faults.watchdog_seconds=10",
)  # fmt: skip
"""`demo_cpu` as two CPU ranks train it at about five steps a second."""

STEPS_A_MINUTE = 15
"""As many as the faults leave on such ranks: most of a start is loading torch, and a good part of its steps is lost."""

TOLERANCE = 1e-5
"""Of the losses at another number of ranks, where sums are rounded in another order."""

FAULTS = "Faults"
SAME = "Under faults against undisturbed: the same number of ranks, bit for bit"
MOVED = "On other numbers of ranks against undisturbed"
SAVING = "Saving"


@command_line
def main() -> None:
    args = arguments()
    begun, load = time.monotonic(), os.getloadavg()[0]
    spec, overrides = recipe_arguments(args)
    recipe = load_recipe(spec, overrides)
    check(recipe, args.ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = recipe.train.steps
    more = {
        "device": device.type,
        "ranks": str(args.ranks),
        "seed": str(args.seed),
        "recipe": " ".join([spec, *overrides]),
    }
    facts = environment(device, more)

    work = Path(tempfile.mkdtemp(prefix="fault-drill-"))
    undisturbed, moved = (Training(work / name, [spec, *overrides], work) for name in ("undisturbed", "moved"))
    print(f"{steps} steps on {args.ranks} ranks, undisturbed; what the ranks print is in {work}", flush=True)
    pace = train_undisturbed(undisturbed, args.ranks)
    print(f"a start takes {pace.start:.1f} s, a step {pace.step:.3f} s, a save {pace.save:.2f} s", flush=True)
    counts = rank_counts(recipe, args.ranks)
    move(moved, counts, steps)
    savings = [saving("undisturbed", undisturbed), *([saving("on other numbers of ranks", moved)] if counts else [])]
    tables = {MOVED: moved_rows(moved, undisturbed.run, counts, steps)}

    size = checkpoint_bytes(undisturbed.run, steps)
    failed = []
    with small_disk(work / "disk", (recipe.checkpoint.keep + 3) * size + (64 << 20)) as disk:
        if disk is None:
            facts["left out"] = f"{Kind.FULL.value}: mounting a small disk is for root, where it is allowed at all"
            print(f"left out: {facts['left out']}", flush=True)
        training = Training((disk or work) / "faults", [spec, *overrides], work)
        chance = random.Random(args.seed)
        drill = Drill(training, args.ranks, recipe, pace, chance, None if disk is None else SmallDisk(disk, size))
        # What is left of the training when no more faults come takes as long as the undisturbed one at most.
        seconds = 60 * args.minutes - (time.monotonic() - begun) - pace.step * steps
        print(f"faults for {max(0.0, seconds):.0f} s, on {args.ranks} ranks", flush=True)
        try:
            drill.run(seconds)
            tables[SAME] = compare(training.run, undisturbed.run, steps)
            savings.append(saving("under faults" + ("" if disk is None else ", into memory"), training))
        except FailedError as error:
            failed.append(f"the training under faults did not end: {error}")
            shutil.copytree(training.run, work / "kept", ignore=shutil.ignore_patterns("checkpoints"))
    tables |= {FAULTS: fault_rows(drill.faults), SAVING: savings}

    facts["starts under faults"] = f"{training.starts}, of which {len(drill.unplanned)} ended without a fault of ours"
    facts["load average"] = (
        f"{load:.2f} in the minute before, {os.getloadavg()[2]:.2f} in the last 15 minutes, to which the ranks add "
        f"about {args.ranks}; what is above that, others did on this machine"
    )
    facts["minutes"] = f"{(time.monotonic() - begun) / 60:.1f}"
    for fault in drill.faults:
        if not fault.recovered:
            failed.append(f"fault {fault.number} ({fault.kind.value}): {fault.problem or 'not recovered from'}")
    failed += [f"under faults: not equal: {row['what']}" for row in tables.get(SAME, []) if not row["equal"]]
    failed += [f"ranks {row['ranks']}: not the same" for row in tables[MOVED] if not row["same"]]
    facts["result"] = "; ".join(text.splitlines()[0] for text in failed) or "everything recovered, nothing differs"
    ordered = {title: tables[title] for title in (FAULTS, SAME, MOVED, SAVING) if tables.get(title)}
    for title, table in ordered.items():
        print_table(title, table)
    path = write_result(args.out, f"fault-drill-{device.type}-{args.ranks}-ranks", facts, ordered)
    print(f"\nwritten: {path} and .json", flush=True)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)} (see {work})")
    shutil.rmtree(work)


def recipe_arguments(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Recipe and overrides: those of the small demo unless another recipe was asked for, then the user's own.

    Raises:
        UserError: an override of a key that the drill sets itself.
    """
    for key in ("run_dir", "log.every"):
        if any(override.split("=")[0] == key for override in args.overrides):
            raise UserError(f"{key}: the drill sets this itself; leave it out")
    steps = max(60, round(STEPS_A_MINUTE * args.minutes))
    small = [*SMALL, f"train.steps={steps}"] if args.recipe is None else []
    shards = [] if args.shards is None else [f"data.shards={args.shards}"]
    return args.recipe or "demo_cpu", [*small, *shards, *args.overrides, "log.every=1"]


def check(recipe: Recipe, ranks: int) -> None:
    """Check that the recipe suits a drill.

    Raises:
        UserError: names the key and the fix.
    """
    check_ranks(recipe, ranks)
    open_source(recipe.data.shards)
    if recipe.checkpoint.keep < 2:
        raise UserError("checkpoint.keep=1: with the newest checkpoint damaged there is none left; set 2 or more")
    if recipe.train.steps < 4 * recipe.checkpoint.every:
        raise UserError(
            f"train.steps={recipe.train.steps}: too few for faults between checkpoints; "
            f"set {4 * recipe.checkpoint.every} or more, or a lower checkpoint.every"
        )
    if not 0 < recipe.faults.watchdog_seconds <= 300:
        raise UserError(
            f"faults.watchdog_seconds={recipe.faults.watchdog_seconds:g}: a rank that is stopped keeps the others for "
            "so long; set some steps' time, up to 300"
        )


def rank_counts(recipe: Recipe, ranks: int) -> list[int]:
    """`ranks`, the next smaller number that the lanes allow (or else the next larger), and `ranks` again."""
    allowed = [n for n in range(1, recipe.data.lanes + 1) if recipe.data.lanes % n == 0]
    others = [n for n in reversed(allowed) if n < ranks] or [n for n in allowed if n > ranks]
    return [ranks, others[0], ranks] if others else []


def train_undisturbed(training: Training, ranks: int) -> Pace:
    """Train to the end; returns how long things took.

    Raises:
        UserError: it did not get there.
    """
    begun = time.monotonic()
    with training.start(ranks) as started:
        training.until(started, lambda: training.done > 0)
        to_first_step = time.monotonic() - begun
        statuses = training.end(started)
        if set(statuses) != {DONE}:
            raise UserError(f"the undisturbed training ended with {statuses}{tail(started.output)}")
    step = statistics.median(line["seconds_per_step"] for line in logged(training.run))
    return Pace(to_first_step, step, statistics.median(event["seconds"] for event in training.events("saved")))


def move(training: Training, counts: Sequence[int], steps: int) -> None:
    """Train on one number of ranks after another: asked to stop at a third of the way, killed at two thirds.

    Raises:
        UserError: it did not get to the end.
    """
    for leg, ranks in enumerate(counts):
        print(f"from step {saved(training.run)} on {ranks} ranks", flush=True)
        with training.start(ranks) as started:
            if leg == 0 and training.until(started, lambda: training.high >= steps // 3):
                started.send(ranks - 1, signal.SIGTERM)
            if leg == 1 and training.until(started, lambda: saved(training.run) >= 2 * steps // 3):
                started.kill()
            statuses = training.end(started)
            if set(statuses) != ({REQUEUE}, {-signal.SIGKILL}, {DONE})[leg]:
                raise UserError(f"the training on {ranks} ranks ended with {statuses}{tail(started.output)}")


def moved_rows(training: Training, undisturbed: Path, counts: Sequence[int], steps: int) -> list[Row]:
    """The result of training on these numbers of ranks; no row where the lanes allow only one number."""
    if not counts:
        return []
    once = each_step_once(training.run, steps)
    difference = loss_difference(training.run, undisturbed) if once else None
    lanes_equal = lanes(training.run, steps) == lanes(undisturbed, steps)
    return [
        {
            "ranks": " -> ".join(map(str, counts)),
            "changed after steps": ", ".join(str(event["step"]) for event in training.events("resumed")),
            "largest relative difference of the losses": difference,
            "lanes equal": lanes_equal,
            "every step once in log.jsonl": once,
            "same": difference is not None and difference <= TOLERANCE and lanes_equal,
        }
    ]


def saved(run: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return checkpoint.latest_step(run) or 0


def fault_rows(faults: Sequence[Fault]) -> list[Row]:
    """A row for each kind, and one for all of them."""
    rows: list[Row] = []
    groups = [(kind.value, [fault for fault in faults if fault.kind is kind]) for kind in Kind]
    for name, group in [*groups, ("all", list(faults))]:
        lost = [fault.lost for fault in group if fault.lost is not None]
        seconds = [fault.seconds for fault in group if fault.seconds is not None]
        rows.append(
            {
                "fault": name,
                "times": len(group),
                "recovered": sum(fault.recovered for fault in group),
                "steps lost, mean": statistics.mean(lost) if lost else None,
                "most": max(lost, default=None),
                "seconds to the next new step, mean": statistics.mean(seconds) if seconds else None,
                "most seconds": max(seconds, default=None),
                "faults": [fault.facts() for fault in group] if name != "all" else [],
            }
        )
    return rows


def saving(name: str, training: Training) -> Row:
    """The time that a run waited for its checkpoints."""
    events, lines = training.events("saved"), logged(training.run)
    stalls, seconds = ([event[key] for event in events] for key in ("stall_seconds", "seconds"))
    waits = [line["save_wait"] * line["seconds_per_step"] for line in lines]  # a line is one step
    return {
        "run": name,
        "saves": len(events),
        "wait for the copy, ms, median": 1e3 * statistics.median(stalls),
        "most ms": 1e3 * max(stalls),
        "written in s, median": statistics.median(seconds),
        "save_wait, share of the time": sum(waits) / sum(line["seconds_per_step"] for line in lines),
        "most in a step, ms": 1e3 * max(waits),
        "stall_seconds": stalls,
        "seconds": seconds,
    }


def checkpoint_bytes(run: Path, step: int) -> int:
    return sum(file.stat().st_size for file in checkpoint.step_folder(run, step).iterdir())


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path | None]:
    """A file system of `size` bytes at `folder` that can be filled without harm to others; None where that is not
    allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train under random faults, and compare with the same left in peace.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--recipe", help="a YAML file, or the name of one in recipes/ (default: demo_cpu made small)")
    parser.add_argument(
        "--shards", type=Path, help="shard set to train on (default: the recipe's, of tools/quickstart.sh)"
    )
    parser.add_argument("--ranks", type=count, default=2, help="training processes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="about how long it takes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
