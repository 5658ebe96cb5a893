"""The tiny models and inputs whose velocities by the official code lie in tests/recorded/official.

benchmarks/record_official.py runs the official code on them and writes those files; test_official.py compares.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from far_scale.model import FARConfig

RECORDED = Path(__file__).parents[1] / "recorded" / "official"
CLIPS = 2


@dataclass(frozen=True)
class Case:
    """A recorded model: its config, the latent's height and width, and the frame counts run through it."""

    config: FARConfig
    size: tuple[int, int]
    frames: tuple[int, ...]


CASES = {
    "far": Case(FARConfig(2, 1, channels=4), (2, 3), (1, 5)),
    "far_action": Case(FARConfig(2, 1, channels=4, actions=3), (4, 3), (5,)),
    "far_label": Case(FARConfig(3, 2, channels=8, labels=5), (2, 2), (4,)),
    "far_patch": Case(FARConfig(2, 1, channels=4, patch=2), (4, 6), (4,)),
    "long_action": Case(FARConfig(3, 2, channels=4, window=4, actions=3, context_patch=4), (8, 12), (3, 4, 5, 9)),
    "long": Case(FARConfig(2, 1, channels=4, window=4, context_patch=2), (4, 6), (8,)),
    "long_patch": Case(FARConfig(2, 1, channels=4, patch=2, window=3, context_patch=4), (8, 4), (6,)),
}


class InFloat64(TorchFunctionMode):
    """While it is active, what a model computes in float32 by name (`x.float()`, `dtype=torch.float32`) is float64.

    Both codes compute the sinusoids of the timestep in float32 whatever the weights are. A timestep of 1000 makes
    angles of up to 1000 radians, so one rounding more or less moves a sinusoid by 5e-5 and a velocity by as much: two
    CPUs differ by more than any two right models should.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return function(*map(_wider, args), **named)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def drawn(name: str, shape: Sequence[int], std: float = 1.0) -> torch.Tensor:
    """Uniform float32 numbers of std `std`, by a counter-based generator keyed by the name: the same anywhere."""
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    centred = ((raw >> 40).astype(np.int64) - 2**23).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(centred * np.float32(std * 12**0.5)).reshape(*shape)


def recorded_shapes(name: str) -> dict[str, list[int]]:
    """The names and shapes of a case's official state dict."""
    with safe_open(RECORDED / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["shapes"])


def official_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """An official state dict: every tensor drawn with std 0.08, around 1 where it is a norm's weight."""
    return {
        name: drawn(name, shape, 0.08) + (1.0 if ".norm_" in name else 0.0) for name, shape in sorted(shapes.items())
    }


def inputs(case: Case, frames: int) -> dict[str, torch.Tensor]:
    """`[B, F, ...]`: latents, timesteps of which context frames and some others are clean, actions or labels."""
    config = case.config
    key = f"{frames} frames"
    timesteps = ((drawn(f"timesteps of {key}", (CLIPS, frames), 12**-0.5) + 0.5) * 1000).floor()
    timesteps[0, frames // 2] = -1
    if config.context_patch:
        timesteps[:, : max(0, frames - config.window)] = -2
    values = {
        "latents": drawn(f"latents of {key}", (CLIPS, frames, config.channels, *case.size)),
        "timesteps": timesteps,
    }
    if config.actions:  # the null class as well
        values["actions"] = torch.arange(CLIPS * frames).reshape(CLIPS, frames) * 5 % (config.actions + 1)
    if config.labels:
        values["labels"] = torch.tensor([1, config.labels])
    return values


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key
