"""The multi-level KV cache: keys and values of the clean frames in every layer, with rotary positions applied.

Level 1 holds the window, P tokens per frame, with a slot for the frame that is being denoised; level 2 holds the
context, Q tokens per frame, as a ring once its frames are limited. Both are in one tensor per layer, level 1 first:

    [frame 0 | frame 1 | ... | new frame | free ... || context 0 | context 1 | ... | free ...]

Attention does not depend on the order of keys, so a new frame attends to one slice from the start, with a mask where
free slots lie inside it. A denoising step writes its own frame's slot, reads that slice, and copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from far_scale.model import FARConfig
from far_scale.model.layers import HEAD_DIM

_FIRST_CONTEXT_FRAMES = 64  # capacity of level 2 where the number of frames is not known; doubled when it is full


class MultiLevelCache:
    """Keys and values of clips.

    Attributes:
        fine, coarse: tokens of a window and of a context frame (P, Q).
        clips: rows of the model's batch.
        window_frames: slots of level 1.
        context_limit: slots of level 2; None where it grows with the clip.
    """

    def __init__(
        self,
        config: FARConfig,
        clips: int,
        size: tuple[int, int],
        window_frames: int,
        context_limit: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            clips: rows of the model's batch.
            size: height and width of a latent.
            window_frames: slots of level 1.
            context_limit: slots of level 2; None where it grows with the clip.
        """
        self.fine, self.coarse = tokens_per_frame(config, size)
        self.clips, self.window_frames, self.context_limit = clips, window_frames, context_limit
        self._shape = (config.layers, clips, config.heads, HEAD_DIM)
        capacity = _FIRST_CONTEXT_FRAMES if context_limit is None else context_limit
        self._keys, self._values = (self._allocate(capacity, device, dtype) for _ in range(2))
        self._written = 0  # context frames so far, also those that others have replaced

    @property
    def context_frames(self) -> int:
        """Number of context frames held."""
        return self._written if self.context_limit is None else min(self._written, self.context_limit)

    @property
    def tokens(self) -> int:
        """Tokens of a clip that both levels have room for."""
        return self._keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._keys.nbytes + self._values.nbytes

    def reserve_context(self, frames: int) -> bool:
        """Make room for `frames` more context frames where level 2 grows with the clip; True if the tensors are new."""
        held = self.tokens
        if self.context_limit is not None or self._context_start + (self._written + frames) * self.coarse <= held:
            return False
        capacity = max(2 * self._written, self._written + frames)
        keys, values = (self._allocate(capacity, self._keys.device, self._keys.dtype) for _ in range(2))
        keys[:, :, :held], values[:, :, :held] = self._keys, self._values
        self._keys, self._values = keys, values
        return True

    def append_context(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k, v `[clips * n * Q, N, D]` of the next n context frames; `commit_context` then counts them."""
        slots = self._slots_of_next(k.shape[0] // (self.clips * self.coarse))
        self._keys[layer, :, slots] = k.unflatten(0, (self.clips, -1))
        self._values[layer, :, slots] = v.unflatten(0, (self.clips, -1))

    def commit_context(self, frames: int) -> None:
        """Count `frames` more context frames, after `append_context` in every layer."""
        self._written += frames

    def write_window(self, layer: int, frame: int, k: Tensor, v: Tensor) -> None:
        """Put k, v `[clips * n * P, N, D]` into the window's slots from number `frame` on."""
        start, clips = frame * self.fine, self.clips
        stop = start + len(k) // clips
        self._keys[layer, :, start:stop] = k.unflatten(0, (clips, -1))
        self._values[layer, :, start:stop] = v.unflatten(0, (clips, -1))

    def write_tokens(self, layer: int, tokens: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v `[clips * P, N, D]` at the places `tokens` `[P]` of level 1, by numbers on the device."""
        clips = self.clips
        self._keys[layer].index_copy_(1, tokens, k.unflatten(0, (clips, -1)))
        self._values[layer].index_copy_(1, tokens, v.unflatten(0, (clips, -1)))

    def window_prefix(self, layer: int, window_frames: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[clips, tokens, N, D]` of the window's first slots and of the context."""
        window, context = window_frames * self.fine, self.context_frames * self.coarse
        slices = [slice(0, window), slice(self._context_start, self._context_start + context)]
        used = [part for part in slices if part.stop > part.start] or slices[:1]
        if len(used) == 1:
            return self._keys[layer, :, used[0]], self._values[layer, :, used[0]]
        keys, values = (torch.cat([x[layer, :, part] for part in used], dim=1) for x in (self._keys, self._values))
        return keys, values

    def context_prefix(self, layer: int, new_frames: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[clips, tokens, N, D]` of the context frames that `new_frames` more ones do not replace."""
        start, held = self._context_start, self.context_frames * self.coarse
        if self.kept_context(new_frames) == self.context_frames:
            return self._keys[layer, :, start : start + held], self._values[layer, :, start : start + held]
        kept = torch.ones(self.tokens, dtype=torch.bool)
        kept[:start] = False
        kept[self._slots_of_next(new_frames).cpu()] = False
        rows = kept.nonzero().squeeze(1).to(self._keys.device)
        return self._keys[layer, :, rows], self._values[layer, :, rows]

    def kept_context(self, new_frames: int) -> int:
        """Number of context frames that `new_frames` more ones do not replace."""
        return self._written if self.context_limit is None else min(self._written, self.context_limit - new_frames)

    def visible(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[clips, tokens, N, D]` of the first tokens of both levels."""
        return self._keys[layer, :, :tokens], self._values[layer, :, :tokens]

    def visible_ranges(self, window_frames: int) -> tuple[int, int, int]:
        """The tokens that count: those in [0, a) and in [b, c), as a, b, c."""
        start = self._context_start
        return window_frames * self.fine, start, start + self.context_frames * self.coarse

    def state(self) -> tuple[int, Tensor, Tensor]:
        """A copy of the contents, for `restore`."""
        return self._written, self._keys.clone(), self._values.clone()

    def restore(self, state: tuple[int, Tensor, Tensor]) -> None:
        """Contents of an earlier `state`. Tensors keep their addresses, since captured graphs read them."""
        self._written, keys, values = state
        self._keys[:, :, : keys.shape[2]].copy_(keys)
        self._values[:, :, : values.shape[2]].copy_(values)

    @property
    def _context_start(self) -> int:
        return self.window_frames * self.fine

    def _allocate(self, context_frames: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        layers, clips, heads, head_dim = self._shape
        tokens = self._context_start + context_frames * self.coarse
        # Zeros, since masked slots are read: a weight of 0 does not undo NaN.
        return torch.zeros(layers, clips, tokens, heads, head_dim, device=device, dtype=dtype)

    def _slots_of_next(self, frames: int) -> Tensor:
        """`[frames * Q]`: the places of the next context frames."""
        numbers = torch.arange(self._written, self._written + frames)
        if self.context_limit is not None:
            numbers = numbers % self.context_limit
        places = self._context_start + numbers[:, None] * self.coarse + torch.arange(self.coarse)
        return places.flatten().to(self._keys.device)


def tokens_per_frame(config: FARConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens of a window frame and of a context frame; the latter is 0 in a window-only model."""
    area = size[0] * size[1]
    return area // config.patch**2, area // config.context_patch**2 if config.context_patch else 0


def first_window_frame(frame: int, window: int, stride: int) -> int:
    """Index of the first frame that is fine while `frame` is denoised: 0 until the window is full.

    Then the window slides by `stride` frames at a time, so it holds window - stride + 1 to window frames.
    """
    return stride * -(-max(0, frame + 1 - window) // stride)


def bytes_needed(
    config: FARConfig,
    rows: int,
    frames: int,
    size: tuple[int, int],
    stride: int,
    context_frames: int | None,
    dtype: torch.dtype,
) -> int:
    """Memory of a cache for `rows` clips of `frames` frames.

    Args:
        stride: see `first_window_frame`.
        context_frames: limit of the context; None for none.
    """
    fine, coarse = tokens_per_frame(config, size)
    window, context = levels(config, frames, stride, context_frames)
    return 2 * config.layers * rows * (window * fine + context * coarse) * config.width * dtype.itemsize


def levels(config: FARConfig, frames: int, stride: int, context_frames: int | None) -> tuple[int, int]:
    """Slots of the window and of the context that a clip of `frames` frames needs."""
    context = first_window_frame(frames - 1, config.window, stride) if config.context_patch else 0
    return min(frames, config.window), context if context_frames is None else min(context, context_frames)
