"""The learning rate of a step: a pure function, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from far_scale.config.schema import OptimizerSection


def learning_rate(optimizer: OptimizerSection, total_steps: int, step: int) -> float:
    """The learning rate of step `step` (the first is 0): linear warm-up, then constant or a half cosine.

    The first step of the warm-up has 1/warmup of the full rate; the cosine falls from the end of the warm-up to
    `final_factor` of the full rate at the last of `total_steps`.
    """
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    progress = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return optimizer.learning_rate * (optimizer.final_factor + (1 - optimizer.final_factor) * cosine)
