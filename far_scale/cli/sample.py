"""Predict the continuation of videos: tools/sample.py MODEL --context VIDEO|SHARDS --frames N --out video.mp4."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from far_scale.config.schema import Grid
from far_scale.evaluation.rollouts.runner import load_for_sampling, prepare_rollout, write_rollout
from far_scale.sampling.config import SamplingConfig
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError
from far_scale.utils.io import check_writable


def mp4(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".mp4":
        raise UserError(f"--out {text}: is the video to write, so it must end in .mp4")
    return path


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Predict the continuation of episodes, and show it beside the truth.")
    model_help = "model directory, as tools/export_checkpoint.py writes it, or org/name of the hub"
    parser.add_argument("model_dir", type=Path, help=model_help)
    parser.add_argument(
        "--context", type=Path, required=True, help="video or npz file, a folder of them, or a shard set's folder"
    )
    parser.add_argument(
        "--given",
        type=int,
        help="frames given of each episode, from its start (default: the model's window; in a shorter episode what "
        "--frames leaves of it, but at least 1)",
    )
    parser.add_argument("--frames", type=int, default=12, help="frames to predict (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="Euler steps per frame (default: %(default)s)")
    parser.add_argument(
        "--grid",
        choices=get_args(Grid),
        default="official",
        help="noise levels of the steps: as in the official code, or from 1 to 0 in equal parts, which is better for "
        "few steps (default: %(default)s)",
    )
    parser.add_argument(
        "--window-stride",
        type=int,
        default=1,
        metavar="K",
        help="frames by which a full window slides; half the window is several times as fast (default: %(default)s)",
    )
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="1: conditioned; above 1: guided; -1: unconditional (default: 1)"
    )
    parser.add_argument(
        "--context-noise",
        type=float,
        default=0.0,
        metavar="S",
        help="noise level of the frames that a new one sees, for a model trained so (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=4, help="how many episodes at most (default: %(default)s)")
    parser.add_argument(
        "--out", type=mp4, required=True, help="video.mp4; video.png and video.json are written beside it"
    )
    args = parser.parse_args()

    for suffix in (".mp4", ".png", ".json"):
        check_writable(args.out.with_suffix(suffix))
    model, metadata = load_for_sampling(args.model_dir)
    sampling = SamplingConfig(
        args.frames,
        args.steps,
        args.guidance,
        args.seed,
        args.context_noise,
        grid=args.grid,
        window_stride=args.window_stride,
    )
    rollout = prepare_rollout(model, metadata, args.context, sampling, args.given, args.episodes)
    print(f"{args.model_dir}: {rollout.summary()}", flush=True)
    report = write_rollout(rollout, args.out)
    print(f"{args.out}, with {args.out.stem}.png and {args.out.stem}.json")
    if report["truth"] is None:
        print("no metrics: they need a given frame and a known truth")
        return
    print(f"against the {report['truth']} of {report['truth_frames']} frames:")
    for name in ("prediction", "repeat_last"):
        print(f"  {name:12} PSNR {report[name]['psnr']:6.2f} dB   SSIM {report[name]['ssim']:.4f}")
