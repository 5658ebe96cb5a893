"""FlexAttention: PyTorch's compiled attention with a block mask, beside the kernels of `causal_pair`.

A token sees at most two ranges of keys, one of the prefix and one of the group, so the mask is four numbers a token.
The block mask is computed from these, never from a dense mask, and cached as long as its plan lives.

    shape letters   T tokens of the group   K keys, those of the prefix first   N heads   D head dim
                    R, C blocks of queries, of keys
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from far_scale.model.attention.kernel import GPURequirements
from far_scale.model.layout import AttentionPlan, to_device

NAME = "flex"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NEEDS = GPURequirements(DTYPES, lowest=(8, 0))
_BLOCK = 128
_SMALLEST_HEAD = 16  # for the matrix products of the compiled kernels


def unusable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See `Kernel.unusable_reason`."""
    if device.type == "cpu":
        return "FlexAttention has no backward on a CPU"
    if head_dim < _SMALLEST_HEAD:
        return f"takes heads from {_SMALLEST_HEAD} on, not of {head_dim}"
    return _NEEDS.unusable_reason(device, dtype, head_dim)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> Tensor:
    """See `operators.attend`: q `[T, N, D]`, k, v `[K, N, D]` -> `[T, N, D]`.

    A compiled caller's graph breaks here: the mask's tensors belong to the pack, not to the graph.
    """
    if not len(q):
        return q + k + v  # empty, and every input gets an (empty) gradient
    plan = AttentionPlan.find(handle)
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out: Tensor = _attention(q.device.type)(*heads_first, block_mask=block_mask(plan, q.device))
    return out.squeeze(0).transpose(0, 1)


@functools.cache
def _attention(device_type: str) -> Any:
    # Compiled, it never materializes the scores `[N, T, K]`; on a CPU, used only by tests, compiling is too slow.
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def prepare(plan: AttentionPlan, device: torch.device) -> list[Tensor]:
    """Make the plan's block mask on `device`; returns its tensors."""
    seen, mask = _mask(plan, device)
    return [*seen, *(x for x in mask.as_tuple() if isinstance(x, Tensor))]


def block_mask(plan: AttentionPlan, device: torch.device) -> BlockMask:
    """The plan's block mask, made once for each device."""
    return _mask(plan, device)[1]


def _mask(plan: AttentionPlan, device: torch.device) -> tuple[_VisibleRanges, BlockMask]:
    def make() -> tuple[_VisibleRanges, BlockMask]:
        seen = _visible_ranges(plan, device)
        return seen, _block_mask(seen, plan)

    return plan.cache.get(NAME, device, make)


class _VisibleRanges(NamedTuple):
    """`[T]` each: of the K keys a token sees those in `[first, last)` and in `[group_first, group_last)`."""

    first: Tensor
    last: Tensor
    group_first: Tensor
    group_last: Tensor


def _visible_ranges(plan: AttentionPlan, device: torch.device) -> _VisibleRanges:
    group, prefix, first_key = plan.group, plan.prefix, plan.first_key
    frame_tokens, clip_tokens = torch.tensor(group.frame_tokens), torch.tensor(group.clips.lengths)
    group_first = first_key + torch.tensor(group.clips.starts[:-1]).repeat_interleave(clip_tokens)
    if group.causal:
        group_last = first_key + frame_tokens.cumsum(0).repeat_interleave(frame_tokens)
    else:
        group_last = first_key + torch.tensor(group.clips.starts[1:]).repeat_interleave(clip_tokens)
    first, last = torch.zeros_like(group_first), torch.zeros_like(group_first)
    if prefix is not None:
        rows = slice(-prefix.queries.starts[-1], None) if prefix.rows is None else prefix.rows
        query_tokens, ends = torch.tensor(prefix.queries.lengths), torch.tensor(prefix.keys.starts)
        first[rows] = ends[:-1].repeat_interleave(query_tokens)
        last[rows] = ends[1:].repeat_interleave(query_tokens)
    # int32, since the kernels read these in their innermost loop.
    return _VisibleRanges(*(to_device(x.int(), device) for x in (first, last, group_first, group_last)))


def _block_mask(seen: _VisibleRanges, plan: AttentionPlan) -> BlockMask:
    tokens = len(seen.first)
    block_starts = torch.arange(0, plan.keys, _BLOCK, device=seen.first.device)  # [C]
    some = torch.zeros(-(-tokens // _BLOCK) * _BLOCK, len(block_starts), dtype=torch.bool, device=seen.first.device)
    every = some.clone()
    for first, last in ((seen.first, seen.last), (seen.group_first, seen.group_last)):
        first, last = first[:, None], last[:, None]
        some[:tokens] |= (first < block_starts + _BLOCK) & (last > block_starts) & (first < last)
        every[:tokens] |= (first <= block_starts) & (last >= block_starts + _BLOCK)
    some, every = some.unflatten(0, (-1, _BLOCK)).any(1), every.unflatten(0, (-1, _BLOCK)).all(1)  # [R, C]
    first, last, group_first, group_last = seen

    def group_mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= group_first[query]) & (key < group_last[query])

    def prefix_and_group_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= first[query]) & (key < last[query])) | group_mask(batch, head, query, key)

    visible, partial = group_mask if plan.prefix is None else prefix_and_group_mask, some & ~every
    # The query lists are those that `from_kv_blocks` would derive; its way sets a global of torch.fx, which must not
    # happen in the prefetch thread while another one compiles.
    return BlockMask(
        (tokens, plan.keys),
        *_block_lists(partial),
        *_block_lists(every),
        *_block_lists(partial.T),
        *_block_lists(every.T),
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=visible,
    )


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`[R, C]` bool -> True blocks in each row, `[1, 1, R]`, and all blocks, True ones first, `[1, 1, R, C]`."""
    blocks = blocks.contiguous()
    count = blocks.sum(1, dtype=torch.int32)
    listed = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], listed[None, None]
