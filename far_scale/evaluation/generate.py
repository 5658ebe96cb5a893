"""Generates the samples of an evaluation: given and predicted frames in uint8.

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
from far_scale.evaluation.clip_sets import Clip
from far_scale.evaluation.protocol import Protocol
from far_scale.model import FAR, FARConfig
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.sampler import predict_frames
from far_scale.utils.errors import UserError

Pixels = NDArray[np.uint8]

_CODEC_BATCH = 32  # frames through the autoencoder; fixed, since another batch size may round differently


class FrameCodec:
    """Converts between uint8 frames and latents by a protocol's rules."""

    def __init__(self, autoencoder: Autoencoder, protocol: Protocol) -> None:
        self._autoencoder, self._round_down = autoencoder, protocol.frames.rounding == "down"

    def truth(self, clip: Clip) -> Pixels:
        """The clip's true frames `[F, h, w, 3]`: recorded ones, or decoded latents."""
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
        return torch.cat([self._autoencoder.encode(part).cpu() for part in pixels.split(_CODEC_BATCH)])

    def decode(self, latents: Tensor) -> Pixels:
        """Unscaled latents `[N, C, H, W]` to frames `[N, h, w, 3]`."""
        parts = [self._autoencoder.decode(part).cpu() for part in latents.split(_CODEC_BATCH)]
        return self._to_uint8(torch.cat(parts) / 2 + 0.5)

    def _to_uint8(self, pixels: Tensor) -> Pixels:
        """`[N, 3, h, w]` from 0 to 1 to `[N, h, w, 3]`."""
        scaled = pixels * 255
        whole = scaled.floor() if self._round_down else scaled.round()
        frames: Pixels = whole.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return frames


class SampleGenerator:
    """Samples batches of clips, always filled up to `sampling.batch`, so that no clip depends on its batch."""

    def __init__(self, model: FAR, metadata: ModelMetadata, codec: FrameCodec, protocol: Protocol) -> None:
        self._model, self._metadata, self._codec, self._protocol = model, metadata, codec, protocol

    def samples(self, clips: Sequence[Clip], truth: Pixels, seed: int) -> Pixels:
        """Sample at most `sampling.batch` clips.

        Args:
            clips: B clips.
            truth: `[B, F, h, w, 3]`, their true frames.
            seed: of the noise.

        Returns:
            `[B, S, F, h, w, 3]`, given frames first.

        Raises:
            UserError: the model gives numbers that are not finite.
        """
        sampling = self._protocol.sampling
        rows = [*clips, *[clips[-1]] * (sampling.batch - len(clips))]
        given = np.stack([self._given_frames(clip, true) for clip, true in zip(clips, truth, strict=True)])
        trajectories = [
            np.concatenate([given, self._predicted_frames(rows, seed, trajectory)[: len(clips)]], axis=1)
            for trajectory in range(sampling.trajectories)
        ]
        return np.stack(trajectories, axis=1)

    def _given_frames(self, clip: Clip, truth: Pixels) -> Pixels:
        """The given frames of a clip's samples, `[G, h, w, 3]`."""
        given = self._protocol.sampling.given
        if self._protocol.frames.given == "true" or not given:
            return truth[:given]
        return self._codec.decode(self._codec.encode(clip, given))

    def _predicted_frames(self, rows: Sequence[Clip], seed: int, trajectory: int) -> Pixels:
        """One sample of each row's predicted frames, `[rows, F - G, h, w, 3]`."""
        sampling, scaling = self._protocol.sampling, self._metadata.scaling
        if sampling.given:
            context = torch.stack([scaling.normalise(self._codec.encode(clip, sampling.given)) for clip in rows])
        else:
            context = torch.empty(len(rows), 0, *self._metadata.latent_shape)
        frames = predict_frames(
            self._model,
            context,
            sampling_config(self._protocol, self._model.config, seed),
            actions=_stack_conditions([clip.actions for clip in rows]),
            labels=_stack_conditions([None if clip.label is None else torch.tensor(clip.label) for clip in rows]),
            clip_ids=[clip.number * sampling.trajectories + trajectory for clip in rows],
        )
        try:
            return np.stack([self._codec.decode(scaling.restore(latents)) for latents in frames], axis=1)
        except UserError as error:
            raise UserError(f"clips {', '.join(clip.key for clip in rows[:3])}: {error}") from None


def sampling_config(protocol: Protocol, model: FARConfig, seed: int) -> SamplingConfig:
    """A protocol's settings for a model; one without conditions samples without guidance."""
    sampling = protocol.sampling
    guidance = sampling.guidance if model.actions or model.labels else 1.0
    return SamplingConfig(
        sampling.predicted,
        sampling.steps,
        guidance,
        seed,
        sampling.context_noise,
        grid=sampling.grid,
        window_stride=sampling.window_stride,
    )


def _stack_conditions(conditions: Sequence[Tensor | None]) -> Tensor | None:
    """The clips' actions `[B, F]` or labels `[B]`; None for clips without."""
    tensors = [condition for condition in conditions if condition is not None]
    return torch.stack(tensors) if tensors else None
