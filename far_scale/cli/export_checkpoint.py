"""Export a training run's checkpoint as a model directory, or as a file for the official code."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.train.checkpoint.export import export_if_needed, export_official
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint of any ZeRO stage as a model directory or file.")
    source_help = "the run's folder, which has checkpoints/; with --format official also a model directory"
    parser.add_argument("source", type=Path, help=source_help)
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the latest)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which set (default: %(default)s)")
    format_help = "model directory, or a file for the official code (default: %(default)s)"
    parser.add_argument("--format", choices=("model", "official"), default="model", help=format_help)
    parser.add_argument("--out", type=Path, required=True, help="model directory, or .pth file, to write")
    args = parser.parse_args()
    if args.format == "official":
        print(f"{args.out}: {export_official(args.source, args.step, args.weights, args.out)} exported")
        return
    step, is_written = export_if_needed(args.source, args.step, args.weights, args.out)
    result = "exported" if is_written else "exist already and are intact: not written again"
    print(f"{args.out}: {args.weights} weights of step {step} {result}")
