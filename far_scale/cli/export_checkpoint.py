"""Export a training run's checkpoint as a model directory, or as a file for the official code."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from far_scale.train.checkpoint.export import export_if_needed, export_official
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint of any ZeRO stage as a model directory or file.")
    source_help = "the run's folder, with checkpoints/; with --format official also a model directory, or org/name"
    parser.add_argument("source", type=Path, help=source_help)
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the latest)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which set (default: %(default)s)")
    format_help = "model directory, or a file for the official code (default: %(default)s)"
    parser.add_argument("--format", choices=("model", "official"), default="model", help=format_help)
    dtype_help = "of a model directory's weights; other types than float32 round them (default: %(default)s)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=dtype_help)
    parser.add_argument("--out", type=Path, required=True, help="model directory, or .pth file, to write")
    args = parser.parse_args()
    if args.format == "official":
        if args.dtype != "float32":
            parser.error("--dtype is for model directories; leave it out with --format official")
        print(f"{args.out}: {export_official(args.source, args.step, args.weights, args.out)} exported")
        return
    dtype: torch.dtype = getattr(torch, args.dtype)
    step, is_written = export_if_needed(args.source, args.step, args.weights, args.out, dtype)
    result = "exported" if is_written else "exist already and are intact: not written again"
    print(f"{args.out}: {args.weights} weights of step {step} {result}")
