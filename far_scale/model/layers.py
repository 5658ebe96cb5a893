"""The parts of a FAR block. They compute what the official code computes (arXiv 2503.19325, showlab/FAR), per frame
where it works per token: a condition is constant over a frame, so it is projected once a frame and broadcast.

    shape letters   F frames   P tokens a frame   T = F * P tokens   N heads   D head dim   E = N * D width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale.layout import FrameLayout
from far_scale.model.attention import frame_attention

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


class Attention(nn.Module):
    """Frame-block causal self-attention with fused q/k/v, RMSNorm on q and k, and rotary positions."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.heads = heads
        self.qkv = linear(width, 3 * width, thirds=3)
        self.norm_q = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        self.out = linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor, layout: FrameLayout) -> Tensor:
        """x `[F, P, E]`, rotation `[T, D/2]` -> `[F, P, E]`."""
        q, k, v = self.qkv(x).view(-1, 3, self.heads, HEAD_DIM).unbind(1)
        q, k = rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation)
        return self.out(frame_attention(q, k, v, layout).reshape(x.shape))


class MLP(nn.Module):
    """Four times wider, tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each behind a modulated norm and a gate made of the frame's condition."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.attention_modulation = zero_linear(width, 3 * width)
        self.attention = Attention(heads)
        self.mlp_modulation = zero_linear(width, 3 * width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor, layout: FrameLayout) -> Tensor:
        """x `[F, P, E]`, condition `[F, E]` (SiLU taken already), rotation `[T, D/2]` -> `[F, P, E]`."""
        shift, scale, gate = self.attention_modulation(condition).chunk(3, dim=-1)
        x = torch.addcmul(x, gate.unsqueeze(1), self.attention(modulated_norm(x, scale, shift), rotation, layout))
        shift, scale, gate = self.mlp_modulation(condition).chunk(3, dim=-1)
        return torch.addcmul(x, gate.unsqueeze(1), self.mlp(modulated_norm(x, scale, shift)))


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
