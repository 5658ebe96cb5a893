"""Seconds of a step from its work, linear and fitted to measured steps: no unit of work can take negative time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from far_scale.distributed.ledger import Entry
from far_scale.model import FARConfig
from far_scale.model.layout import FrameLayout
from far_scale.train.costs import attention_flops, forward_flops
from far_scale.train.planner.memory import keeps_attention


@dataclass(frozen=True)
class Work:
    """The work of a rank in a step.

    Attributes:
        products: floating-point operations of matrix products, recomputation included.
        attention: those of attention.
        elements: numbers that go through the layers' elementwise operations: tokens x channels x layers and passes.
        layers: layers x packs: what is launched.
        state: float32 numbers that the optimizer updates.
        within, between: bytes that the rank sends in its node and to other nodes.
        step: 1, for what every step takes.
    """

    products: float
    attention: float
    elements: float
    layers: float
    state: float
    within: float = 0.0
    between: float = 0.0
    step: float = 1.0


COMMUNICATION = ("within", "between")
_NAMES = tuple(field.name for field in fields(Work))


def pack_work(
    config: FARConfig, layout: FrameLayout, checkpointing: str, flex: bool, sequence_parallel: int = 1
) -> Work:
    """The work of a rank on a pack, forward and backward, without the optimizer.

    Args:
        config: the model's shape.
        layout: of the pack.
        checkpointing: as in train.activation_checkpointing.
        flex: whether attention is FlexAttention.
        sequence_parallel: ranks that share the pack, evenly.
    """
    attention = attention_flops(config, layout) / sequence_parallel
    products = forward_flops(config, layout) / sequence_parallel - attention
    product_passes = 3 if checkpointing == "none" else 4
    keeps = checkpointing == "attention-kept" and keeps_attention("attention-kept", flex)
    return Work(
        products=product_passes * products,
        attention=(3 if checkpointing == "none" or keeps else 4) * attention,
        elements=product_passes * config.layers * layout.tokens * config.width / sequence_parallel,
        layers=config.layers,
        state=0.0,
        step=0.0,
    )


def update_work(sizes: Sequence[int], zero_stage: int, collectives: Sequence[Entry], ranks: int) -> Work:
    """What a rank does once a step: the optimizer, and the collectives of the whole step.

    Args:
        sizes: elements of each parameter.
        zero_stage: of ZeRO.
        collectives: of a step, for one rank.
        ranks: number of ranks.
    """
    return Work(
        products=0.0,
        attention=0.0,
        elements=0.0,
        layers=0.0,
        state=sum(sizes) / (ranks if zero_stage else 1),
        within=sum(entry.within for entry in collectives),
        between=sum(entry.between for entry in collectives),
    )


def sum_work(parts: Sequence[Work]) -> Work:
    """The sum of several parts of a step."""
    return Work(**{name: sum(getattr(part, name) for part in parts) for name in _NAMES})


def scaled_work(work: Work, factor: float) -> Work:
    """`factor` times `work`."""
    return Work(**{name: factor * getattr(work, name) for name in _NAMES})


def fit_seconds(works: Sequence[Work], seconds: Sequence[float]) -> dict[str, float]:
    """The seconds of each unit of work, none negative, that predict the measured steps best.

    Least squares of the relative errors. With so few kinds of work all subsets of them are tried: the best solution
    without a negative number is that of non-negative least squares.

    Args:
        works: of the measured steps.
        seconds: of each.

    Returns:
        By the name of the work; kinds that no step has are left out.
    """
    names = [name for name in _NAMES if any(getattr(work, name) for work in works)]
    rows = np.array([[getattr(work, name) for name in names] for work in works])
    rows = rows / np.array(seconds)[:, None]  # each should give 1
    scale = rows.max(axis=0)
    best, best_error = np.zeros(len(names)), float("inf")
    for size in range(1, min(len(names), len(works)) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            part = rows[:, chosen] / scale[list(chosen)]
            solution: NDArray[np.float64] = np.linalg.lstsq(part, np.ones(len(works)), rcond=None)[0]
            error = float(np.square(part @ solution - 1).sum())
            if (solution >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(len(names)), error
                best[list(chosen)] = solution / scale[list(chosen)]
    return {name: float(value) for name, value in zip(names, best, strict=True)}


def predict_seconds(coefficients: Mapping[str, float], work: Work) -> float:
    """Seconds of a step; work of kinds that were not measured takes none."""
    return float(sum(coefficients.get(name, 0.0) * value for name, value in asdict(work).items()))
