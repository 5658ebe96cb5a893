"""The official FAR code and ours in one process, on the same random weights: the same numbers, and how much faster.

    python benchmarks/against_official.py --official PATH_TO_A_CLONE

See benchmarks/README.md for what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Row, commit, environment, print_table, write_result
from official import OfficialCode
from options import DTYPES, add_measuring, count, start
from parity import holds, parity
from step_sides import Case, Mode
from steps import measure_case

from far_scale.model import FARConfig
from far_scale.train.costs import peak_flops
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError
from sampling import sample

PARTS = ("parity", "train", "sample")


@command_line
def main() -> None:
    args = arguments()
    device = start(args)
    if device.type == "cpu" and args.dtype == "bf16":
        raise UserError("--dtype bf16: is measured on a GPU only; leave it away, or add --device cuda")
    code = OfficialCode(args.official)
    more = {"official commit": commit(args.official, "far"), "device": device.type, "dtype": args.dtype}
    facts = environment(device, more)

    agrees = True
    for part in [args.only] if args.only else PARTS:
        name = f"against-official-{part}-{args.layers}x{args.heads}-{device.type}-{args.dtype}"
        for tables in measure(part, code, args, device):
            path = write_result(args.out, name, facts, tables)  # each time anew: a part may take hours
        for title, rows in tables.items():
            print_table(title, rows)
        print(f"\nwritten: {path} and .json", flush=True)
        agrees = agrees and (part != "parity" or holds(tables))
    if not agrees:
        sys.exit("the two codes differ by more than is allowed")


def measure(
    part: str, code: OfficialCode, args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, list[Row]]]:
    """The tables of one part, by title, whenever a row was added."""
    size, dtype, often = (args.layers, args.heads), DTYPES[args.dtype], (args.repeats, args.minutes)
    if part == "parity":
        yield parity(code, *size, device)
    elif part == "train":
        yield from train(code, *size, device, dtype, *often)
    else:
        yield from sample(code, *size, args.frames, args.steps, device, dtype, *often)


def train(
    code: OfficialCode, layers: int, heads: int, device: torch.device, dtype: torch.dtype, repeats: int, minutes: float
) -> Iterator[dict[str, list[Row]]]:
    """The table of training steps of one clip, after each of its cases."""
    short = FARConfig(layers, heads, window=16, actions=4)
    wide = FARConfig(layers, heads, window=64, actions=4)
    long = FARConfig(layers, heads, window=16, context_patch=4, actions=4)
    peak, rows = peak_flops(device, dtype), []
    for case in (Case("FAR", short, 16), Case("FAR, window 64", wide, 64), Case("FAR-Long", long, 300)):
        rows += measure_case(case, [Mode()], code, device, dtype, peak, repeats, minutes)
        yield {"Seconds of a training step, batch 1, medians": rows}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the official FAR code and ours side by side.")
    parser.add_argument("--official", type=Path, required=True, help="clone of github.com/showlab/FAR")
    parser.add_argument("--only", choices=PARTS, help="one part (default: all three)")
    parser.add_argument("--layers", type=count, default=12, help="of the models (default: %(default)s, FAR-B)")
    parser.add_argument("--heads", type=count, default=12, help="of the models (default: %(default)s, FAR-B)")
    parser.add_argument(
        "--frames", type=count, nargs="+", default=[16, 64, 128, 256], help="to sample (default: all four)"
    )
    parser.add_argument("--steps", type=count, default=25, help="Euler steps a sampled frame (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of train and sample (default: fp32)")
    add_measuring(parser, repeats=5, minutes=30, device="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
