"""Evaluate a run's exported model on held-out episodes: tools/report_run.py RUN --model DIR --videos PATH --out DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.evaluation.rollouts.loss_curve import validation_losses
from far_scale.evaluation.rollouts.run_report import report_run
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Sample by the run's recipe, and draw samples and loss curve.")
    parser.add_argument("run", type=Path, help="the run's folder, with recipe.yaml and log.jsonl in it")
    parser.add_argument("--model", type=Path, required=True, help="the model directory exported from the run")
    parser.add_argument(
        "--videos", type=Path, required=True, help="held-out videos: a file, a folder of them, or a shard set"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for samples, pictures and metrics.json")
    args = parser.parse_args()
    report = report_run(args.run, args.model, args.videos, args.out)
    if validations := validation_losses(args.run / "log.jsonl"):
        step, losses = list(validations.items())[-1]
        names = {"weights": "weights", "ema": "EMA"}
        values = ", ".join(f"{names[key]} {loss:.4f}" for key, loss in losses.items())
        print(f"last validation, after step {step}: loss {values}")
    print(f"{len(report['episodes'])} held-out episodes, {report['given']} frames given, {report['frames']} predicted:")
    if report["truth"] is None:
        print("  no metrics: they need a given frame and a known truth")
        return
    for key, name in (("prediction", "prediction"), ("repeat_last", "repeat the last given frame")):
        print(f"  {name:28} PSNR {report[key]['psnr']:6.2f} dB   SSIM {report[key]['ssim']:.4f}")
