"""Import official weights: tools/import_checkpoint.py FILE --out DIR, or of a DC-AE --out NAME.safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from far_scale.convert.dc_ae import import_autoencoder, is_autoencoder
from far_scale.convert.official import import_model
from far_scale.model.presets import describe
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Import an official file, of a FAR or FAR-Long model or of a DC-AE: its tensors' names tell which."
    )
    parser.add_argument("file", type=Path, help="official .pth file, an official trainer's ema.pth, or .safetensors")
    parser.add_argument(
        "--window", type=int, default=16, help="window frames; the file has none (default: 16, official)"
    )
    parser.add_argument("--patch", type=int, default=1, help="window patch; the file has none (default: 1, official)")
    parser.add_argument(
        "--shards", type=Path, help="shard set of the model's latents, which sampling needs; else weights alone"
    )
    parser.add_argument(
        "--scaling",
        choices=("factor", "channel"),
        default="factor",
        help="of those latents (default: factor, official)",
    )
    parser.add_argument("--frame-stride", type=int, default=1, help="the model takes every n-th frame (default: 1)")
    out_help = "model directory to write; of a DC-AE the .safetensors file, whose name the autoencoder gets"
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
        print("weights alone: give --shards to sample from it")


if __name__ == "__main__":
    main()
