"""Export a training run's checkpoint as a model directory: tools/export_checkpoint.py RUN --out DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.convert.zero import export
from far_scale.errors import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint of any ZeRO stage as a model directory.")
    parser.add_argument("run", type=Path, help="the run's folder, with checkpoints/ in it")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the latest)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which set (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    args = parser.parse_args()
    step = export(args.run, args.step, args.weights, args.out)
    print(f"{args.out}: {args.weights} weights of step {step} exported")


if __name__ == "__main__":
    main()
