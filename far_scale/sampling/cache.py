"""The multi-level KV cache: keys and values of the clean frames in every layer, with rotary positions applied.

Level 1 holds the window, P tokens per frame, with the last slot for the frame that is being denoised; level 2 holds the
context, Q tokens per frame. Both are in one tensor per layer, allocated once, level 1 first. Attention does not depend
on the order of keys, so a new frame always attends to one slice from the start:

    level 1 | [frame 0 | frame 1 | ... | new frame |  free ...]           while the window is not full
    both    | [first   | ...     | last | new frame | context 0 | context 1 | ... |  free ...]      from then on

A denoising step writes its own frame's slot, reads a slice, and copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from far_scale.model import FARConfig
from far_scale.model.layers import HEAD_DIM


class MultiLevelCache:
    """Keys and values of clips.

    Attributes:
        fine, coarse: tokens of a window and of a context frame (P, Q).
    """

    def __init__(
        self,
        config: FARConfig,
        clips: int,
        frames: int,
        size: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            clips: number of clips.
            frames: number of frames of the longest clip, given and new.
            size: height and width of a latent.
        """
        self.fine, self.coarse = tokens_per_frame(config, size)
        self._context_start = min(frames, config.window) * self.fine
        shape = (config.layers, clips, _tokens_per_clip(config, frames, size), config.heads, HEAD_DIM)
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_needed(config: FARConfig, clips: int, frames: int, size: tuple[int, int], dtype: torch.dtype) -> int:
        """Memory of a cache made with these arguments."""
        tokens = clips * _tokens_per_clip(config, frames, size)
        return 2 * config.layers * tokens * config.width * dtype.itemsize

    def write_window(self, layer: int, frame: int, k: Tensor, v: Tensor) -> None:
        """Put k, v `[clips * frames * P, N, D]` into the window's slots from number `frame` on."""
        self._write(layer, frame * self.fine, k, v)

    def write_context(self, layer: int, frame: int, k: Tensor, v: Tensor) -> None:
        """Put k, v `[clips * frames * Q, N, D]` into the context's slots from frame `frame` on."""
        self._write(layer, self._context_start + frame * self.coarse, k, v)

    def window(self, layer: int, frames: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[clips, frames * P, N, D]` of the window's first slots."""
        return self._read(layer, 0, frames * self.fine)

    def context(self, layer: int, frames: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[clips, frames * Q, N, D]` of the first context frames."""
        return self._read(layer, self._context_start, self._context_start + frames * self.coarse)

    def visible(self, layer: int, window_frames: int, context_frames: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[clips, tokens, N, D]` of both levels; with context frames, the window must be full."""
        return self._read(layer, 0, window_frames * self.fine + context_frames * self.coarse)

    def _write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        clips = self._keys.shape[1]
        stop = start + len(k) // clips
        self._keys[layer, :, start:stop] = k.unflatten(0, (clips, -1))
        self._values[layer, :, start:stop] = v.unflatten(0, (clips, -1))

    def _read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._keys[layer, :, start:stop], self._values[layer, :, start:stop]


def tokens_per_frame(config: FARConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens of a window frame and of a context frame; the latter is 0 in a window-only model."""
    area = size[0] * size[1]
    return area // config.patch**2, area // config.context_patch**2 if config.context_patch else 0


def _tokens_per_clip(config: FARConfig, frames: int, size: tuple[int, int]) -> int:
    """Tokens of a clip of `frames` frames."""
    fine, coarse = tokens_per_frame(config, size)
    return min(frames, config.window) * fine + max(0, frames - config.window) * coarse
