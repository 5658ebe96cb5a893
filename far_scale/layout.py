"""FrameLayout: which token is which frame of which clip. The only place that knows causality.

The tokens of a pack stand clip after clip, in a clip frame after frame, in a frame row after row. A query token
may see every key token of its own clip whose frame is not later than its own ('frame-block causality').

    shape letters   B clips   F frames of all clips   T tokens of the pack   P tokens of a window frame
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Token sequences that lie end to end, each attended by itself: what a varlen attention kernel is told.

    Attributes:
        lengths: tokens of each sequence, none zero.
    """

    lengths: tuple[int, ...]

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def uniform(self) -> bool:
        """Whether all sequences have the same length, so that they are one dense batch."""
        return len(set(self.lengths)) == 1

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Cumulative lengths `[sequences + 1]`, from 0 to all tokens."""
        return (0, *itertools.accumulate(self.lengths))

    @cached_property
    def _cumulative(self) -> dict[torch.device, Tensor]:
        return {}

    def cumulative(self, device: torch.device) -> Tensor:
        """`starts` as int32 `[sequences + 1]` on `device`, made once."""
        if device not in self._cumulative:
            self._cumulative[device] = torch.tensor(self.starts, dtype=torch.int32).to(device)
        return self._cumulative[device]

    @cached_property
    def groups(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """`(length, starts of the sequences that have it)`, for kernels that only take dense batches."""
        by_length: dict[int, list[int]] = {}
        for start, length in zip(self.starts, self.lengths, strict=False):
            by_length.setdefault(length, []).append(start)
        return tuple((length, tuple(starts)) for length, starts in sorted(by_length.items()))


@dataclass(frozen=True)
class UpperTriangle:
    """What a token sees of its own frame *after* itself, as ordinary causal attention over reversed frames.

    Of every frame the query rows run from its last but one token down to its first, the key rows from its last
    token down to its second: reversed query j then sees reversed keys <= j, which are just the later tokens.

    Attributes:
        queries: row numbers `[U]` into the pack's tokens.
        keys: row numbers `[U]`.
        spans: one sequence a frame of more than one token.
    """

    queries: Tensor
    keys: Tensor
    spans: Spans


@dataclass(frozen=True)
class FrameLayout:
    """The order of a pack's tokens.

    Attributes:
        clip_frames: `[B]` frames of each clip, none zero.
        frame_tokens: `[F]` tokens of each frame, all clips in order, none zero.
        positions: `[T, 3]` int64 rotary position of each token: frame index in its clip, y, x.
    """

    clip_frames: tuple[int, ...]
    frame_tokens: tuple[int, ...]
    positions: Tensor = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.clip_frames or min(self.clip_frames) < 1:
            raise ValueError(f"every clip needs at least one frame, got clips of {list(self.clip_frames)} frames")
        if len(self.frame_tokens) != sum(self.clip_frames) or min(self.frame_tokens) < 1:
            raise ValueError("frame_tokens must give at least one token for each frame of each clip")

    @staticmethod
    def window(clip_frames: Sequence[int], grid: tuple[int, int]) -> FrameLayout:
        """The layout of clips of window frames only, every frame a grid of `(rows, columns)` tokens.

        Asked twice for the same layout, it gives the same object, with all that was derived from it.

        Args:
            clip_frames: `[B]` frames of each clip.
            grid: rows and columns of a frame's tokens; P = rows * columns.
        """
        return _window(tuple(clip_frames), grid)

    @property
    def frames(self) -> int:
        """F, frames of all clips."""
        return len(self.frame_tokens)

    @cached_property
    def tokens(self) -> int:
        """T, tokens of the pack."""
        return sum(self.frame_tokens)

    @cached_property
    def clips(self) -> Spans:
        """One sequence a clip."""
        ends = (0, *itertools.accumulate(self.clip_frames))
        return Spans(tuple(sum(self.frame_tokens[a:b]) for a, b in itertools.pairwise(ends)))

    @cached_property
    def attended_pairs(self) -> int:
        """(query, key) pairs that frame-block causality lets through: the work that attention cannot avoid."""
        pairs, frame = 0, 0
        for count in self.clip_frames:
            seen = 0
            for tokens in self.frame_tokens[frame : frame + count]:
                seen += tokens
                pairs += tokens * seen
            frame += count
        return pairs

    @cached_property
    def _on_device(self) -> dict[tuple[str, torch.device], Tensor | UpperTriangle | None]:
        return {}

    def clip_of_frame(self, device: torch.device) -> Tensor:
        """`[F]` int64: the clip each frame belongs to."""
        key = ("clip_of_frame", device)
        if key not in self._on_device:
            clips = torch.arange(len(self.clip_frames)).repeat_interleave(torch.tensor(self.clip_frames))
            self._on_device[key] = clips.to(device)
        return self._on_device[key]  # type: ignore[return-value]

    def upper_triangle(self, device: torch.device) -> UpperTriangle | None:
        """The part of each frame that token-causal attention leaves out; None where all frames have one token."""
        key = ("upper_triangle", device)
        if key not in self._on_device:
            starts = Spans(self.frame_tokens).starts
            several = [(s, n) for s, n in zip(starts, self.frame_tokens, strict=False) if n > 1]
            upper = None
            if several:
                queries = torch.cat([torch.arange(s + n - 2, s - 1, -1) for s, n in several])
                spans = Spans(tuple(n - 1 for _, n in several))
                upper = UpperTriangle(queries.to(device), (queries + 1).to(device), spans)
            self._on_device[key] = upper
        return self._on_device[key]  # type: ignore[return-value]

    def mask(self, device: torch.device) -> Tensor:
        """`[T, T]` bool, True where the query (row) may see the key (column): for the oracle, never for training."""
        frame_tokens = torch.tensor(self.frame_tokens, device=device)
        frame = torch.arange(self.frames, device=device).repeat_interleave(frame_tokens)
        clip = self.clip_of_frame(device).repeat_interleave(frame_tokens)
        return (clip[:, None] == clip[None, :]) & (frame[:, None] >= frame[None, :])


@functools.lru_cache(maxsize=64)
def _window(clip_frames: tuple[int, ...], grid: tuple[int, int]) -> FrameLayout:
    rows, columns = grid
    frames = torch.cat([torch.arange(count) for count in clip_frames])
    positions = torch.empty(len(frames), rows, columns, 3, dtype=torch.int64)
    positions[..., 0] = frames[:, None, None]
    positions[..., 1] = torch.arange(rows)[:, None]
    positions[..., 2] = torch.arange(columns)
    return FrameLayout(clip_frames, (rows * columns,) * len(frames), positions.flatten(0, 2))
