"""Make a branch of a training run: tools/fork_run.py RUN --step N --out NEW_RUN."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.train.checkpoint.folders import fork
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Make a run directory that resumes from a checkpoint of another run.")
    parser.add_argument("run", type=Path, help="the run directory, with checkpoints/ in it; it is not changed")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the latest)")
    parser.add_argument("--out", type=Path, required=True, help="the new run directory, which must not exist")
    args = parser.parse_args()
    fork(args.run, args.step, args.out)
    print(f"train it: python -m far_scale.train {args.out / 'recipe.yaml'} [key=value ...] [--accept-changes]")
