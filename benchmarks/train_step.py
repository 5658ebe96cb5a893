"""Our train step in each of its modes, and the official code's beside it.

    python benchmarks/train_step.py [--official PATH_TO_A_CLONE]

See benchmarks/README.md for what is measured and how.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from kernels import ALL, usable
from measure import OUT_OF_MEMORY, Row, commit, environment, print_table, write_result
from official import OfficialCode
from options import DTYPES, add_measuring, count, start
from step_sides import Case, Mode
from steps import measure_case

from far_scale.distributed.process_group import stop_processes
from far_scale.model import FARConfig
from far_scale.model.attention import selection
from far_scale.model.layers import HEAD_DIM
from far_scale.model.presets import PRESETS
from far_scale.train.costs import peak_flops
from far_scale.train.deepspeed_adapter import start_deepspeed_processes
from far_scale.train.engine import check_compiler
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError

MODES = {
    "eager": Mode(),
    "eager,attention-kept": Mode(checkpointing="attention-kept"),
    "eager,full": Mode(checkpointing="full"),
    "compiled": Mode(compiled=True),
    "compiled,attention-kept": Mode(compiled=True, checkpointing="attention-kept"),
    "compiled,full": Mode(compiled=True, checkpointing="full"),
}
DEFAULT_MODES = ("eager", "compiled", "compiled,attention-kept", "compiled,full")
LONG, LONG_WINDOW, LONG_PATCH = "-Long", 16, 4
TITLE = "A training step: seconds, medians"


@command_line
def main() -> None:
    args = arguments()
    device, processes = start(args), None
    if args.whole:
        processes = start_deepspeed_processes()
        if processes.device.type != device.type:
            raise UserError("--whole --device cpu: DeepSpeed takes the GPU; hide it, with CUDA_VISIBLE_DEVICES=")
        device = processes.device
    on_gpu = device.type == "cuda"
    dtype_name = args.dtype or ("bf16" if on_gpu else "fp32")
    dtype = DTYPES[dtype_name]
    layers = args.layers or (None if on_gpu else 4)
    cases = [
        replace(case(shape, layers, args.clips or (16 if on_gpu else 1)), layouts=args.layouts)
        for shape in args.shapes or (("XL:16", "B-Long:300") if on_gpu else ("B:16", "B-Long:300"))
    ]
    modes = [mode for name in args.modes for mode in with_kernels(MODES[name], args.kernels, device, dtype)]
    if any(mode.compiled for mode in modes):
        check_compiler(device)
    code = None if args.official is None else OfficialCode(args.official)
    peak = peak_flops(device, dtype)
    more = {"device": device.type, "dtype": dtype_name, "peak TFLOP/s": f"{peak / 1e12:.4g}", "layouts": args.layouts}
    more["auto"] = selection.choose_kernel("auto", device, dtype, HEAD_DIM).why
    if code is not None:
        more["official commit"] = commit(args.official, "far")
    facts = environment(device, more)

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # an empty one, or the time of compiling would be of earlier runs
        for shape in cases:
            rows += measure_case(shape, modes, code, device, dtype, peak, args.repeats, args.minutes, processes)
            # Each time anew: a case may take long.
            path = write_result(args.out, f"train-step-{device.type}-{dtype_name}", facts, {TITLE: rows})
    print_table(TITLE, rows)
    print(f"\nwritten: {path} and .json", flush=True)
    if processes is not None:
        stop_processes()
    if failed := [row["side"] for row in rows if row["note"] not in ("", OUT_OF_MEMORY)]:
        sys.exit(f"failed: {'; '.join(failed)} (see the column note)")


def case(shape: str, layers: int | None, clips: int) -> Case:
    """A case from PRESET:FRAMES or PRESET-Long:FRAMES, conditioned on actions.

    Args:
        layers: instead of the preset's, if not None.

    Raises:
        UserError: no such preset or number of frames.
    """
    name, _, frames = shape.partition(":")
    preset, long = name.removesuffix(LONG), name.endswith(LONG)
    fewest = LONG_WINDOW + 1 if long else 1
    if preset not in PRESETS or not frames.isdecimal() or int(frames) < fewest:
        raise UserError(
            f"--shapes {shape}: not a preset and at least {fewest} frames, such as XL:16 or B-Long:300; "
            f"the presets are {', '.join(PRESETS)}"
        )
    own_layers, heads = PRESETS[preset]
    window, patch = (LONG_WINDOW, LONG_PATCH) if long else (int(frames), 0)
    config = FARConfig(layers or own_layers, heads, window=window, context_patch=patch, actions=4)
    shortened = f", {config.layers} layers" if config.layers != own_layers else ""
    return Case(f"FAR-{name}{shortened}", config, int(frames), clips)


def with_kernels(mode: Mode, asked: list[str] | None, device: torch.device, dtype: torch.dtype) -> list[Mode]:
    """The mode with each of the requested kernels.

    Raises:
        UserError: a kernel is not usable here, or the environment would replace all of them.
    """
    if asked is None:
        return [mode]
    if os.environ.get(selection.KERNEL_VARIABLE):
        raise UserError(f"--kernels: {selection.KERNEL_VARIABLE} is set and goes before it; unset it")
    names = usable(None if asked == [ALL] else asked, device, dtype)
    return [Mode(mode.compiled, mode.checkpointing, name) for name in names]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure whole training steps.")
    parser.add_argument("--official", type=Path, help="clone of github.com/showlab/FAR, to be measured beside ours")
    parser.add_argument(
        "--shapes",
        nargs="+",
        help="PRESET:FRAMES or PRESET-Long:FRAMES (default: XL:16 B-Long:300 on a GPU, B:16 B-Long:300 on a CPU)",
    )
    parser.add_argument("--layers", type=count, help="instead of the preset's (default: the preset's; on a CPU 4)")
    parser.add_argument("--clips", type=count, help="of a step, on both sides (default: 16 on a GPU, 1 on a CPU)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=DEFAULT_MODES, help="default: %(default)s")
    parser.add_argument("--kernels", nargs="+", help=f"of attention, by name, or {ALL} (default: auto)")
    parser.add_argument(
        "--layouts",
        choices=("same", "varying"),
        default="same",
        help="varying: in each step clips have new numbers of frames, from half of the shape's on (default: same)",
    )
    parser.add_argument(
        "--whole", action="store_true", help="each mode also with DeepSpeed, float32 masters, clipping, guard and EMA"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: bf16 on a GPU, fp32 on a CPU)")
    add_measuring(parser, repeats=10, minutes=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
