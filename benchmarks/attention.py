"""Frame-block causal attention, forward and backward: ours on every usable kernel, and the alternatives.

    python benchmarks/attention.py

See benchmarks/README.md for what is measured and how.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from attention_sides import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    Case,
    FlexAttention,
    Found,
    Inputs,
    Ours,
    PlainCausal,
    Side,
    causal_frames,
    dense_mask,
    error,
    exact,
    long_frames,
    prefix_loop,
)
from kernels import usable
from measure import OUT_OF_MEMORY, Row, attempt, environment, interleaved, peak_beyond, print_table, timed, write_result
from options import DTYPES, add_measuring, count, start

from far_scale.model.attention import flex, selection
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError

DENSE, FLEX, FLASH, LOOP, PLAIN = "dense mask", "FlexAttention", "FlexAttention, FLASH", "prefix loop", "plain causal"
RIVALS = {"dense": DENSE, "flex": FLEX, "flex-flash": FLASH, "loop": LOOP, "plain": PLAIN}
DEFAULT_RIVALS = tuple(name for name in RIVALS if name != "flex-flash")  # which needs flash-attn-4
ALLOWED = {"fp32": 1e-4, "bf16": 3e-2}
ENOUGH = 0.05  # seconds that a timing should last, so that launching and waiting for a GPU count little
GPU_TOKENS = 32_768
SIDES = "Forward and backward, medians"
RATIOS = "How many times as fast as others ours is (plain causal: the limit, at equal attended pairs)"


@command_line
def main() -> None:
    args = arguments()
    device = start(args)
    on_gpu = device.type == "cuda"
    dtypes = args.dtype or (["bf16"] if on_gpu else ["fp32", "bf16"])
    kernels = {dtype: usable(args.kernels, device, DTYPES[dtype]) for dtype in dtypes}
    facts = environment(device, {"device": device.type})
    sides: list[Row] = []
    ratios: list[Row] = []
    for case in cases(args, on_gpu):
        for dtype in dtypes:
            rows = measure_case(case, dtype, kernels[dtype], args.rivals, device, args.repeats, args.minutes)
            sides += rows
            ratios += [ratio_row(rows, kernel) for kernel in kernels[dtype]]
            # Each time anew: a case may take long.
            path = write_result(args.out, f"attention-{device.type}", facts, {SIDES: sides, RATIOS: ratios})
    print_table(SIDES, sides)
    print_table(RATIOS, ratios)
    print(f"\nwritten: {path} and .json", flush=True)
    failed = (row for row in sides if row["note"] not in ("", OUT_OF_MEMORY) or row["right"] is False)
    if bad := sorted({row["side"] for row in failed}):
        sys.exit(f"wrong or failed: {'; '.join(bad)} (see the columns right and note)")


def cases(args: argparse.Namespace, on_gpu: bool) -> list[Case]:
    """The cases of the command line, or the defaults of a GPU or CPU.

    Raises:
        UserError: frames that FAR-Long cannot cut into context patches, or too few of them.
    """
    frame_counts = args.frames or ([16, 32, 64, 128, 300] if on_gpu else [16, 64])
    token_counts = args.tokens or ([64, 256] if on_gpu else [64])

    def clips(tokens: int) -> int:
        return args.clips or (max(1, GPU_TOKENS // tokens) if on_gpu else 1)

    found = [causal_frames(clips(n * p), n, p, args.heads) for p in token_counts for n in frame_counts]
    for tokens in token_counts if args.long else ():
        side = math.isqrt(tokens)
        if side**2 != tokens or side % 4:
            raise UserError(f"--tokens {tokens}: FAR-Long needs the square of a multiple of 4; or add --long 0")
        if args.long < 17:
            raise UserError(f"--long {args.long}: FAR-Long needs 17 frames or more, its window has 16")
        found.append(long_frames(clips(16 * tokens + (args.long - 16) * tokens // 16), args.long, side, args.heads))
    return found


class WarmUp(NamedTuple):
    """A side after its warm-up.

    Attributes:
        side: the side.
        seconds: of one run, which sets the number of runs per timing.
        peak: peak bytes of a run; None where unknown.
        errors: of output and gradients; None where it computes something else.
        backward: whether it has a backward pass.
    """

    side: Side
    seconds: float
    peak: int | None
    errors: tuple[float, float | None] | None
    backward: bool = True


def measure_case(
    case: Case,
    dtype: str,
    kernels: Sequence[str],
    rivals: Sequence[str],
    device: torch.device,
    repeats: int,
    minutes: float,
) -> list[Row]:
    """Time all sides in turn; returns a row for each."""
    torch._dynamo.reset()  # FlexAttention is compiled anew for every case, for its very sizes
    inputs = case.draw(device, DTYPES[dtype])
    reference = exact(case, inputs)
    warm: dict[str, WarmUp] = {}
    notes: dict[str, str] = {}
    for name, make in makers(case, inputs, kernels, rivals).items():
        found, notes[name] = attempt(partial(warm_up, make, reference, device), device)
        if found is not None:
            warm[name] = found
    timings = {name: partial(run, one, device) for name, one in warm.items()}
    title = f"{case.name}, {case.frames} frames, {case.clips} x {case.tokens} tokens, {dtype}"
    seconds = interleaved(timings, repeats, minutes, title)
    about = {"case": case.name, "frames": case.frames, "clips": case.clips, "tokens of a clip": case.tokens}
    about |= {"tokens of a frame": case.frame_tokens[-1], "dtype": dtype}
    return [
        about | side_row(name, case, ALLOWED[dtype], warm.get(name), seconds.get(name, {}), notes[name])
        for name in notes
    ]


def makers(case: Case, inputs: Inputs, kernels: Sequence[str], rivals: Sequence[str]) -> dict[str, Callable[[], Side]]:
    """The constructor of each side, by name."""
    found: dict[str, Callable[[], Side]] = {}
    for kernel in kernels:
        found[ours(kernel)] = partial(Ours, case, inputs, kernel)
        if "plain" in rivals and kernel != flex.NAME:
            found[plain(kernel)] = partial(PlainCausal, case, inputs, selection.get_kernel(kernel))
    of_rivals: dict[str, Callable[[Case, Inputs], Side]] = {
        "dense": dense_mask,
        "flex": FlexAttention,
        "flex-flash": partial(FlexAttention, backend="FLASH"),
        "loop": prefix_loop,
    }
    for rival, make in of_rivals.items():
        if rival in rivals:
            found[RIVALS[rival]] = partial(make, case, inputs)
    return found


def ours(kernel: str) -> str:
    return f"ours, {kernel}"


def plain(kernel: str) -> str:
    return f"{PLAIN}, {kernel}"


def warm_up(make: Callable[[], Side], reference: Found, device: torch.device) -> WarmUp:
    """Build a side and run it at least twice."""
    side = make()
    errors: tuple[float, float | None] | None = None
    if isinstance(side, FlexAttention) and device.type == "cpu":
        errors = (error(side.forward(), reference.out), None)
        return WarmUp(side, timed(side.forward, device), None, errors, backward=False)
    found = side.found()
    if found is not None:
        of_gradients = torch.tensor([error(*pair) for pair in zip(found[1:], reference[1:], strict=True)])
        errors = error(found.out, reference.out), float(of_gradients.max())  # NaN where one is
    del found  # or its memory would be in use before the peak
    peak = peak_beyond(side.both, device)
    return WarmUp(side, timed(side.both, device), peak, errors)


def run(warm: WarmUp, device: torch.device) -> dict[str, float]:
    """Seconds of forward and backward, and of the forward alone."""
    times = max(1, min(100, round(ENOUGH / warm.seconds)))

    def repeated(function: Callable[[], object]) -> float:
        def several() -> None:
            for _ in range(times):
                function()

        return timed(several, device) / times

    forward = {"forward": repeated(warm.side.forward)}
    return {"both": repeated(warm.side.both)} | forward if warm.backward else forward


def side_row(
    name: str, case: Case, allowed: float, warm: WarmUp | None, seconds: dict[str, list[float]], note: str
) -> Row:
    medians = {part: statistics.median(taken) for part, taken in seconds.items()}
    row: Row = {"side": name}
    row |= {"ms": _thousand(medians.get("both")), "ms forward": _thousand(medians.get("forward")), "TFLOP/s": None}
    if warm is not None and "both" in medians:
        flops = case.flops(warm.side.pairs, FORWARD_PRODUCTS + BACKWARD_PRODUCTS)
        row["TFLOP/s"] = flops / medians["both"] / 1e12
    errors = None if warm is None else warm.errors
    row["peak MB"] = None if warm is None or warm.peak is None else warm.peak / 1e6
    row["error"], row["error of gradients"] = (None, None) if errors is None else errors
    row["right"] = None if errors is None else all(x <= allowed for x in errors if x is not None)
    row |= {"pairs": None if warm is None else warm.side.pairs, "repeats": len(seconds.get("forward", ()))}
    return row | {"note": note, "seconds": seconds}


def _thousand(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def ratio_row(rows: Sequence[Row], kernel: str) -> Row:
    """Speed of ours on this kernel relative to the case's other sides, by medians."""
    by_side = {row["side"]: row for row in rows}
    own = by_side[ours(kernel)]
    row = {name: own[name] for name in ("case", "frames", "clips", "tokens of a frame", "dtype")} | {"kernel": kernel}
    for name in (DENSE, LOOP, FLEX):
        row[name] = _ratio(by_side.get(name), own, "ms")
        if name == FLEX:
            row[f"{name}, forward"] = _ratio(by_side.get(name), own, "ms forward")
    limit = _ratio(by_side.get(plain(kernel)), own, "ms")
    if limit is not None:
        limit *= own["pairs"] / by_side[plain(kernel)]["pairs"]  # a whole number of tokens comes close, not quite there
    return row | {PLAIN: limit}


def _ratio(rival: Row | None, own: Row, column: str) -> float | None:
    return None if rival is None or rival[column] is None or own[column] is None else rival[column] / own[column]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure frame-block causal attention against its rivals.")
    parser.add_argument("--frames", type=count, nargs="+", help="of a clip (default: 16 to 300; on a CPU 16 and 64)")
    parser.add_argument("--tokens", type=count, nargs="+", help="of a frame (default: 64 and 256; on a CPU 64)")
    parser.add_argument("--long", type=int, default=300, help="frames of a FAR-Long's clip, 0: none (default: 300)")
    parser.add_argument("--heads", type=count, default=12, help="default: %(default)s")
    parser.add_argument("--clips", type=count, help="default: as many as have 32,768 tokens on a GPU, 1 on a CPU")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="default: bf16; on a CPU both")
    parser.add_argument("--kernels", nargs="+", help="default: all that are usable here")
    parser.add_argument(
        "--rivals", nargs="*", choices=tuple(RIVALS), default=DEFAULT_RIVALS, help="default: %(default)s"
    )
    add_measuring(parser, repeats=10, minutes=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
