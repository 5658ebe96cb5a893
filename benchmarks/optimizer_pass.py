"""From backward to the next forward on one rank, pass by pass: what DeepSpeed does to gradients and weights, and ours.

See benchmarks/README.md for what is measured and how.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from measure import Row, environment, interleaved, print_table, timed, write_result
from options import add_measuring, count, start
from torch import Tensor, nn

from far_scale.model import FAR, FARConfig
from far_scale.model.presets import PRESETS
from far_scale.train.pack_gradients import PackGradients
from far_scale.utils.command_line import command_line

CLIP_NORM, DECAY, LEARNING_RATE = 1.0, 0.9999, 1e-4

Passes = dict[str, tuple[int, Callable[[], Any]]]
"""Bytes that it moves for each parameter, and the pass, by its name."""


class State:
    """Weights and gradients of a model in bf16, masters, moments and EMA in float32, each laid end to end."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        length = sum(sizes)
        self.weights = torch.zeros(length, dtype=torch.bfloat16, device=device)
        self.parameters = [nn.Parameter(part) for part in self.weights.split(sizes)]
        self.gradients = [torch.randn_like(parameter) for parameter in self.parameters]
        self.sums = torch.zeros(length, device=device)
        self.in_sums = self.sums.split(sizes)
        self.master, self.ema, self.exp_avg, self.exp_avg_sq = torch.zeros(4, length, device=device).unbind()
        self.steps = torch.ones((), device=device)
        self.ours = PackGradients(self.parameters, length, torch.bfloat16, packs=1)
        self.ema_weight = torch.tensor(1 - DECAY, device=device)
        self.gradient = self.norm = torch.ones((), device=device)

    def common(self) -> Passes:
        """What all do alike."""
        return {
            "AdamW": (28, self.adam),
            "cast to bf16": (6, lambda: self.weights.copy_(self.master)),
            "EMA": (12, lambda: self.ema.lerp_(self.master, self.ema_weight)),
        }

    def adam(self) -> None:
        torch._fused_adamw_(
            [self.master], [self.gradient], [self.exp_avg], [self.exp_avg_sq], [], [self.steps],
            lr=LEARNING_RATE, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    def measure(self, gradient: Tensor) -> None:
        (self.norm,) = torch._foreach_norm([gradient], 2, torch.float32)

    def zero_1_of_deepspeed(self) -> Passes:
        def add() -> None:
            for total, gradient in zip(self.in_sums, self.gradients, strict=True):
                total.add_(gradient.to(torch.float32))
            self.gradient = self.sums

        def clear() -> None:
            self.sums.zero_()
            self.sums.zero_()

        return {
            "gradients": (18, add),
            "cast for the reduction": (12, lambda: self.sums.copy_(self.sums.to(torch.bfloat16))),
            "norm": (4, lambda: self.measure(self.sums)),
            "clip": (8, lambda: self.sums.mul_((CLIP_NORM / (self.norm + 1e-6)).clamp(max=1))),
            **self.common(),
            "clear": (8, clear),
        }

    def zero_1(self) -> Passes:
        flat, on_cpu = self.ours.flat, self.ours.flat.device.type == "cpu"

        def cast() -> None:
            self.gradient = flat.float() if on_cpu else flat

        def clip() -> None:
            factor = (CLIP_NORM / (self.norm + 1e-6)).clamp(max=1).reshape(1)
            self.gradient = self.gradient.mul_(factor) if on_cpu else torch.mul(self.gradient, factor)

        return {
            "gradients": (4, self.ours.add),
            "cast on a CPU": (6 if on_cpu else 0, cast),
            "norm": (4 if on_cpu else 2, lambda: self.measure(self.gradient)),
            "clip": (8 if on_cpu else 6, clip),
            **self.common(),
            "clear": (0, self.ours.clear),
        }

    def zero_3_of_deepspeed(self) -> Passes:
        return {**self.zero_3(), "gradients": (8, lambda: setattr(self, "gradient", torch.cat(self.in_sums)))}

    def zero_3(self) -> Passes:
        return {
            "norm": (4, lambda: self.measure(self.sums)),
            "gradients": (0, lambda: setattr(self, "gradient", self.sums)),
            "clip": (8, lambda: self.gradient.mul_(1 / ((self.norm + 1e-6) / CLIP_NORM).clamp(min=1))),
            **self.common(),
        }


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=PRESETS, default="XL", help="default: %(default)s")
    parser.add_argument("--layers", type=count, help="of it (default: the model's)")
    add_measuring(parser, repeats=10, minutes=10)
    args = parser.parse_args()
    device = start(args)
    layers, heads = PRESETS[args.model]
    with torch.device("meta"):
        model = FAR(FARConfig(args.layers or layers, heads))
    sizes = [parameter.numel() for parameter in model.parameters()]
    facts = environment(device, {"weights": f"{sum(sizes):,} in {len(sizes)} tensors, one rank, one pack"})
    state = State(sizes, device)
    sides = {
        "ZeRO-1, DeepSpeed's": state.zero_1_of_deepspeed(),
        "ZeRO-1, ours": state.zero_1(),
        "ZeRO-3, DeepSpeed's": state.zero_3_of_deepspeed(),
        "ZeRO-3, ours": state.zero_3(),
    }

    def side(passes: Passes) -> Callable[[], Mapping[str, float]]:
        def run() -> Mapping[str, float]:
            for parameter, gradient in zip(state.parameters, state.gradients, strict=True):
                parameter.grad = gradient
            if "cast for the reduction" not in passes:  # there the gradients are added to zeros
                state.sums.normal_()
            return {name: timed(function, device) for name, (_, function) in passes.items()}

        return run

    with torch.no_grad():
        runs = {name: side(passes) for name, passes in sides.items()}
        for run in runs.values():
            run()  # the first loads kernels
        taken = interleaved(runs, args.repeats, args.minutes, "updates")
    rows: list[Row] = []
    for name, passes in sides.items():
        seconds = {what: statistics.median(taken[name][what]) for what in passes}
        moved = {what: size for what, (size, _) in passes.items()}
        seconds["all"], moved["all"] = sum(seconds.values()), sum(moved.values())
        for what, second in seconds.items():
            row = {"side": name, "pass": what, "ms": 1e3 * second, "bytes a parameter": moved[what]}
            rows.append({**row, "GB/s": moved[what] * sum(sizes) / second / 1e9, "all": taken[name].get(what, [])})
    title = "From backward to the next forward in bf16, medians"
    print_table(title, rows)
    print(f"\n{write_result(args.out, 'optimizer-pass', facts, {title: rows})}")


if __name__ == "__main__":
    main()
