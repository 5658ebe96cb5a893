"""Report on a run: its page, and its exported model on held-out episodes.

tools/report_run.py RUN                                             RUN/report.html
tools/report_run.py RUN --model DIR --videos PATH --out DIR         samples, pictures and metrics.json, too
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from far_scale.evaluation.rollouts.loss_curve import validation_losses
from far_scale.evaluation.rollouts.run_report import report_run
from far_scale.evaluation.run_page.page import write_page
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError, print_warning


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write report.html into a run directory, also while the run goes or after it has died. With "
        "--model, --videos and --out, sample by the run's recipe as well, and draw samples and loss curve."
    )
    parser.add_argument("run", type=Path, help="the run's folder, with recipe.yaml and log.jsonl in it")
    parser.add_argument("--model", type=Path, help="the model directory exported from the run")
    parser.add_argument("--videos", type=Path, help="held-out videos: a file, a folder of them, or a shard set")
    parser.add_argument("--out", type=Path, help="folder for samples, pictures and metrics.json")
    args = parser.parse_args()
    options = {"--model": args.model, "--videos": args.videos, "--out": args.out}
    missing = [name for name, value in options.items() if value is None]
    if 0 < len(missing) < len(options):
        raise UserError(f"{', '.join(missing)}: missing; give --model, --videos and --out together, or none of them")
    if missing:
        print(f"page of the run: {write_page(args.run)}")
        return
    try:
        _print_report(args.run, report_run(args.run, args.model, args.videos, args.out))
    finally:  # also for a run with a damaged log, which loss.png refuses
        try:
            print(f"page of the run: {write_page(args.run, args.out)}")
        except UserError as error:  # a run of somebody else
            print_warning(str(error))


def _print_report(run: Path, report: dict[str, Any]) -> None:
    if validations := validation_losses(run / "log.jsonl"):
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
