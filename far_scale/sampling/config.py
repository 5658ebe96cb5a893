"""How frames are sampled: `SamplingConfig`, the settings that samplers, evaluation and tools share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from far_scale.config.schema import Grid, SampleSection
from far_scale.model import FARConfig
from far_scale.utils.errors import UserError
from far_scale.utils.rng import MAX_SEED

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class SamplingConfig:
    """How the frames of a clip are sampled.

    Attributes:
        frames: number of frames to predict, F.
        steps: Euler steps per frame, or per clip in a model that is not causal; each runs the model once (on twice the
            batch with guidance).
        guidance: above 1, classifier-free guidance: null + guidance * (conditioned - null); 1, conditioned only
            (or a model without conditions); -1, the null class only.
        seed: determines the noise, with the clip ids.
        context_noise: noise level s of the frames that a new one sees in its window, given and predicted ones: they
            are s * noise + (1 - s) * frame with timestep 1000 s, as in training with `objective.context_noise`; 0 for
            clean frames. Yielded frames and coarse context carry no noise.
        use_cache: keep keys and values of clean frames (see `cache_bytes`); otherwise every step recomputes them. A
            model that is not causal keeps nothing.
        grid: noise levels of the steps (see `euler_sigmas`).
        window_stride: frames by which a full window slides. It is encoded again each time, so a larger stride is
            faster, and new frames see window_stride - 1 fewer fine frames at most.
        context_frames: maximum coarse context frames, of which the oldest are dropped; None for no maximum.
    """

    frames: int
    steps: int
    guidance: float = 1.0
    seed: int = 0
    context_noise: float = 0.0
    use_cache: bool = True
    grid: Grid = "official"
    window_stride: int = 1
    context_frames: int | None = None

    @staticmethod
    def from_section(section: SampleSection, frames: int, seed: int) -> SamplingConfig:
        """The settings of a recipe's `sample` section."""
        return SamplingConfig(
            frames,
            section.steps,
            section.guidance,
            seed,
            section.context_noise,
            grid=section.grid,
            window_stride=section.window_stride,
            context_frames=section.context_frames,
        )

    @property
    def conditioned(self) -> bool:
        """Whether actions or labels are needed, if the model has them."""
        return self.guidance != -1

    @property
    def batch_copies(self) -> int:
        """How often each clip is in the model's batch: twice with guidance, for the null class and the condition."""
        return 2 if self.guidance > 1 else 1

    def check(self, model: FARConfig) -> None:
        """Check the settings, by themselves and for a model.

        Raises:
            UserError: a value is out of its range, or the model cannot sample with it.
        """
        if self.frames < 1:
            raise UserError(f"frames={self.frames}: at least 1 is needed")
        if not 1 <= self.steps <= TRAIN_TIMESTEPS:
            raise UserError(f"steps={self.steps}: 1 to {TRAIN_TIMESTEPS} Euler steps per frame are possible")
        check_guidance(model, self.guidance)
        check_context_noise(model, self.context_noise)
        check_window_stride(model, self.window_stride)
        if self.context_frames is not None and self.context_frames < 0:
            raise UserError(f"context_frames={self.context_frames}: 0 or more are possible")
        if self.context_frames is not None and not self.use_cache and model.context_patch:
            raise UserError(
                f"context_frames={self.context_frames}: dropped frames live on in the keys and values of later ones, "
                "so this needs the cache; leave context_frames out, or sample with the cache"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed: {self.seed} must be from 0 to 2^64 - 1")


def check_guidance(model: FARConfig, guidance: float) -> None:
    """Raises UserError for a guidance that has no meaning, or that the model cannot use."""
    if guidance != 1 and guidance != -1 and not 1 < guidance < math.inf:
        raise UserError(f"guidance: {guidance:g} has no meaning; give 1 (none), more than 1, or -1 (null class only)")
    if guidance != 1 and not (model.actions or model.labels):
        raise UserError(f"guidance: {guidance:g} needs a model with actions or labels, and this one has none; give 1")


def check_window_stride(model: FARConfig, stride: int) -> None:
    """Raises UserError for a stride that is not from 1 to the model's window."""
    if not 1 <= stride <= model.window:
        raise UserError(f"window_stride: {stride} is not from 1 to the model's window of {model.window} frames")
    if stride > 1 and not model.causal:
        raise UserError(f"window_stride: {stride}, but this model is not causal and its window never slides; give 1")


def check_context_noise(model: FARConfig, context_noise: float) -> None:
    """Raises UserError for a context noise that is out of range or that the model cannot use."""
    if not 0 <= context_noise < 1:
        raise UserError(f"context_noise: {context_noise:g} is not a noise level; it must be at least 0 and below 1")
    if context_noise and not model.causal:
        raise UserError(
            f"context_noise: {context_noise:g}, but this model is not causal and sees no finished frames; give 0"
        )
