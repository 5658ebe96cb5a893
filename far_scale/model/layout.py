"""FrameLayout: the frame and clip of each token of a pack. Causality is defined only here.

The frames of a pack are ordered clip after clip. The last frames of a clip are its *window*, cut into fine tokens; all
earlier ones are its *context*, cut into coarse tokens. Each kind is a `FrameGroup`: its tokens are ordered by
clip, then frame, then row. A query token sees the key tokens of its own clip in its own and earlier frames
('frame-block causality'): context tokens see only context, and window tokens see their clip's whole context and their
own group. In a layout that is not causal (Video DiT) there is no context, and a token sees its whole clip.

    shape letters   B clips   F frames   T tokens   P/Q tokens of a window/context frame
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on `device`, or `x` itself there; the host does not wait for a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class DeviceCache:
    """What was made from an object for a device, by name: the first call makes it, and all later ones find it."""

    def __init__(self) -> None:
        self._made: dict[tuple[Hashable, torch.device], Any] = {}

    def get(self, name: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """What is there under this name for this device, else the result of `make`."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # as tensors name it
        if (name, device) not in self._made:
            self._made.setdefault((name, device), make())
        return self._made[name, device]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Spans:
    """Concatenated token sequences, each attended separately: the input of a varlen attention kernel.

    Attributes:
        lengths: tokens of each sequence, none zero.
        cache: what kernels keep for these sequences.
    """

    lengths: tuple[int, ...]
    cache: DeviceCache = field(default_factory=DeviceCache, init=False, compare=False, repr=False)

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

    def cumulative(self, device: torch.device) -> Tensor:
        """`starts` as int32 `[sequences + 1]` on `device`, cached."""
        return self.cache.get(
            "cumulative", device, lambda: to_device(torch.tensor(self.starts, dtype=torch.int32), device)
        )

    def sequence_of_token(self, device: torch.device) -> Tensor:
        """`[T]` int64: the index of each token's sequence, cached."""
        return self.cache.get("sequence_of_token", device, lambda: to_device(_repeated_indices(self.lengths), device))


@dataclass(frozen=True)
class UpperTriangle:
    """The tokens *after* itself that a token sees in its own frame, as ordinary causal attention over reversed frames.

    In every frame the query rows go from the second-to-last token down to the first, the key rows from the last token
    down to the second: reversed query j then sees reversed keys <= j, which are the later tokens.

    Attributes:
        queries: row numbers `[U]` into the group's tokens.
        keys: row numbers `[U]`.
        spans: one sequence for each frame of more than one token.
    """

    queries: Tensor
    keys: Tensor
    spans: Spans


@dataclass(frozen=True)
class Prefix:
    """The contexts that window tokens see, as ordinary attention without a mask.

    Attributes:
        rows: row numbers `[T']` of the window tokens of clips with a context, in host memory; None if they are the last
            rows, as where every clip has one.
        queries: those window tokens, one sequence for each clip with a context.
        keys: all tokens of the context group, one sequence for each such clip.
    """

    rows: Tensor | None
    queries: Spans
    keys: Spans
    cache: DeviceCache = field(default_factory=DeviceCache, init=False, compare=False, repr=False)

    def rows_on(self, device: torch.device) -> Tensor | None:
        """`rows` on `device`, cached."""
        rows = self.rows
        return None if rows is None else self.cache.get("rows", device, lambda: to_device(rows, device))


@dataclass(frozen=True)
class FrameGroup:
    """Frames of the clips of a pack, and their attention among themselves.

    Attributes:
        clip_frames: `[B]` frames of each clip in this group; may be zero.
        frame_tokens: `[F]` tokens of each frame, all clips in order, none zero.
        positions: `[T, 3]` int64 rotary position of each token: frame index in its clip, y, x.
        causal: whether a token sees its own and earlier frames of its clip (frame-block causality), or all of them.
    """

    clip_frames: tuple[int, ...]
    frame_tokens: tuple[int, ...]
    positions: Tensor = field(compare=False, repr=False)
    causal: bool = True
    cache: DeviceCache = field(default_factory=DeviceCache, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.frame_tokens) != sum(self.clip_frames) or min(self.frame_tokens, default=1) < 1:
            raise ValueError("frame_tokens must give at least one token for each frame of each clip")

    @staticmethod
    def of(
        clip_frames: Sequence[int],
        grid: tuple[int, int],
        first_frames: Sequence[int] | None = None,
        spacing: int = 1,
        causal: bool = True,
    ) -> FrameGroup:
        """A group of frames with the same grid of tokens.

        Args:
            clip_frames: `[B]` frames of each clip.
            grid: rows and columns of a frame's tokens.
            first_frames: `[B]` index of each clip's first frame in the clip; 0 by default.
            spacing: distance of neighbouring tokens in y and x.
            causal: see the attribute.
        """
        rows, columns = grid
        firsts = first_frames or (0,) * len(clip_frames)
        frames = torch.tensor(
            [i for first, n in zip(firsts, clip_frames, strict=True) for i in range(first, first + n)]
        )
        positions = torch.empty(len(frames), rows, columns, 3, dtype=torch.int64)
        positions[..., 0] = frames[:, None, None]
        positions[..., 1] = spacing * torch.arange(rows)[:, None]
        positions[..., 2] = spacing * torch.arange(columns)
        return FrameGroup(tuple(clip_frames), (rows * columns,) * len(frames), positions.flatten(0, 2), causal)

    def followed_by(self, other: FrameGroup) -> FrameGroup:
        """The frames of both, of which neither sees the other's: those of this group first, as clips of their own."""
        return FrameGroup(
            self.clip_frames + other.clip_frames,
            self.frame_tokens + other.frame_tokens,
            torch.cat([self.positions, other.positions]),
            self.causal,
        )

    @property
    def frames(self) -> int:
        """F, frames of all clips."""
        return len(self.frame_tokens)

    @cached_property
    def tokens(self) -> int:
        """T, tokens of all frames."""
        return sum(self.frame_tokens)

    @cached_property
    def tokens_of_clips(self) -> tuple[int, ...]:
        """`[B]` tokens of each clip in this group."""
        ends = (0, *itertools.accumulate(self.clip_frames))
        return tuple(sum(self.frame_tokens[a:b]) for a, b in itertools.pairwise(ends))

    @cached_property
    def clips(self) -> Spans:
        """One sequence for each clip with frames in this group."""
        return Spans(tuple(tokens for tokens in self.tokens_of_clips if tokens))

    @cached_property
    def frame_spans(self) -> Spans:
        """One sequence for each frame."""
        return Spans(self.frame_tokens)

    @cached_property
    def pairs(self) -> int:
        """Number of attended (query, key) pairs within the group."""
        if not self.causal:
            return sum(tokens**2 for tokens in self.tokens_of_clips)
        pairs, frame = 0, 0
        for count in self.clip_frames:
            seen = 0
            for tokens in self.frame_tokens[frame : frame + count]:
                seen += tokens
                pairs += tokens * seen
            frame += count
        return pairs

    def clip_of_frame(self, device: torch.device) -> Tensor:
        """`[F]` int64: the clip each frame belongs to."""
        return self.cache.get("clip_of_frame", device, lambda: to_device(_repeated_indices(self.clip_frames), device))

    def positions_on(self, device: torch.device) -> Tensor:
        """`positions` on `device`."""
        return self.cache.get("positions", device, lambda: to_device(self.positions, device))

    def upper_triangle(self, device: torch.device) -> UpperTriangle | None:
        """The part of each frame that token-causal attention leaves out.

        None if there is none: all frames have one token, or the group is not causal.
        """
        return self.cache.get("upper_triangle", device, lambda: self._upper_triangle(device))

    def _upper_triangle(self, device: torch.device) -> UpperTriangle | None:
        lengths = torch.tensor(self.frame_tokens) - 1
        rows = int(lengths.sum())
        if not rows or not self.causal:
            return None
        # Row j of a frame that starts at token s and has n + 1 tokens is s + n - 1 - j.
        first_row, first_token = lengths.cumsum(0) - lengths, torch.tensor(self.frame_spans.starts[:-1])
        last_plus_first = (first_token + lengths - 1 + first_row).repeat_interleave(lengths)
        queries = to_device(last_plus_first - torch.arange(rows), device)
        return UpperTriangle(queries, queries + 1, Spans(tuple(n - 1 for n in self.frame_tokens if n > 1)))

    def mask(self, device: torch.device) -> Tensor:
        """`[T, T]` bool, True where the query (row) may see the key (column); only for the dense reference."""
        frame, clip = self.frame_spans.sequence_of_token(device), self.clips.sequence_of_token(device)
        same_clip = clip[:, None] == clip[None, :]
        return same_clip & (frame[:, None] >= frame[None, :]) if self.causal else same_clip


class AttentionPlan:
    """The keys that the tokens of a group attend to: those of the group, by its causality, and those of the prefix.

    All keys are in one tensor, the prefix's first. They come before the group's, or they are the first keys of the
    group itself: in a whole pack the context's tokens are both queries of their own and the window's prefix.

    Torch operators take only tensors, and a compiled graph with a plan's lengths as constants would be recompiled for
    every pack. So an operator gets `handle`, a number in a tensor, and looks up the plan by it.

    Attributes:
        group: of the tokens.
        prefix: prefix keys and the queries that see them; None without any.
        first_key: number of keys before those of the group.
        handle: int64 scalar tensor in host memory.
        cache: what kernels keep for the plan.
    """

    _live_plans: ClassVar[weakref.WeakValueDictionary[int, AttentionPlan]] = weakref.WeakValueDictionary()
    _numbers: ClassVar[itertools.count[int]] = itertools.count()

    def __init__(self, group: FrameGroup, prefix: Prefix | None = None, prefix_in_group: bool = False) -> None:
        self.group, self.prefix, self.cache = group, prefix, DeviceCache()
        self.first_key = 0 if prefix is None or prefix_in_group else prefix.keys.starts[-1]
        number = next(AttentionPlan._numbers)
        self.handle = torch.tensor(number)
        AttentionPlan._live_plans[number] = self

    @staticmethod
    def find(handle: Tensor) -> AttentionPlan:
        """The plan of a handle.

        Raises:
            RuntimeError: the plan was freed; a caller must keep it until after the backward.
        """
        plan = AttentionPlan._live_plans.get(int(handle))
        if plan is None:
            raise RuntimeError("the layout of this attention call was freed before its backward; keep it until then")
        return plan

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.first_key + self.group.tokens

    @cached_property
    def pairs(self) -> int:
        """Number of attended (query, key) pairs."""
        prefix = self.prefix
        prefix_pairs = 0 if prefix is None else sum(map(operator.mul, prefix.queries.lengths, prefix.keys.lengths))
        return self.group.pairs + prefix_pairs


@dataclass(frozen=True)
class FrameLayout:
    """The frames of a pack by clip, window and context.

    Attributes:
        clip_frames: `[B]` frames of each clip, none zero.
        window: the last frames of each clip.
        context: all earlier frames; a clip no longer than the window has none.
    """

    clip_frames: tuple[int, ...]
    window: FrameGroup
    context: FrameGroup
    cache: DeviceCache = field(default_factory=DeviceCache, init=False, compare=False, repr=False)

    @staticmethod
    def of(
        clip_frames: Sequence[int], grid: tuple[int, int], window: int, coarsening: int = 0, causal: bool = True
    ) -> FrameLayout:
        """The layout of clips of uniform frames.

        Calls with equal arguments in one thread return the same object, as long as it is among the last 32. Threads
        share none: what one copies to a GPU, another stream might read too early.

        Args:
            clip_frames: `[B]` frames of each clip.
            grid: rows and columns of a window frame's tokens; P = rows * columns.
            window: number of window frames, the last frames of a clip.
            coarsening: width and height of a context token in window tokens; Q = P / coarsening^2. 0: no context, and
                no clip may be longer than the window.
            causal: frame-block causal; otherwise every token sees its whole clip, and there is no context.

        Raises:
            ValueError: a clip without frames or too long, a grid that `coarsening` does not divide, or a context in a
                layout that is not causal.
        """
        return _layouts.of(tuple(clip_frames), grid, window, coarsening, causal)

    @cached_property
    def groups(self) -> FrameGroup:
        """Both groups as one, the context first: the order of a pack's tokens in the layers."""
        return self.context.followed_by(self.window) if self.context.frames else self.window

    @property
    def frames(self) -> int:
        """F, frames of all clips."""
        return sum(self.clip_frames)

    @property
    def tokens(self) -> int:
        """T, tokens of the pack, fine and coarse."""
        return self.window.tokens + self.context.tokens

    def tensors(self, device: torch.device) -> list[Tensor]:
        """All that is computed with on `device` outside of attention (see `attention.prepare`)."""
        rows = self.clip_of_frame(device), self.window_rows(device), self.context_rows(device)
        return [*rows, self.window.clip_of_frame(device), self.groups.positions_on(device)]

    @cached_property
    def window_pairs(self) -> int:
        """Number of attended (query, key) pairs with a window token as query."""
        clip_pairs = zip(self.window.tokens_of_clips, self.context.tokens_of_clips, strict=True)
        return self.window.pairs + sum(queries * keys for queries, keys in clip_pairs)

    @property
    def attended_pairs(self) -> int:
        """Number of all attended (query, key) pairs."""
        return self.window_pairs + self.context.pairs

    def clip_of_frame(self, device: torch.device) -> Tensor:
        """`[F]` int64: the clip each frame of the pack belongs to."""
        return self.cache.get("clip_of_frame", device, lambda: to_device(_repeated_indices(self.clip_frames), device))

    def window_rows(self, device: torch.device) -> Tensor:
        """`[Fw]` int64: indices of the window group's frames in the pack."""
        return self.cache.get("window_rows", device, lambda: to_device(self._frame_rows(in_window=True), device))

    def context_rows(self, device: torch.device) -> Tensor:
        """`[Fc]` int64: indices of the context group's frames in the pack."""
        return self.cache.get("context_rows", device, lambda: to_device(self._frame_rows(in_window=False), device))

    def _frame_rows(self, in_window: bool) -> Tensor:
        is_window_frame = [
            frame >= frames - window
            for frames, window in zip(self.clip_frames, self.window.clip_frames, strict=True)
            for frame in range(frames)
        ]
        return torch.tensor(
            [row for row, is_window in enumerate(is_window_frame) if is_window == in_window], dtype=torch.int64
        )

    @cached_property
    def plan(self) -> AttentionPlan:
        """The attention of all tokens, in the order of `groups`: of context tokens to each other, frame-block causally,
        and of window tokens as in `window_plan`."""
        prefix = self.prefix
        if prefix is None:
            return self.window_plan
        rows = None if prefix.rows is None else prefix.rows + self.context.tokens
        return AttentionPlan(self.groups, Prefix(rows, prefix.queries, prefix.keys), prefix_in_group=True)

    @cached_property
    def window_plan(self) -> AttentionPlan:
        """The attention of window tokens: to their clip's whole context, and to the window by `window.causal`."""
        return AttentionPlan(self.window, self.prefix)

    @cached_property
    def prefix(self) -> Prefix | None:
        """The contexts that window tokens see; None if no clip has one."""
        if not self.context.frames:
            return None
        has_context = [tokens > 0 for tokens in self.context.tokens_of_clips]
        fine = self.window.tokens_of_clips
        rows = None
        if not all(has_context):
            sees_context = torch.tensor(has_context).repeat_interleave(torch.tensor(fine))
            rows = sees_context.nonzero().squeeze(1)
        queries = Spans(tuple(itertools.compress(fine, has_context)))
        return Prefix(rows, queries, self.context.clips)


def _layout(
    clip_frames: tuple[int, ...], grid: tuple[int, int], window: int, coarsening: int, causal: bool
) -> FrameLayout:
    if not clip_frames or min(clip_frames) < 1:
        raise ValueError(f"every clip needs at least one frame, got clips of {list(clip_frames)} frames")
    if not coarsening and max(clip_frames) > window:
        raise ValueError(f"a clip of {max(clip_frames)} frames is longer than the window of {window}")
    if coarsening and not causal:
        raise ValueError("a layout that is not causal has no context; coarsening must be 0")
    if coarsening and (grid[0] % coarsening or grid[1] % coarsening):
        raise ValueError(f"a frame of {grid[0]} x {grid[1]} tokens does not divide by coarsening {coarsening}")
    fine = tuple(min(frames, window) for frames in clip_frames)
    coarse = tuple(frames - in_window for frames, in_window in zip(clip_frames, fine, strict=True))
    coarse_grid = (grid[0] // coarsening, grid[1] // coarsening) if coarsening else grid
    return FrameLayout(
        clip_frames,
        window=FrameGroup.of(fine, grid, first_frames=coarse, causal=causal),
        context=FrameGroup.of(coarse, coarse_grid, spacing=coarsening),
    )


class _Layouts(threading.local):
    """The last layouts of a thread."""

    def __init__(self) -> None:
        self.of = functools.lru_cache(maxsize=32)(_layout)  # packs of random lengths rarely repeat


_layouts = _Layouts()


def _repeated_indices(counts: tuple[int, ...]) -> Tensor:
    """0, 1, ... int64, each as often as its count says: `[sum of counts]`."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
