"""The sides of the attention benchmark: the same attention computed in different ways, each with its natural tensors.

shape letters   B clips   L tokens of a clip, context and window   N heads   D head dim
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from far_scale.model.attention import attend
from far_scale.model.attention.kernel import Kernel
from far_scale.model.layers import HEAD_DIM
from far_scale.model.layout import FrameLayout, Spans

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5  # of 2 D operations an attended pair and head


class Found(NamedTuple):
    """Output and gradients of attention, each `[B, L, N, D]`."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Inputs(NamedTuple):
    """Each `[B, L, N, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


@dataclass(frozen=True)
class Case:
    """Clips of one length.

    Attributes:
        name: "FAR", where all frames have as many tokens, or "FAR-Long", where all but the last are context frames.
        layout: of all the clips.
        heads: N.
    """

    name: str
    layout: FrameLayout
    heads: int

    @property
    def clips(self) -> int:
        return len(self.layout.clip_frames)

    @property
    def frames(self) -> int:
        return self.layout.clip_frames[0]

    @cached_property
    def frame_tokens(self) -> tuple[int, ...]:
        """Tokens of each frame of one clip; all tokens are frame-block causal, context and window together."""
        groups = (self.layout.context, self.layout.window)
        return tuple(itertools.chain.from_iterable(g.frame_tokens[: g.clip_frames[0]] for g in groups))

    @cached_property
    def frame_ends(self) -> tuple[tuple[int, int], ...]:
        """The tokens `[first, last)` of each frame of one clip."""
        return tuple(itertools.pairwise((0, *itertools.accumulate(self.frame_tokens))))

    @property
    def tokens(self) -> int:
        """L."""
        return sum(self.frame_tokens)

    def flops(self, pairs: int, products: int) -> int:
        return products * 2 * pairs * self.heads * HEAD_DIM

    def draw(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Normal numbers, the same in every dtype, as they are rounded to bfloat16."""
        draw = torch.Generator().manual_seed(0)
        shape = (self.clips, self.tokens, self.heads, HEAD_DIM)
        return Inputs(*(torch.randn(shape, generator=draw).bfloat16().to(device, dtype) for _ in range(4)))


class Side(Protocol):
    """One way to compute the attention of a case."""

    pairs: int
    """Number of attended (query, key) pairs."""

    def forward(self) -> object: ...

    def both(self) -> object:
        """Forward and backward."""
        ...

    def found(self) -> Found | None:
        """The result of `both`; None where it computes something else than the case."""
        ...


class Ours:
    """One kernel as the model calls it: for the context, if any, and the window at once."""

    def __init__(self, case: Case, inputs: Inputs, kernel: str) -> None:
        layout = case.layout
        self.case, self.kernel, self.pairs = case, kernel, layout.attended_pairs
        self.plan = layout.plan
        self.tokens = [group.tokens for group in (layout.context, layout.window)]
        of_clip = [tokens // case.clips for tokens in self.tokens]
        q, k, v, self.dout = (torch.cat([part.flatten(0, 1) for part in x.split(of_clip, dim=1)]) for x in inputs)
        self.leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward(self) -> Tensor:
        """`[T, N, D]`, all of the context first."""
        return attend(*self.leaves, self.plan.handle, self.kernel)

    def both(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self.forward()
        return out, torch.autograd.grad(out, self.leaves, self.dout)

    def found(self) -> Found:
        out, gradients = self.both()
        return Found(*map(self._by_clip, (out, *gradients)))

    def _by_clip(self, x: Tensor) -> Tensor:
        """`[clips, T of a clip, N, D]`."""
        parts = (part.unflatten(0, (self.case.clips, -1)) for part in x.detach().split(self.tokens) if len(part))
        return torch.cat(list(parts), dim=1)


class Differentiable:
    """An ordinary function of heads-first q, k, v `[B, N, L, D]`, differentiated by torch."""

    def __init__(self, case: Case, inputs: Inputs, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.attention, self.pairs = attention, case.layout.attended_pairs
        self.leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        self.dout = inputs.dout

    def forward(self) -> Tensor:
        return self.attention(*(x.transpose(1, 2) for x in self.leaves)).transpose(1, 2)

    def both(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self.forward()
        return out, torch.autograd.grad(out, self.leaves, self.dout)

    def found(self) -> Found:
        out, gradients = self.both()
        return Found(out.detach(), *gradients)


class PlainCausal:
    """The upper limit: one plain causal call of a kernel, on sequences long enough to attend as many pairs."""

    def __init__(self, case: Case, inputs: Inputs, kernel: Kernel) -> None:
        of_clip = case.layout.attended_pairs // case.clips
        length = (math.isqrt(8 * of_clip + 1) - 1) // 2  # M (M + 1) / 2 pairs, at most those of the clip
        self.pairs = case.clips * length * (length + 1) // 2
        self.kernel, self.spans = kernel, Spans((length,) * case.clips)
        shape = (case.clips * length, case.heads, HEAD_DIM)
        self.q, self.k, self.v, self.dout = (
            torch.randn(shape, dtype=inputs.q.dtype, device=inputs.q.device) for _ in range(4)
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.kernel.forward(self.q, self.k, self.v, self.spans, self.spans, causal=True)

    def both(self) -> tuple[Tensor, ...]:
        out, lse = self.forward()
        return self.kernel.backward(self.dout, self.q, self.k, self.v, out, lse, self.spans, self.spans, causal=True)

    def found(self) -> None:
        self.both()


def dense_mask(case: Case, inputs: Inputs) -> Differentiable:
    """PyTorch's attention with an additive mask, as in the official code; the mask is built once, here."""
    frame = _frame_of_token(case, inputs.q.device)
    mask = torch.zeros(case.tokens, case.tokens, dtype=inputs.q.dtype, device=inputs.q.device)
    for row, (first, last) in enumerate(case.frame_ends):  # by frame: a second mask of that size may not fit
        mask[first:last].masked_fill_(frame > row, -torch.inf)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Differentiable(case, inputs, attention)


def prefix_loop(case: Case, inputs: Inputs) -> Differentiable:
    """A call for every frame, without a mask, over the keys of all frames up to it."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames = (
            F.scaled_dot_product_attention(q[:, :, first:last], k[:, :, :last], v[:, :, :last])
            for first, last in case.frame_ends
        )
        return torch.cat(list(frames), dim=2)

    return Differentiable(case, inputs, attention)


class FlexAttention(Differentiable):
    """PyTorch's compiled FlexAttention with a block mask, as its documentation shows; the mask is built once, here.

    On a CPU, where it has no backward, only `forward` works, without gradients.
    """

    def __init__(self, case: Case, inputs: Inputs, backend: Literal["AUTO", "FLASH"] = "AUTO") -> None:
        """
        Args:
            backend: "FLASH" has flash-attn-4 compute it by the same block mask.
        """
        device = inputs.q.device
        frame = _frame_of_token(case, device)
        same = len(set(case.frame_tokens)) == 1
        of_frame = case.frame_tokens[0]

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query // of_frame >= key // of_frame if same else frame[query] >= frame[key]

        on_gpu = device.type == "cuda"
        # Uncompiled, making the block mask holds several dense ones.
        make = torch.compile(create_block_mask) if on_gpu else create_block_mask
        mask = make(visible, None, None, case.tokens, case.tokens, device=str(device))
        compiled = torch.compile(flex_attention, dynamic=False)
        options = {} if backend == "AUTO" else {"kernel_options": {"BACKEND": backend}}
        super().__init__(case, inputs, lambda q, k, v: compiled(q, k, v, block_mask=mask, **options))
        if not on_gpu:
            self.leaves = [x.requires_grad_(False) for x in self.leaves]


def _frame_of_token(case: Case, device: torch.device) -> Tensor:
    """The frame index of each token of a clip, `[L]`."""
    tokens = torch.tensor(case.frame_tokens, device=device)
    return torch.arange(len(tokens), device=device).repeat_interleave(tokens)


@torch.no_grad()
def exact(case: Case, inputs: Inputs) -> Found:
    """The reference: softmax in float64, frame by frame, so that long clips fit, too."""
    q, k, v, dout = (x.double() for x in inputs)
    found = Found(*(torch.zeros_like(q) for _ in range(4)))
    scale = HEAD_DIM**-0.5
    for first, last in case.frame_ends:
        rows, keys = slice(first, last), slice(0, last)
        weights = torch.einsum("btnd,bsnd->bnts", q[:, rows], k[:, keys]).mul_(scale).softmax(-1)
        out = found.out[:, rows] = torch.einsum("bnts,bsnd->btnd", weights, v[:, keys])
        share = (out * dout[:, rows]).sum(-1).transpose(1, 2).unsqueeze(-1)  # [B, N, t, 1]
        found.dv[:, keys] += torch.einsum("bnts,btnd->bsnd", weights, dout[:, rows])
        scores = torch.einsum("btnd,bsnd->bnts", dout[:, rows], v[:, keys]).sub_(share).mul_(weights).mul_(scale)
        found.dq[:, rows] = torch.einsum("bnts,bsnd->btnd", scores, k[:, keys])
        found.dk[:, keys] += torch.einsum("bnts,btnd->bsnd", scores, q[:, rows])
    return found


def error(found: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the reference's largest number; NaN where there is one."""
    return float((found.detach() - reference).abs().max() / reference.abs().max())


def causal_frames(clips: int, frames: int, tokens: int, heads: int) -> Case:
    """`clips` clips of `frames` frames of `tokens` tokens."""
    return Case("FAR", FrameLayout.of((frames,) * clips, (1, tokens), window=frames), heads)


def long_frames(clips: int, frames: int, side: int, heads: int) -> Case:
    """Likewise, frames of `side` x `side` tokens, of which the last 16 are the window and all others are 16 times
    coarser context."""
    return Case("FAR-Long", FrameLayout.of((frames,) * clips, (side, side), window=16, coarsening=4), heads)
