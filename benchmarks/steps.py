"""Time and peak memory of training steps; step_sides.py has what is timed."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from measure import Row, attempt, interleaved, peak_beyond, timed
from official import OfficialCode
from pairs import SIDE, random_pair, randomize
from step_sides import BareStep, Case, EngineModel, Mode, Step, WholeStep, make_adam

from far_scale.config.schema import ObjectiveSection
from far_scale.distributed.process_group import Processes
from far_scale.model import FAR
from far_scale.model.attention import choose_kernel
from far_scale.model.layers import HEAD_DIM
from far_scale.train.costs import train_flops
from far_scale.train.device_prefetch import DevicePrefetch
from far_scale.train.metrics import compiled_graphs

OFFICIAL, WHOLE = "official", "whole"
WARM_UPS = {"same": 2, "varying": 4}  # with varying layouts, several steps compile
GRAPHS = 64  # torch keeps 8 of one function, more than one model needs; here many modes of it take turns


class WarmUp(NamedTuple):
    """Results of the warm-up steps.

    Attributes:
        first: seconds of the very first step, compiling included.
        peak: bytes at the peak of a step beyond what lies there between steps; None where that is not to be known.
    """

    first: float
    peak: int | None

    @staticmethod
    def of(step: Step, steps: int) -> WarmUp:
        """Train so many steps, at least two."""
        first = timed(step.run, step.device)
        for _ in range(steps - 2):
            step.run()
        return WarmUp(first, peak_beyond(step.run, step.device))


def measure_case(
    case: Case,
    modes: Sequence[Mode],
    code: OfficialCode | None,
    device: torch.device,
    dtype: torch.dtype,
    peak: float,
    repeats: int,
    minutes: float,
    processes: Processes | None = None,
) -> list[Row]:
    """A row for each side: the official code, unless `code` is None, and ours in each of the modes, on the same first
    weights and clips, in turn.

    Args:
        peak: FLOP/s of the device at best.
        processes: this one, for whole steps beside the bare ones of each mode; None for bare ones only.
    """
    torch._dynamo.reset()  # graphs of the case before, which hold its model
    gc.collect()
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    with _steps(case, modes, code, device, dtype, processes) as steps:
        graphs = dict.fromkeys(steps, 0)
        warm: dict[str, WarmUp] = {}
        notes: dict[str, str] = {}
        for name, step in steps.items():
            before = compiled_graphs()
            found, notes[name] = attempt(lambda step=step: WarmUp.of(step, WARM_UPS[case.layouts]), device)
            graphs[name] = compiled_graphs() - before
            if found is None:
                step.recover()
            else:
                warm[name] = found

        def run(name: str) -> dict[str, float]:
            before = compiled_graphs()
            taken = steps[name].seconds()
            graphs[name] += compiled_graphs() - before
            return taken

        sides = {name: (lambda name=name: run(name)) for name in warm}
        seconds = interleaved(sides, repeats, minutes, f"{case.name}, {case.frames} frames x {case.clips}")
        compiled = {name for name, step in steps.items() if step.compiled}
        clip_frames = {name: step.clip_frames for name, step in steps.items()}
    rows = []
    for name in graphs:
        row = {"model": case.name, "frames": case.frames, "clips": case.clips, "side": name}
        row |= _measured(case, seconds.get(name, {}), clip_frames[name], warm.get(name), name in compiled, peak)
        rows.append(row | {"graphs": graphs[name], "note": notes[name], "seconds": seconds.get(name, {})})
    rows = [_beside(row, rows[0]) for row in rows]
    return rows if processes is None else [_beside_bare(row, rows) for row in rows]


def _measured(
    case: Case,
    seconds: dict[str, list[float]],
    clip_frames: Sequence[tuple[int, ...]],
    warm: WarmUp | None,
    compiled: bool,
    peak: float,
) -> Row:
    """A side's figures, None where it failed.

    Args:
        clip_frames: of all its steps, the timed ones last.
    """
    medians = {part: statistics.median(taken) for part, taken in seconds.items()}
    row: Row = {part: medians.get(part) for part in ("step", "gradients", "update")}
    row |= _rates(case, row["step"], clip_frames[-len(seconds.get("step", ())) :], peak)
    row |= {"peak MB": None, "compiling": None}
    if warm is not None:
        row["peak MB"] = None if warm.peak is None else warm.peak / 1e6
        row["compiling"] = max(0.0, warm.first - row["step"]) if compiled else 0.0
    return row | {"repeats": len(seconds.get("step", ()))}


def _rates(case: Case, seconds: float | None, clip_frames: Sequence[tuple[int, ...]], peak: float) -> Row:
    """What a step's seconds mean for the steps' mean tokens, and for the arithmetic that FAR takes at the least."""
    if seconds is None:
        return {"tokens/s": None, "TFLOP/s": None, "MFU": None}
    layouts = [case.config.layout(lengths, (SIDE, SIDE)) for lengths in clip_frames]
    tokens = statistics.mean(layout.tokens for layout in layouts)
    speed = statistics.mean(train_flops(case.config, layout) for layout in layouts) / seconds
    return {"tokens/s": tokens / seconds, "TFLOP/s": speed / 1e12, "MFU": speed / peak}


def _beside(row: Row, first: Row) -> Row:
    """The row, and how it compares with the first one: how many times as fast a token, what share of its peak memory.

    All sides have the same tokens, but the official one where layouts vary.
    """
    faster = None if row["step"] is None or first["step"] is None else row["tokens/s"] / first["tokens/s"]
    share = None if row["peak MB"] is None or not first["peak MB"] else row["peak MB"] / first["peak MB"]
    name = first["side"]
    return row | {f"{name} / this": faster, f"peak / {name}'s": share}


def _beside_bare(row: Row, rows: Sequence[Row]) -> Row:
    """The row, and its seconds as a multiple of the bare step's of the same mode."""
    bare = next(other for other in rows if row["side"] in (other["side"], f"{other['side']}, {WHOLE}"))
    known = row["step"] is not None and bare["step"] is not None
    return row | {"this / bare": row["step"] / bare["step"] if known else None}


@contextlib.contextmanager
def _steps(
    case: Case,
    modes: Sequence[Mode],
    code: OfficialCode | None,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes | None,
) -> Iterator[dict[str, Step]]:
    """The sides by name, the official one first. Ours share the model and its optimizer, or DeepSpeed's engine."""
    steps: dict[str, Step] = {}
    if code is None:
        ours = FAR(case.config)
        randomize(ours)
        ours.to(device, dtype)
    else:
        pair = random_pair(code, case.config, device, dtype)
        ours, steps[OFFICIAL] = pair.ours, BareStep.official(code, pair.theirs, case, device)
    optimizer = make_adam(ours, fused=True)
    with contextlib.ExitStack() as opened:

        def open_feed(mode: Mode) -> DevicePrefetch:
            """The same packs for every side."""
            kernel = choose_kernel(mode.kernel, device, dtype, HEAD_DIM).name
            return opened.enter_context(
                DevicePrefetch(case.packs(), ObjectiveSection(), case.config, 0, device, kernel)
            )

        training = None if processes is None else opened.enter_context(EngineModel(ours, dtype, processes))
        for mode in modes:
            steps[mode.name] = BareStep.ours(ours, optimizer, open_feed(mode), mode, device)
            if training is not None:
                steps[f"{mode.name}, {WHOLE}"] = WholeStep(training, open_feed(mode), mode)
        yield steps
