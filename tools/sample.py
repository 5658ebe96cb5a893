"""Sample new frames from a model directory: tools/sample.py MODEL_DIR --videos PATH --given 4 --frames 12 --out DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.data.shards import ShardSet
from far_scale.errors import command_line
from far_scale.sampling.evaluate import evaluate, load_for_sampling


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Predict frames of recorded episodes and show them beside the truth.")
    parser.add_argument("model_dir", type=Path, help="model directory, as tools/export_checkpoint.py writes it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", type=Path, help="video or npz file, or a folder of them")
    source.add_argument("--shards", type=Path, help="shard set of the model's autoencoder")
    parser.add_argument("--given", type=int, default=4, help="frames given of each episode (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=12, help="frames to predict (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="Euler steps a frame (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="1: conditioned; above 1: guided; -1: unconditional (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=4, help="how many episodes at most (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for samples.mp4, samples.png and metrics.json")
    args = parser.parse_args()

    model, card = load_for_sampling(args.model_dir)
    report = evaluate(
        model,
        card,
        ShardSet.open(args.shards) if args.shards else args.videos,
        given=args.given,
        frames=args.frames,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        episodes=args.episodes,
        out=args.out,
    )
    print(f"{len(report['episodes'])} episodes, {args.frames} new frames each: {args.out}/samples.png and samples.mp4")
    if report["truth"] is None:
        print("no metrics: they need a given frame, and the frames that really followed in every episode")
        return
    for name in ("prediction", "repeat_last"):
        print(f"{name:12} PSNR {report[name]['psnr']:6.2f} dB   SSIM {report[name]['ssim']:.4f}   ({report['truth']})")


if __name__ == "__main__":
    main()
