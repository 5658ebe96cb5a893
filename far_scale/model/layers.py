"""The parts of a FAR block. They compute what the official code computes (arXiv 2503.19325, showlab/FAR), per frame
where it works per token: a condition is constant over a frame, so it is projected once a frame and broadcast.

    shape letters   F frames   P/Q tokens of a window/context frame   T tokens   N heads   D head dim   E = N * D width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale.layout import FrameGroup, FrameLayout
from far_scale.model.attention import Earlier, frame_attention

HEAD_DIM = 64
ROTARY_AXES = (16, 24, 24)  # of a head's 64 dimensions: frame, y, x
ROTARY_THETA = 10000.0
NORM_EPS = 1e-6
TIMESTEP_SINUSOIDS = 256


def linear(inputs: int, outputs: int, thirds: int = 1) -> nn.Linear:
    """A linear layer, Xavier-uniform with zero bias, as the official code starts all of them.

    Args:
        thirds: how many separate layers this one holds side by side, each to be initialised by its own fan-out.
    """
    layer = nn.Linear(inputs, outputs)
    for part in layer.weight.data.chunk(thirds):
        nn.init.xavier_uniform_(part)
    nn.init.zeros_(layer.bias)
    return layer


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts as zero, so that the block it modulates starts as the identity (adaLN-Zero)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def rotations(positions: Tensor) -> Tensor:
    """Unit complex numbers `[T, D/2]` (complex128) that rotate a token's channel pairs: 3-axis RoPE as in Flux.

    Args:
        positions: `[T, 3]` frame, y, x. Each axis turns its share of pairs by position * theta^(-2i/axis).
    """
    angles = []
    for axis, size in enumerate(ROTARY_AXES):
        exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
        angles.append(positions[:, axis, None] * ROTARY_THETA**-exponents)
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x `[T, N, D]` by `rotation` `[T, D/2]`, in float32 or better."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(precise.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without weights of x `[F, P, E]`, times 1 + scale, plus shift, both `[F, E]` (AdaLN)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1))


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update: x, update `[F, P, E]`, gate `[F, E]`."""
    return torch.addcmul(x, gate.unsqueeze(1), update)


class TimestepEmbedding(nn.Module):
    """256 sinusoids, cosines first, then a two-layer MLP: timesteps `[F]` -> `[F, E]`.

    The frequencies are 10000^(-i/127), i = 0..127 (diffusers' `downscale_freq_shift=1`); -1 (clean) is a timestep
    like any other here.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(TIMESTEP_SINUSOIDS, width)
        self.out = nn.Linear(width, width)
        for layer in (self.up, self.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = TIMESTEP_SINUSOIDS // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * steps / (half - 1))
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.up.weight.dtype)
        return self.out(F.silu(self.up(sinusoids)))


class Unread(nn.Module):
    """Weights of the official model that its computation never reads, kept so that they come back unchanged.

    They are buffers: in the state dict, but neither trained nor sharded.
    """

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Attention(nn.Module):
    """Frame-block causal self-attention with fused q/k/v, RMSNorm on q and k, and rotary positions.

    With `context`, context tokens have projections and norms of their own. In the last block nothing reads what
    would become of them, so there they give keys and values only.
    """

    def __init__(self, heads: int, context: bool, last: bool) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.heads, self.last = heads, last
        self.qkv = linear(width, 3 * width, thirds=3)
        self.norm_q = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        self.out = linear(width, width)
        if context:
            self.context_qkv = linear(width, 3 * width, thirds=3)
            self.context_norm_q = Unread(weight=torch.ones(HEAD_DIM)) if last else nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
            self.context_norm_k = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
            if not last:
                self.context_out = linear(width, width)

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Window tokens x `[F, P, E]`, rotation `[T, D/2]` -> q, k, v `[T, N, D]`, q and k rotated."""
        q, k, v = self._heads(self.qkv(x), 3)
        return rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation), v

    def project_context(self, x: Tensor, rotation: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Context tokens x `[F, Q, E]`, rotation `[T, D/2]` -> q (None in the last block), k, v `[T, N, D]`."""
        if self.last:
            width = x.shape[-1]
            kv = F.linear(x, self.context_qkv.weight[width:], self.context_qkv.bias[width:])
            k, v = self._heads(kv, 2)
            return None, rotate(self.context_norm_k(k), rotation), v
        q, k, v = self._heads(self.context_qkv(x), 3)
        return rotate(self.context_norm_q(q), rotation), rotate(self.context_norm_k(k), rotation), v

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`[F, P, parts * E]` -> parts of `[F * P, N, D]`, views."""
        return x.flatten(0, 1).unflatten(-1, (parts, self.heads, HEAD_DIM)).unbind(1)


class MLP(nn.Module):
    """Four times wider, tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each behind a modulated norm and a gate made of the frame's condition.

    Window and context share the modulation, the norms and the MLP.
    """

    def __init__(self, heads: int, context: bool = False, last: bool = False) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.attention_modulation = zero_linear(width, 3 * width)
        self.attention = Attention(heads, context, last)
        self.mlp_modulation = zero_linear(width, 3 * width)
        self.mlp = MLP(width)

    def forward(
        self,
        window: Tensor,
        window_condition: Tensor,
        window_rotation: Tensor,
        layout: FrameLayout,
        context: Tensor | None = None,
        context_condition: Tensor | None = None,
        context_rotation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer over a pack.

        Args:
            window: `[Fw, P, E]`.
            window_condition: `[Fw, E]`, SiLU taken already.
            window_rotation: `[Fw * P, D/2]`.
            layout: the pack's order.
            context, context_condition, context_rotation: likewise `[Fc, Q, E]`, `[Fc, E]` and `[Fc * Q, D/2]`, in a
                model with context. Fc may be 0: a pack of short clips still uses, and sends gradients to, every weight,
                as ranks that gather and reduce them together need.

        Returns:
            The window `[Fw, P, E]` and the context `[Fc, Q, E]` (None after the last block and without a context).
        """
        earlier = None
        if context is not None:
            assert context_condition is not None and context_rotation is not None
            context, k, v = self.context(context, context_condition, context_rotation, layout.context)
            earlier = Earlier(k, v, layout.prefix(window.device))
        window, _, _ = self.window(window, window_condition, window_rotation, layout.window, earlier)
        return window, context

    def window(
        self, x: Tensor, condition: Tensor, rotation: Tensor, group: FrameGroup, earlier: Earlier | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer over window frames x `[F, P, E]`: the new x, and k and v `[T, N, D]`."""
        shift, scale, gate = self.attention_modulation(condition).chunk(3, dim=-1)
        q, k, v = self.attention.project(modulated_norm(x, scale, shift), rotation)
        seen = frame_attention(q, k, v, group, earlier).reshape(x.shape)
        return self.add_mlp(gated(x, gate, self.attention.out(seen)), self.mlp_modulation(condition)), k, v

    def window_keys(self, x: Tensor, condition: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Only the k and v that `window` gives."""
        shift, scale, _ = self.attention_modulation(condition).chunk(3, dim=-1)
        _, k, v = self.attention.project(modulated_norm(x, scale, shift), rotation)
        return k, v

    def context(
        self, x: Tensor, condition: Tensor, rotation: Tensor, group: FrameGroup, earlier: Earlier | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The layer over context frames x `[F, Q, E]`, likewise; in the last block the new x is None."""
        shift, scale, gate = self.attention_modulation(condition).chunk(3, dim=-1)
        q, k, v = self.attention.project_context(modulated_norm(x, scale, shift), rotation)
        if q is None:
            return None, k, v
        seen = frame_attention(q, k, v, group, earlier).reshape(x.shape)
        return self.add_mlp(gated(x, gate, self.attention.context_out(seen)), self.mlp_modulation(condition)), k, v

    def add_mlp(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x `[F, P, E]`, modulation `[F, 3 E]` -> `[F, P, E]`."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return gated(x, gate, self.mlp(modulated_norm(x, scale, shift)))


class Output(nn.Module):
    """The last modulated norm (scale first here, then shift, as officially) and the linear layer to a patch."""

    def __init__(self, width: int, patch_channels: int) -> None:
        super().__init__()
        self.modulation = zero_linear(width, 2 * width)
        self.out = zero_linear(width, patch_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x `[F, P, E]`, condition `[F, E]` -> `[F, P, patch_channels]`."""
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        return self.out(modulated_norm(x, scale, shift))
