"""Clips to samples: what the model predicts, as uint8 frames with the given ones before them.

shape letters   B clips   S samples (trajectories) of a clip   G/F given frames, and with predicted ones
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelMetadata
from far_scale.data.video.transforms import to_pixels
from far_scale.evaluation.clips import Clip
from far_scale.evaluation.protocol import Protocol
from far_scale.model import FAR, FARConfig
from far_scale.sampling.sampler import predict_frames
from far_scale.utils.errors import UserError

Pixels = NDArray[np.uint8]

_FRAMES_AT_ONCE = 32  # through the autoencoder; fixed, since another batch size may round differently


class FrameCoder:
    """The autoencoder between uint8 frames and latents, by a protocol's rules."""

    def __init__(self, autoencoder: Autoencoder, protocol: Protocol) -> None:
        self._autoencoder, self._round_down = autoencoder, protocol.frames.rounding == "down"

    def truth(self, clip: Clip) -> Pixels:
        """What the clip really shows, `[F, h, w, 3]`: its frames, or its latents decoded."""
        if clip.frames is not None:
            if clip.frames.dtype == np.uint8:
                return clip.frames
            return self._to_uint8(torch.from_numpy(clip.frames).permute(0, 3, 1, 2))
        assert clip.latents is not None
        return self.decode(clip.latents)

    def encode(self, clip: Clip, frames: int) -> Tensor:
        """Unscaled latents of the clip's first frames, `[frames, C, H, W]` float32 on the CPU."""
        if clip.latents is not None:
            return clip.latents[:frames]
        assert clip.frames is not None
        pixels = to_pixels(torch.from_numpy(clip.frames[:frames]))
        return torch.cat([self._autoencoder.encode(part).cpu() for part in pixels.split(_FRAMES_AT_ONCE)])

    def decode(self, latents: Tensor) -> Pixels:
        """Unscaled latents `[N, C, H, W]` to frames `[N, h, w, 3]`."""
        parts = [self._autoencoder.decode(part).cpu() for part in latents.split(_FRAMES_AT_ONCE)]
        return self._to_uint8(torch.cat(parts) / 2 + 0.5)

    def _to_uint8(self, pixels: Tensor) -> Pixels:
        """`[N, 3, h, w]` from 0 to 1 to `[N, h, w, 3]`."""
        scaled = pixels * 255
        whole = scaled.floor() if self._round_down else scaled.round()
        frames: Pixels = whole.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return frames


class Generator:
    """Samples batches of clips, always of `sampling.batch` rows, so that nothing depends on what is beside a clip."""

    def __init__(self, model: FAR, card: ModelMetadata, coder: FrameCoder, protocol: Protocol) -> None:
        self._model, self._card, self._coder, self._protocol = model, card, coder, protocol
        self._device = next(model.parameters()).device

    def samples(self, clips: Sequence[Clip], truth: Pixels, seed: int) -> Pixels:
        """`[B, S, F, h, w, 3]` of at most `sampling.batch` clips, whose true frames are `[B, F, h, w, 3]`.

        Raises:
            UserError: the model gives numbers that are not finite.
        """
        sampling = self._protocol.sampling
        rows = [*clips, *[clips[-1]] * (sampling.batch - len(clips))]
        given = [self._given(clip, true) for clip, true in zip(clips, truth, strict=True)]
        return np.stack(
            [
                np.stack([np.concatenate([before, after]) for before, after in zip(given, predicted, strict=True)])
                for predicted in (
                    self._predicted(rows, seed, trajectory)[: len(clips)] for trajectory in range(sampling.trajectories)
                )
            ],
            axis=1,
        )

    def _given(self, clip: Clip, truth: Pixels) -> Pixels:
        """The given frames as a sample has them, `[G, h, w, 3]`."""
        given = self._protocol.sampling.given
        if self._protocol.frames.given == "true" or not given:
            return truth[:given]
        return self._coder.decode(self._coder.encode(clip, given))

    def _predicted(self, rows: Sequence[Clip], seed: int, trajectory: int) -> Pixels:
        """One sample of the predicted frames of each row, `[rows, F - G, h, w, 3]`."""
        sampling, scaling = self._protocol.sampling, self._card.scaling
        if sampling.given:
            context = torch.stack([scaling.normalise(self._coder.encode(clip, sampling.given)) for clip in rows])
        else:
            context = torch.empty(len(rows), 0, *self._card.latent_shape)
        frames = predict_frames(
            self._model,
            context,
            sampling.predicted,
            sampling.steps,
            guidance_of(self._protocol, self._model.config),
            actions=_stacked([clip.actions for clip in rows]),
            labels=_stacked([None if clip.label is None else torch.tensor(clip.label) for clip in rows]),
            seed=seed,
            clip_ids=[clip.number * sampling.trajectories + trajectory for clip in rows],
            context_noise=sampling.context_noise,
        )
        decoded = []
        for index, latents in enumerate(frames):
            if not latents.isfinite().all():
                keys = ", ".join(clip.key for clip in rows[:3])
                raise UserError(
                    f"frame {sampling.given + index} of clips {keys}: the model gives numbers that are not finite; "
                    "evaluate an earlier checkpoint, or lower the guidance"
                )
            decoded.append(self._coder.decode(scaling.restore(latents)))
        return np.stack(decoded, axis=1)


def guidance_of(protocol: Protocol, config: FARConfig) -> float:
    """The guidance that a model samples with: one without conditions has none."""
    return protocol.sampling.guidance if config.actions or config.labels else 1.0


def _stacked(conditions: Sequence[Tensor | None]) -> Tensor | None:
    """The clips' actions `[B, F]` or labels `[B]`; None where they have none."""
    there = [each for each in conditions if each is not None]
    return torch.stack(there) if there else None
