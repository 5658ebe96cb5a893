"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from far_scale.distributed.ledger import table
from far_scale.model.layout import FrameLayout
from far_scale.model.presets import describe
from far_scale.train.planner.changes import Change
from far_scale.train.planner.checkpoints import Interval, SaveTime
from far_scale.train.planner.estimate import RunPlan, StagePlan

_HOUR, _DAY = 3600.0, 86400.0


def plan_lines(plan: RunPlan) -> list[str]:
    """The whole plan, without a change that would make it fit."""
    cluster = plan.cluster
    where = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.per_node} {cluster.device}"
    return [
        f"recipe      {plan.title}",
        f"ranks       {cluster.ranks} ({where}, {cluster.memory / 1e9:.3g} GB each) x {plan.packs} packs a step",
        f"model       {describe(plan.config)}: {plan.parameters / 1e6:.1f} M parameters, {plan.precision}",
        *plan.sharding.why,
        *plan.groups,
        *assumption_lines(plan),
        *stage_lines(plan),
        *memory_lines(plan),
        *time_lines(plan),
        *traffic_lines(plan),
        *disk_lines(plan),
    ]


def assumption_lines(plan: RunPlan) -> list[str]:
    """The stages whose clips are those of the recipe."""
    names = [stage.shapes.stage.name for stage in plan.stages if stage.shapes.assumed]
    if not names:
        return []
    return [
        f"clips       as the recipe draws them, in {', '.join(names)}: the shard set is not here, and videos that are "
        "shorter give shorter clips"
    ]


def stage_lines(plan: RunPlan) -> list[str]:
    """The stages as a table, with tokens and arithmetic."""
    rows = [
        ("stage", "steps", "frames", "clips a pack", "tokens a pack", "attended pairs", "TFLOP/step", "MB read/step",
         "GB", "s/step", "limit")
    ]  # fmt: skip
    for stage in plan.stages:
        shapes = stage.shapes
        frames = shapes.stage.data.frames
        counts = f"{frames[0]}-{frames[1]}" if isinstance(frames, tuple) else frames
        seconds = stage.step_seconds
        rows.append(
            (
                shapes.stage.name,
                str(shapes.stage.steps),
                str(counts) if not isinstance(counts, dict) else ",".join(map(str, counts)),
                _mean_and_max(stage, lambda layout: len(layout.clip_frames)),
                _mean_and_max(stage, lambda layout: layout.tokens),
                _mean_and_max(stage, lambda layout: layout.attended_pairs),
                f"{shapes.step_flops / 1e12:.3g}",
                f"{stage.bytes_read / 1e6:.3g}",
                f"{stage.memory.peak / 1e9:.2f}",
                "-" if seconds is None else f"{seconds:.3g}",
                stage_limit(plan, stage),
            )
        )
    drawn = len(plan.stages[0].shapes.layouts)
    return [*_table(rows), f"(mean / largest of {drawn} drawn packs; TFLOP and MB over all ranks; GB a rank)"]


def memory_lines(plan: RunPlan) -> list[str]:
    """Bytes of a rank in parts, by stage, and whether they fit."""
    titles = {"ema": "EMA", "saved": "saved activations", "recomputed": "recomputed layer"}
    names = list(plan.stages[0].memory.parts())
    shown = [name for name in names if any(stage.memory.parts()[name] for stage in plan.stages)]
    rows = [("memory, GB", *(titles.get(name, name) for name in shown), "at most")]
    for stage in plan.stages:
        parts = stage.memory.parts()
        cells = (f"{parts[name] / 1e9:.2f}" for name in shown)
        rows.append((stage.shapes.stage.name, *cells, f"{stage.memory.peak / 1e9:.2f}"))
    free, margin = plan.cluster.memory, plan.cluster.memory - plan.usable
    verdict = "fits" if plan.fits else "does not fit"
    return [
        *_table(rows),
        f"memory      {plan.peak / 1e9:.2f} GB a rank at most, of {free / 1e9:.3g} GB free, with a margin of "
        f"{margin / 1e9:.3g} GB for buffers of libraries and fragmentation: {verdict}",
    ]


def time_lines(plan: RunPlan) -> list[str]:
    """The time of the run, from the profile; or how to get one."""
    total, ranks = plan.seconds, plan.cluster.ranks
    if plan.profile is None or total is None:
        return [f"time        {plan.profile_line}"]
    lines = [
        f"time        {total / _DAY:.3g} days, {total * ranks / _HOUR:.4g} GPU-hours, without saves, validation and "
        "restarts",
        f"profile     {plan.profile_line}",
    ]
    if not plan.knows_links:
        lines.append("            it has no links like these, so collectives take no time here")
    return lines


def traffic_lines(plan: RunPlan) -> list[str]:
    """What a rank sends in a step, and the speed of the links at which this takes as long as the computation."""
    if plan.unknown_traffic:
        return [f"collectives unknown for {plan.unknown_traffic}"]
    lines = table(plan.traffic) if plan.traffic else []
    if plan.between and plan.profile is not None:
        fastest = min(stage.seconds["compute"] for stage in plan.stages)
        needed = plan.between * plan.cluster.per_node / fastest
        lines.append(
            f"links       a node sends {needed / 1e9:.3g} GB/s to others, if its sending takes as long as computing"
        )
    return lines


def disk_lines(plan: RunPlan) -> list[str]:
    """Checkpoints on disk, and what is read a second."""
    one, kept = plan.checkpoint_bytes, plan.checkpoints_kept
    lines = [f"checkpoints {one / 1e9:.3g} GB each, {kept} at a time: {kept * one / 1e9:.3g} GB"]
    rates = [(stage.bytes_read / stage.step_seconds, stage) for stage in plan.stages if stage.step_seconds]
    if rates:
        rate, stage = max(rates, key=lambda item: item[0])
        per_node = rate / plan.cluster.nodes
        lines.append(
            f"data        {rate / 1e6:.3g} MB/s of latents in {stage.shapes.stage.name}, "
            f"{per_node / 1e6:.3g} MB/s on each node"
        )
    return lines


def change_lines(plan: RunPlan, change: Change | None) -> list[str]:
    """The change that makes the plan fit."""
    if change is None:
        tried = "more sharding, recomputation, bf16, shared packs, smaller packs and up to 4 times the nodes"
        return [f"change      none of those that were tried fits ({tried})"]
    typed = [*change.overrides, *([f"--nodes {change.nodes}"] if change.nodes != plan.cluster.nodes else [])]
    result = "" if _keeps_result(change.overrides) else "; it changes the result, so it needs a new run"
    return [
        f"change      the cheapest that fits: {' '.join(typed)}",
        f"            then {change.plan.peak / 1e9:.2f} GB a rank at most{result}",
    ]


def interval_lines(save: SaveTime, interval: Interval, mtbf: float, step_seconds: float | None) -> list[str]:
    """When to save.

    Args:
        mtbf: seconds between failures on average.
        step_seconds: of the slowest stage's mean step; None without a profile.
    """
    minutes = interval.seconds / 60
    steps = "" if step_seconds is None else f", about {max(1, round(interval.seconds / step_seconds))} steps"
    return [
        f"saves       training waits {save.waiting:.3g} s for one, which takes {save.seconds:.3g} s ({save.source})",
        f"            every {minutes:.3g} minutes{steps} loses the least time (Young 1974: "
        f"{interval.young / 60:.3g}, Daly 2006: {interval.daly / 60:.3g} minutes) with a failure every "
        f"{mtbf / _HOUR:.3g} hours: goodput {interval.goodput:.1%} without restarts; "
        f"checkpoint.every_minutes={minutes:.3g}",
    ]


def stage_limit(plan: RunPlan, stage: StagePlan) -> str:
    """What limits a stage: memory where it does not fit, or what takes most of a step's time."""
    if stage.memory.peak > plan.usable:
        return "memory"
    return max(stage.seconds, key=lambda name: stage.seconds[name]) if stage.seconds else "-"


def _keeps_result(overrides: Sequence[str]) -> bool:
    same = ("train.zero_stage", "train.activation_checkpointing", "train.sequence_parallel")
    return all(override.startswith(same) for override in overrides)


def _mean_and_max(stage: StagePlan, measure: Callable[[FrameLayout], int]) -> str:
    layouts = stage.shapes.layouts
    return f"{_number(stage.shapes.mean(measure))} / {_number(max(map(measure, layouts)))}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _number(number: float) -> str:
    """A number, with a unit where it is long."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e5, "K")):
        if number >= size:
            return f"{number / (1e3 if unit == 'K' else size):.3g}{unit}"
    return f"{number:.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"
