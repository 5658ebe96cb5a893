"""Import official weights: a FAR or FAR-Long model as a model directory, or a DC-AE as NAME.safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.convert.dc_ae import import_autoencoder, is_autoencoder
from far_scale.convert.official import import_model
from far_scale.model.presets import describe
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    description = "Import an official file of a FAR or FAR-Long model or of a DC-AE; tensor names identify which it is."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", type=Path, help="official .pth file, an official trainer's ema.pth, or .safetensors")
    window_help = "window frames, not in the file (default: 16, official)"
    parser.add_argument("--window", type=int, default=16, help=window_help)
    parser.add_argument("--patch", type=int, default=1, help="window patch, not in the file (default: 1, official)")
    shards_help = "shard set of the model's latents, needed for sampling; otherwise only weights are imported"
    parser.add_argument("--shards", type=Path, help=shards_help)
    scaling_help = "of those latents (default: factor, official)"
    parser.add_argument("--scaling", choices=("factor", "channel"), default="factor", help=scaling_help)
    parser.add_argument("--frame-stride", type=int, default=1, help="the model takes every n-th frame (default: 1)")
    out_help = "model directory to write; for a DC-AE the .safetensors file, whose stem names the autoencoder"
    parser.add_argument("--out", type=Path, required=True, help=out_help)
    args = parser.parse_args()
    if is_autoencoder(args.file):
        for option in ("window", "patch", "shards", "scaling", "frame_stride"):
            if getattr(args, option) != parser.get_default(option):
                parser.error(f"--{option.replace('_', '-')} is for FAR models, and {args.file} holds a DC-AE")
        preset = import_autoencoder(args.file, args.out)
        print(f"{args.out}: DC-AE {preset}, named {args.out.stem}")
        return
    config = import_model(args.file, args.out, args.window, args.patch, args.shards, args.scaling, args.frame_stride)
    print(f"{args.out}: {describe(config)}")
    if args.shards is None:
        print("only weights: give --shards to sample from it")
