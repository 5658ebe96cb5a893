"""FrameLayout: which token is which frame of which clip. The only place that knows causality.

The frames of a pack stand clip after clip. The last frames of a clip are its *window*, cut into fine tokens; all
earlier ones are its *context*, cut into coarse tokens. Each kind is a `FrameGroup`: its tokens stand clip after clip,
in a clip frame after frame, in a frame row after row. A query token may see every key token of its own clip whose
frame is not later than its own ('frame-block causality'), so context tokens see context alone, and window tokens see
their clip's whole context and their own group. In a layout that is not causal (Video DiT) there is no context, and a
token sees its whole clip.

    shape letters   B clips   F frames   T tokens   P/Q tokens of a window/context frame
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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


@dataclass(frozen=True)
class UpperTriangle:
    """What a token sees of its own frame *after* itself, as ordinary causal attention over reversed frames.

    Of every frame the query rows run from its last but one token down to its first, the key rows from its last
    token down to its second: reversed query j then sees reversed keys <= j, which are just the later tokens.

    Attributes:
        queries: row numbers `[U]` into the group's tokens.
        keys: row numbers `[U]`.
        spans: one sequence a frame of more than one token.
    """

    queries: Tensor
    keys: Tensor
    spans: Spans


@dataclass(frozen=True)
class Prefix:
    """What the window tokens see of their clips' contexts: all of it, as ordinary attention without a mask.

    Attributes:
        rows: row numbers `[T']` of the window tokens whose clip has a context; None where every clip has one.
        queries: one sequence of those window tokens for each clip that has a context.
        keys: one sequence of context tokens for each such clip; together all of the context group's.
    """

    rows: Tensor | None
    queries: Spans
    keys: Spans


@dataclass(frozen=True)
class FrameGroup:
    """Frames of the clips of a pack, and what they see of each other.

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
        """Frames that are all grids of `(rows, columns)` tokens.

        Args:
            clip_frames: `[B]` frames of each clip.
            grid: rows and columns of a frame's tokens.
            first_frames: `[B]` index that each clip's first frame has in its clip; all 0 unless given.
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
        """One sequence for each clip that has frames here."""
        return Spans(tuple(tokens for tokens in self.tokens_of_clips if tokens))

    @cached_property
    def pairs(self) -> int:
        """(query, key) pairs that are attended within the group."""
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

    @cached_property
    def _made(self) -> dict[tuple[str, torch.device], Any]:
        return {}

    def clip_of_frame(self, device: torch.device) -> Tensor:
        """`[F]` int64: the clip each frame belongs to."""
        return _get_or_make(self._made, "clip_of_frame", device, lambda: _clip_of_frame(self.clip_frames).to(device))

    def positions_on(self, device: torch.device) -> Tensor:
        """`positions` on `device`."""
        return _get_or_make(self._made, "positions", device, lambda: self.positions.to(device))

    def upper_triangle(self, device: torch.device) -> UpperTriangle | None:
        """The part of each frame that token-causal attention leaves out.

        None where it leaves out nothing: all frames have one token, or the group is not causal.
        """
        return _get_or_make(self._made, "upper_triangle", device, lambda: self._upper_triangle(device))

    def _upper_triangle(self, device: torch.device) -> UpperTriangle | None:
        lengths = torch.tensor(self.frame_tokens) - 1
        rows = int(lengths.sum())
        if not rows or not self.causal:
            return None
        # Row j of a frame that starts at token s and has n + 1 tokens is s + n - 1 - j.
        first_row, first_token = lengths.cumsum(0) - lengths, torch.tensor(Spans(self.frame_tokens).starts[:-1])
        last_plus_first = (first_token + lengths - 1 + first_row).repeat_interleave(lengths)
        queries = (last_plus_first - torch.arange(rows)).to(device)
        return UpperTriangle(queries, queries + 1, Spans(tuple(n - 1 for n in self.frame_tokens if n > 1)))

    def mask(self, device: torch.device) -> Tensor:
        """`[T, T]` bool, True where the query (row) may see the key (column): for the oracle, never for training."""
        frame_tokens = torch.tensor(self.frame_tokens, device=device)
        frame = torch.arange(self.frames, device=device).repeat_interleave(frame_tokens)
        clip = self.clip_of_frame(device).repeat_interleave(frame_tokens)
        same_clip = clip[:, None] == clip[None, :]
        return same_clip & (frame[:, None] >= frame[None, :]) if self.causal else same_clip


class AttentionPlan:
    """Which keys the tokens of a group see: those of the group as it says, and those of the prefix.

    torch's operators take tensors alone, and a compiled graph that took a plan's lengths as constants would be
    compiled anew for every pack. So an operator is handed `handle`, a number in a tensor, and finds the plan by it.

    Attributes:
        group: whose tokens they are.
        prefix: which of them see earlier keys; None where there are none.
        handle: int64 scalar tensor in host memory.
    """

    _living: ClassVar[weakref.WeakValueDictionary[int, AttentionPlan]] = weakref.WeakValueDictionary()
    _numbers: ClassVar[itertools.count[int]] = itertools.count()

    def __init__(self, group: FrameGroup, prefix: Prefix | None = None) -> None:
        self.group, self.prefix = group, prefix
        number = next(AttentionPlan._numbers)
        self.handle = torch.tensor(number)
        AttentionPlan._living[number] = self

    @staticmethod
    def find(handle: Tensor) -> AttentionPlan:
        """The plan of a handle.

        Raises:
            RuntimeError: nobody holds it any more; whoever computes with a group keeps it until after the backward.
        """
        plan = AttentionPlan._living.get(int(handle))
        if plan is None:
            raise RuntimeError("the layout of this attention call was dropped before its backward; keep it until then")
        return plan

    @cached_property
    def pairs(self) -> int:
        """Attended (query, key) pairs."""
        prefix = self.prefix
        seen = 0 if prefix is None else sum(map(operator.mul, prefix.queries.lengths, prefix.keys.lengths))
        return self.group.pairs + seen


@dataclass(frozen=True)
class FrameLayout:
    """The order of a pack.

    Attributes:
        clip_frames: `[B]` frames of each clip, none zero.
        window: the last frames of each clip.
        context: all earlier frames; a clip no longer than the window has none.
    """

    clip_frames: tuple[int, ...]
    window: FrameGroup
    context: FrameGroup

    @staticmethod
    def of(
        clip_frames: Sequence[int], grid: tuple[int, int], window: int, coarser: int = 0, causal: bool = True
    ) -> FrameLayout:
        """The layout of clips of uniform frames. Asked twice for the same, it gives the same object, with all that
        was derived from it.

        Args:
            clip_frames: `[B]` frames of each clip.
            grid: rows and columns of a window frame's tokens; P = rows * columns.
            window: how many of a clip's last frames are window frames.
            coarser: how many times wider and higher a context token is than a window token; Q = P / coarser^2.
                0: there is no context, and no clip may be longer than the window.
            causal: frame-block causal, or every token sees its whole clip; then without a context.

        Raises:
            ValueError: a clip without frames or too long, a grid that `coarser` does not divide, or a context in a
                layout that is not causal.
        """
        return _layout(tuple(clip_frames), grid, window, coarser, causal)

    @property
    def frames(self) -> int:
        """F, frames of all clips."""
        return sum(self.clip_frames)

    @property
    def tokens(self) -> int:
        """T, tokens of the pack, fine and coarse."""
        return self.window.tokens + self.context.tokens

    def tensors(self, device: torch.device) -> list[Tensor]:
        """All that computing on `device` asks for, made once: asked ahead, nothing is copied in the middle of it."""
        found = [self.clip_of_frame(device), self.window_rows(device), self.context_rows(device)]
        found.append(self.window.clip_of_frame(device))
        for order in (self.window_plan(device), self.context_plan):
            spans = [order.group.clips]
            found.append(order.group.positions_on(device))
            if (upper := order.group.upper_triangle(device)) is not None:
                found += [upper.queries, upper.keys]
                spans.append(upper.spans)
            if (prefix := order.prefix) is not None:
                found += [] if prefix.rows is None else [prefix.rows]
                spans += [prefix.queries, prefix.keys]
            found += [some.cumulative(device) for some in spans]
        return found

    @cached_property
    def window_pairs(self) -> int:
        """Attended (query, key) pairs whose query is a window token."""
        both = zip(self.window.tokens_of_clips, self.context.tokens_of_clips, strict=True)
        return self.window.pairs + sum(queries * keys for queries, keys in both)

    @property
    def attended_pairs(self) -> int:
        """All (query, key) pairs that are attended: the work attention cannot avoid."""
        return self.window_pairs + self.context.pairs

    @cached_property
    def _made(self) -> dict[tuple[str, torch.device], Any]:
        return {}

    def clip_of_frame(self, device: torch.device) -> Tensor:
        """`[F]` int64: the clip each frame of the pack belongs to."""
        return _get_or_make(self._made, "clip_of_frame", device, lambda: _clip_of_frame(self.clip_frames).to(device))

    def window_rows(self, device: torch.device) -> Tensor:
        """`[Fw]` int64: which of the pack's frames are the window group's."""
        return _get_or_make(self._made, "window_rows", device, lambda: self._rows(of_window=True).to(device))

    def context_rows(self, device: torch.device) -> Tensor:
        """`[Fc]` int64: which of the pack's frames are the context group's."""
        return _get_or_make(self._made, "context_rows", device, lambda: self._rows(of_window=False).to(device))

    def _rows(self, of_window: bool) -> Tensor:
        in_window = [
            frame >= frames - window
            for frames, window in zip(self.clip_frames, self.window.clip_frames, strict=True)
            for frame in range(frames)
        ]
        return torch.tensor([row for row, fine in enumerate(in_window) if fine == of_window], dtype=torch.int64)

    def window_plan(self, device: torch.device) -> AttentionPlan:
        """What the window tokens see: their clip's whole context, and of the window what `window.causal` says."""
        return _get_or_make(self._made, "window_plan", device, lambda: AttentionPlan(self.window, self.prefix(device)))

    @cached_property
    def context_plan(self) -> AttentionPlan:
        """What the context tokens see: each other, frame-block causally."""
        return AttentionPlan(self.context)

    def prefix(self, device: torch.device) -> Prefix | None:
        """What window tokens see of the contexts; None where no clip has any."""
        return _get_or_make(self._made, "prefix", device, lambda: self._prefix(device))

    def _prefix(self, device: torch.device) -> Prefix | None:
        if not self.context.frames:
            return None
        has_context = [tokens > 0 for tokens in self.context.tokens_of_clips]
        fine = self.window.tokens_of_clips
        rows = None
        if not all(has_context):
            sees = torch.tensor(has_context).repeat_interleave(torch.tensor(fine))
            rows = sees.nonzero().squeeze(1).to(device)
        queries = Spans(tuple(itertools.compress(fine, has_context)))
        return Prefix(rows, queries, self.context.clips)


@functools.lru_cache(maxsize=32)  # packs of drawn lengths hardly ever come twice
def _layout(
    clip_frames: tuple[int, ...], grid: tuple[int, int], window: int, coarser: int, causal: bool
) -> FrameLayout:
    if not clip_frames or min(clip_frames) < 1:
        raise ValueError(f"every clip needs at least one frame, got clips of {list(clip_frames)} frames")
    if not coarser and max(clip_frames) > window:
        raise ValueError(f"a clip of {max(clip_frames)} frames is longer than the window of {window}")
    if coarser and not causal:
        raise ValueError("a layout that is not causal has no context; coarser must be 0")
    if coarser and (grid[0] % coarser or grid[1] % coarser):
        raise ValueError(f"a frame of {grid[0]} x {grid[1]} tokens cannot be cut {coarser} times coarser")
    fine = tuple(min(frames, window) for frames in clip_frames)
    coarse = tuple(frames - in_window for frames, in_window in zip(clip_frames, fine, strict=True))
    coarse_grid = (grid[0] // coarser, grid[1] // coarser) if coarser else grid
    return FrameLayout(
        clip_frames,
        window=FrameGroup.of(fine, grid, first_frames=coarse, causal=causal),
        context=FrameGroup.of(coarse, coarse_grid, spacing=coarser),
    )


def _clip_of_frame(clip_frames: tuple[int, ...]) -> Tensor:
    return torch.arange(len(clip_frames)).repeat_interleave(torch.tensor(clip_frames))


def _get_or_make(
    made: dict[tuple[str, torch.device], Any], what: str, device: torch.device, make: Callable[[], T]
) -> T:
    if (what, device) not in made:
        made[what, device] = make()
    return made[what, device]  # type: ignore[no-any-return]
