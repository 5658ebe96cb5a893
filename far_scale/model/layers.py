"""The layers of a FAR block. They compute the same function as the official code (arXiv 2503.19325, showlab/FAR), but
a condition, which is constant over a frame, is projected once per frame and broadcast, not once per token.

    shape letters   F frames   P/Q tokens of a window/context frame   T tokens   N heads   D head dim   E = N * D width
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from far_scale.model.attention import attend, attend_sharded
from far_scale.model.layout import AttentionPlan
from far_scale.model.sharded_layout import ShardedPlan

HEAD_DIM = 64
ROTARY_AXES = (16, 24, 24)  # of a head's 64 dimensions: frame, y, x
ROTARY_THETA = 10000.0
NORM_EPS = 1e-6
TIMESTEP_SINUSOIDS = 256

Checkpointing = Literal["none", "attention-kept", "full"]


def linear(inputs: int, outputs: int, parts: int = 1) -> nn.Linear:
    """A linear layer, initialised Xavier-uniform with zero bias as in the official code.

    Args:
        parts: number of layers fused into this one, each initialised with its own fan-out.
    """
    layer = nn.Linear(inputs, outputs)
    for part in layer.weight.data.chunk(parts):
        nn.init.xavier_uniform_(part)
    nn.init.zeros_(layer.bias)
    return layer


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer initialised to zero, so that the block it modulates starts as the identity (adaLN-Zero)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def rotary_embedding(positions: Tensor) -> Tensor:
    """Cosine and sine `[T, D/2, 2]` (float64) of 3-axis rotary embeddings, as in Flux.

    Args:
        positions: `[T, 3]` frame, y, x. Pair i of an axis' channels is rotated by position * theta^(-2i/axis).
    """
    angles = []
    for axis, size in enumerate(ROTARY_AXES):
        exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
        angles.append(positions[:, axis, None] * ROTARY_THETA**-exponents)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def apply_rotary(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x `[T, N, D]` by `rotation` `[T, D/2, 2]`, in float32 or better."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Real arithmetic, which the compiler fuses with the preceding norm and the following layout change.
        cos, sin = rotation[:, None].unbind(-1)
        first, second = pairs.unbind(-1)
        rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    else:
        # The same as one complex product, in one kernel.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation)[:, None])
    return rotated.flatten(-2).to(x.dtype)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """AdaLN: LayerNorm without weights of x `[F, P, E]`, times 1 + scale, plus shift, both `[F, E]`."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1))


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update: x, update `[F, P, E]`, gate `[F, E]`."""
    return torch.addcmul(x, gate.unsqueeze(1), update)


class TimestepEmbedding(nn.Module):
    """256 sinusoids, cosines first, then a two-layer MLP: timesteps `[F]` -> `[F, E]`.

    The frequencies are 10000^(-i/127), i = 0..127 (diffusers' `downscale_freq_shift=1`); -1 (clean) is
    treated like any other timestep.
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
        embedding: Tensor = self.out(F.silu(self.up(sinusoids)))
        return embedding


class UnusedWeights(nn.Module):
    """Weights of the official model that its computation does not use, kept for an identical export.

    They are buffers: in the state dict, but neither trained nor sharded.
    """

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Attention(nn.Module):
    """Frame-block causal self-attention with fused q/k/v, RMSNorm on q and k, and rotary positions.

    With `context`, context tokens have their own projections and norms. In the last block their outputs are unused, so
    they only provide keys and values.
    """

    def __init__(self, heads: int, context: bool, last: bool) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.heads, self.last = heads, last
        self.qkv = linear(width, 3 * width, parts=3)
        self.norm_q = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        self.out = linear(width, width)
        if context:
            self.context_qkv = linear(width, 3 * width, parts=3)
            self.context_norm_q = (
                UnusedWeights(weight=torch.ones(HEAD_DIM)) if last else nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
            )
            self.context_norm_k = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
            if not last:
                self.context_out = linear(width, width)

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Window tokens x `[F, P, E]`, rotation `[T, D/2, 2]` -> q, k, v `[T, N, D]`, q and k rotated."""
        q, k, v = self._heads(self.qkv(x), 3)
        return apply_rotary(self.norm_q(q), rotation), apply_rotary(self.norm_k(k), rotation), v

    def project_context(self, x: Tensor, rotation: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Context tokens x `[F, Q, E]`, rotation `[T, D/2, 2]` -> q (None in the last block), k, v `[T, N, D]`."""
        if self.last:
            width = x.shape[-1]
            kv = F.linear(x, self.context_qkv.weight[width:], self.context_qkv.bias[width:])
            k, v = self._heads(kv, 2)
            return None, apply_rotary(self.context_norm_k(k), rotation), v
        q, k, v = self._heads(self.context_qkv(x), 3)
        return apply_rotary(self.context_norm_q(q), rotation), apply_rotary(self.context_norm_k(k), rotation), v

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`[F, P, parts * E]` -> parts of `[F * P, N, D]`, views."""
        heads: Tensor = x.flatten(0, 1).unflatten(-1, (parts, self.heads, HEAD_DIM))
        return heads.unbind(1)


class MLP(nn.Module):
    """Two linear layers, four times the width between them, with tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class Tokens(NamedTuple):
    """A pack's tokens between the layers.

    Attributes:
        x: `[Fw, P, E]` of the window.
        condition: `[F, E]` of each frame, after its SiLU, the context's frames first.
        rotation: `[T, D/2, 2]` rotary cosine and sine, the context's tokens first.
        handle: of the `AttentionPlan`.
        context: `[Fc, Q, E]`; None in a model without context.
    """

    x: Tensor
    condition: Tensor
    rotation: Tensor
    handle: Tensor
    context: Tensor | None = None


class Block(nn.Module):
    """Attention, then MLP, each with a modulated norm and a gate computed from the frame's condition.

    Window and context share the modulation, the norms and the MLP.

    Attributes:
        compiled: whether to run as one compiled graph, shared by all blocks.
        checkpointing: what training recomputes in the backward: nothing, all but attention's outputs, or everything.
    """

    def __init__(self, heads: int, context: bool = False, last: bool = False) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.attention_modulation = zero_linear(width, 3 * width)
        self.attention = Attention(heads, context, last)
        self.mlp_modulation = zero_linear(width, 3 * width)
        self.mlp = MLP(width)
        self.compiled = False
        self.checkpointing: Checkpointing = "none"

    def forward(self, kernel: str, *tensors: Tensor, sharded: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run the block over a pack.

        Args:
            kernel: name of the attention kernel.
            sharded: whether the tensors are of this rank's frames only, and the handle is of a `ShardedPlan`.
            tensors: `Tokens`, with the handle of the plan of all tokens, in the last block of that of the window's.
                They are passed flat since module hooks, such as ZeRO-3's, see only arguments that are tensors. Fc may
                be 0: a pack of short clips still uses every weight, since gathers and reductions are collective.

        Returns:
            The window `[Fw, P, E]` and the context `[Fc, Q, E]` (None after the last block and without a context).
        """
        tokens = Tokens(*tensors)
        if not self.compiled or not _is_compilable(tokens, sharded):
            return _layer(self, tokens, kernel, sharded)
        for tensor in (tokens.x, tokens.condition, tokens.rotation, tokens.context):
            # The number of frames differs between packs; without the mark, the graph would be specialized to the
            # first pack's. (Marked here, since ZeRO's hooks replace the model's tensors.)
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return _compiled_layer()(self, tokens, kernel, sharded)

    def compute(self, tokens: Tokens, kernel: str, sharded: bool) -> tuple[Tensor, Tensor | None]:
        """`forward` without compilation and checkpointing.

        Weights that window and context share are multiplied with the tokens of both at once, and one attention call
        serves both. Tensors of both have the context's rows first.
        """
        x, condition, rotation, handle, context = tokens
        run = attend_sharded if sharded else attend
        if context is None:
            shift, scale, gate = self.attention_modulation(condition).chunk(3, dim=-1)
            q, k, v = self.attention.project(modulated_norm(x, scale, shift), rotation)
            attended = run(q, k, v, handle, kernel).reshape(x.shape)
            x = gated_residual(x, gate, self.attention.out(attended))
            return self.add_mlp(x, self.mlp_modulation(condition)), None

        frames, rows = [len(context), len(x)], [context.shape[0] * context.shape[1], x.shape[0] * x.shape[1]]
        context_rotation, rotation = rotation.split(rows)
        context_modulation, modulation = self.attention_modulation(condition).split(frames)
        shift, scale, context_gate = context_modulation.chunk(3, dim=-1)
        context_q, context_k, context_v = self.attention.project_context(
            modulated_norm(context, scale, shift), context_rotation
        )
        shift, scale, gate = modulation.chunk(3, dim=-1)
        q, k, v = self.attention.project(modulated_norm(x, scale, shift), rotation)
        k, v = torch.cat([context_k, k]), torch.cat([context_v, v])
        if context_q is None:
            attended = run(q, k, v, handle, kernel).reshape(x.shape)
            x = gated_residual(x, gate, self.attention.out(attended))
            return self.add_mlp(x, self.mlp_modulation(condition[frames[0] :])), None

        context_attended, attended = run(torch.cat([context_q, q]), k, v, handle, kernel).split(rows)
        context_update = self.attention.context_out(context_attended.reshape(context.shape))
        context = gated_residual(context, context_gate, context_update)
        x = gated_residual(x, gate, self.attention.out(attended.reshape(x.shape)))

        context_modulation, modulation = self.mlp_modulation(condition).split(frames)
        shift, scale, context_gate = context_modulation.chunk(3, dim=-1)
        context_normed = modulated_norm(context, scale, shift)
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normed = torch.cat([context_normed.flatten(0, 1), modulated_norm(x, scale, shift).flatten(0, 1)])
        context_update, update = self.mlp(normed).split(rows)
        return (
            gated_residual(x, gate, update.view(x.shape)),
            gated_residual(context, context_gate, context_update.view(context.shape)),
        )

    def window(self, tokens: Tokens, prefix_k: Tensor, prefix_v: Tensor, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
        """The block over window tokens, which also see prefix keys and values `[S, N, D]`: x, k and v `[T, N, D]`."""
        x, condition, rotation, handle, _ = tokens
        shift, scale, gate = self.attention_modulation(condition).chunk(3, dim=-1)
        q, k, v = self.attention.project(modulated_norm(x, scale, shift), rotation)
        attended = attend(q, torch.cat([prefix_k, k]), torch.cat([prefix_v, v]), handle, kernel).reshape(x.shape)
        return self.add_mlp(gated_residual(x, gate, self.attention.out(attended)), self.mlp_modulation(condition)), k, v

    def window_kv(self, x: Tensor, condition: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Only the k and v of `window`."""
        shift, scale, _ = self.attention_modulation(condition).chunk(3, dim=-1)
        _, k, v = self.attention.project(modulated_norm(x, scale, shift), rotation)
        return k, v

    def context(
        self, tokens: Tokens, prefix_k: Tensor, prefix_v: Tensor, kernel: str
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The block over context tokens, given as `Tokens.x`, like `window`; in the last block the new x is None."""
        x, condition, rotation, handle, _ = tokens
        shift, scale, gate = self.attention_modulation(condition).chunk(3, dim=-1)
        q, k, v = self.attention.project_context(modulated_norm(x, scale, shift), rotation)
        if q is None:
            return None, k, v
        attended = attend(q, torch.cat([prefix_k, k]), torch.cat([prefix_v, v]), handle, kernel).reshape(x.shape)
        update = self.attention.context_out(attended)
        return self.add_mlp(gated_residual(x, gate, update), self.mlp_modulation(condition)), k, v

    def add_mlp(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Add the MLP to x `[F, P, E]`, with modulation `[F, 3 E]`."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return gated_residual(x, gate, self.mlp(modulated_norm(x, scale, shift)))


def _is_compilable(tokens: Tokens, sharded: bool) -> bool:
    """Whether the compiler does not specialize on the numbers of frames, as it does on 1 (single frames are too rare to
    be worth a graph); the same on all ranks that share a pack, since a compiled backward reduces gradients in another
    order."""
    if sharded:
        plan = AttentionPlan.find(tokens.handle)
        assert isinstance(plan, ShardedPlan)
        return plan.compilable
    return len(tokens.x) != 1 and (tokens.context is None or len(tokens.context) != 1)


def _layer(block: Block, tokens: Tokens, kernel: str, sharded: bool) -> tuple[Tensor, Tensor | None]:
    if block.checkpointing == "none" or not block.training:
        return block.compute(tokens, kernel, sharded)
    options: dict[str, Any] = {"context_fn": _save_attention_outputs} if block.checkpointing == "attention-kept" else {}
    computed: tuple[Tensor, Tensor | None] = checkpoint(
        block.compute, tokens, kernel, sharded, use_reentrant=False, preserve_rng_state=False, **options
    )
    return computed


def _save_attention_outputs() -> Any:
    operators = torch.ops.far_scale
    return create_selective_checkpoint_contexts(
        [operators.frame_attention.default, operators.sharded_attention.default]
    )


@functools.cache
def _compiled_layer() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """One graph for all blocks; weights and attention plan are its inputs."""
    return torch.compile(_layer)


class OutputHead(nn.Module):
    """The last modulated norm (scale first, then shift, as in the official code) and the linear layer to a patch."""

    def __init__(self, width: int, patch_channels: int) -> None:
        super().__init__()
        self.modulation = zero_linear(width, 2 * width)
        self.out = zero_linear(width, patch_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x `[F, P, E]`, condition `[F, E]` -> `[F, P, patch_channels]`."""
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.out(modulated_norm(x, scale, shift))
        return out
