"""Seconds of training steps that the planner predicts, beside measured ones of shapes that nothing was fitted to.

The shapes are measured in turn, several rounds of them, and medians are taken: a machine is not always equally fast.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

from measure import Row, environment, print_table, write_result
from options import count

from far_scale.config.recipe import load_recipe
from far_scale.distributed.process_group import stop_processes
from far_scale.model import FARConfig
from far_scale.model.attention import choose_kernel
from far_scale.model.layers import HEAD_DIM
from far_scale.train.curriculum import stages
from far_scale.train.deepspeed_adapter import start_deepspeed_processes
from far_scale.train.engine import compute_dtype
from far_scale.train.planner.measure import measure_step
from far_scale.train.planner.time_model import Work, fit_seconds, predict_seconds
from far_scale.utils.command_line import command_line

# Layers, heads, and frames of the clips of a pack; the longest have a context beside their window of 8 frames.
FITTED = [
    (2, 6, (8, 8)),
    (2, 6, (24,)),
    (2, 6, (4,)),
    (2, 3, (8, 8, 8, 8)),
    (2, 3, (40, 8)),
    (2, 3, (4,)),
    (4, 3, (8, 8)),
    (4, 3, (24, 8, 4)),
    (4, 3, (4,)),
]
HELD_OUT = [(6, 4, (16, 8)), (3, 8, (8, 6)), (8, 2, (32, 8, 8)), (5, 5, (12,))]


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=count, default=5, help="default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1, help="default: %(default)s")
    parser.add_argument(
        "--processor-time", action="store_true", help="seconds of the processor, where other programs share a CPU"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    args = parser.parse_args()
    processes = start_deepspeed_processes()
    device = processes.device
    name = "cuda" if device.type == "cuda" else "cpu"
    load = f"{os.getloadavg()[0]:.1f} at the beginning"
    facts = environment(device, {"load average": load, "seconds": "processor" if args.processor_time else "wall clock"})
    keys = ["model.context_patch=4", "model.window=8", "data.frames=8", "model.patch=1", "sample.given=4"]
    # Buffers of the default size take longer to allocate on a CPU than such small models to train.
    keys += ["train.deepspeed.reduce_bucket_size=1000000"] if args.zero_stage else []
    recipe = load_recipe(
        "demo_cpu", [*keys, f"train.precision={args.precision}", f"train.zero_stage={args.zero_stage}"]
    )
    (stage,), train = stages(recipe), recipe.train
    kernel = choose_kernel(train.attention, device, compute_dtype(train), HEAD_DIM).name
    clock = time.process_time if args.processor_time else time.perf_counter
    works: list[Work] = []
    seconds: list[list[float]] = [[] for _ in FITTED + HELD_OUT]
    for number in range(args.rounds):
        works = []
        for shape, times in zip(FITTED + HELD_OUT, seconds, strict=True):
            layers, heads, clips = shape
            config = FARConfig(**{**stage.config.to_dict(), "layers": layers, "heads": heads})
            shaped = replace(stage, config=config)
            sections = (recipe.optimizer, recipe.objective, train)
            work, measured = measure_step(shaped, clips, *sections, args.zero_stage, kernel, processes, clock)
            works.append(work)
            times.append(measured)
        print(f"round {number + 1} of {args.rounds}", flush=True)
    medians = [statistics.median(times) for times in seconds]
    coefficients = fit_seconds(works[: len(FITTED)], medians[: len(FITTED)])
    tables: dict[str, list[Row]] = {"Shapes that were fitted": [], "Shapes that were held out": []}
    for number, (layers, heads, clips) in enumerate(FITTED + HELD_OUT):
        predicted = predict_seconds(coefficients, works[number])
        tables["Shapes that were fitted" if number < len(FITTED) else "Shapes that were held out"].append(
            {
                "layers": layers,
                "heads": heads,
                "frames of the clips": " ".join(map(str, clips)),
                "ms": 1e3 * medians[number],
                "fastest, ms": 1e3 * min(seconds[number]),
                "slowest, ms": 1e3 * max(seconds[number]),
                "predicted, ms": 1e3 * predicted,
                "error, %": 100 * (predicted / medians[number] - 1),
                "each round, ms": [1e3 * each for each in seconds[number]],
            }
        )
    tables["Seconds of a unit of work"] = [{"work": name, "seconds": value} for name, value in coefficients.items()]
    for title, rows in tables.items():
        print_table(title, rows)
    print(f"\n{write_result(args.out, f'planner-{name}-{args.precision}', facts, tables)}")
    stop_processes()


if __name__ == "__main__":
    main()
