"""Time of a frame of `far-scale play`: model, decoder and engine apart, over a walk.

    python benchmarks/play.py MODEL

A walk of random actions begins as on the page; its first frame is left out, since it also encodes the given frames.
The model's time includes what comes when the window slides, which is the rarer and slower kind of frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from measure import Row, environment, print_table, write_result
from options import count

from far_scale.play.headless import open_walk
from far_scale.play.walk import ShownFrame
from far_scale.play.world import World, open_world
from far_scale.utils.command_line import command_line
from far_scale.utils.rng import generator

SEED = 60_000


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds of a frame of far-scale play, model and decoder apart.")
    parser.add_argument("model_dir", type=Path, nargs="+", help="model directories")
    parser.add_argument("--steps", type=count, nargs="+", default=[8], help="Euler steps per frame (default: 8)")
    parser.add_argument("--guidance", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--frames", type=count, default=300, help="of a walk (default: %(default)s)")
    parser.add_argument("--threads", type=count, nargs="+", default=[1, 2], help="torch threads (default: 1 2)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    args = parser.parse_args()
    rows: list[Row] = []
    for folder in args.model_dir:
        for threads in args.threads:
            world = open_world(folder, None, threads)
            rows += [walk_row(world, steps, args.guidance, args.frames) for steps in args.steps]
    device = next(world.model.parameters()).device
    facts = environment(device, {"guidance": f"{args.guidance:g}", "frames of a walk": str(args.frames)})
    title = "Milliseconds of a frame"
    print_table(title, rows)
    print(f"\n{write_result(args.out, 'play', facts, {title: rows})}")


def walk_row(world: World, steps: int, guidance: float, frames: int) -> Row:
    """A walk of random actions."""
    walk, draw = open_walk(world, SEED), generator(SEED, "benchmark walk")
    actions = draw.integers(len(world.inputs), size=frames + 1).tolist()
    shown: list[ShownFrame] = [walk.act(action, steps, guidance) for action in actions][1:]
    walk.close()
    model = np.array([frame.model_ms for frame in shown])
    decoder = np.array([frame.decoder_ms for frame in shown])
    both = model + decoder
    return {
        "model": world.name,
        "threads": world.threads,
        "steps": steps,
        "model p50": percentile(model, 50),
        "model p95": percentile(model, 95),
        "decoder p50": percentile(decoder, 50),
        "decoder p95": percentile(decoder, 95),
        "both p50": percentile(both, 50),
        "both p95": percentile(both, 95),
        "engine p50": percentile(np.array([frame.engine_ms for frame in shown]), 50),
        "cache MB": shown[-1].cache_bytes / 1e6,
        "model ms": model.round(2).tolist(),
        "decoder ms": decoder.round(2).tolist(),
    }


def percentile(values: np.ndarray, percent: float) -> float:
    return float(np.percentile(values, percent))


if __name__ == "__main__":
    main()
