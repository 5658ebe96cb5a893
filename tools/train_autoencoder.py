#!/usr/bin/env python
"""Train the demo's autoencoder by a recipe: records its own episodes, trains, writes the weights and their card."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from far_scale.errors import command_line
from far_scale.train.autoencoder import load_autoencoder_recipe, train_autoencoder


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("recipe", help="such as recipes/autoencoder_compact.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"), help="folder for the weights and card")
    parser.add_argument("--episodes", type=Path, default=Path("runs/autoencoder/episodes"), help="folder for episodes")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that record")
    arguments = parser.parse_args()
    recipe = load_autoencoder_recipe(arguments.recipe)
    command = f"python tools/train_autoencoder.py {arguments.recipe} --out {arguments.out}"
    path = train_autoencoder(recipe, arguments.out, arguments.episodes, max(1, arguments.workers), command)
    card = json.loads(path.with_suffix(".json").read_text())
    print(f"{path}: {card['psnr_db']} dB on held-out episodes, scaling factor {card['scaling_factor']:.4f}")


if __name__ == "__main__":
    main()
