"""The official code's weights (showlab/FAR, `FAR` and `FAR_Long` of far/models) as ours, and ours as theirs.

Every tensor goes over bit for bit, both ways. Ours hold a block's three projections to q, k and v as one, in this
order; else the two differ in names only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from far_scale.convert.fit import check_fit, empty_model
from far_scale.model import FARConfig
from far_scale.model.layers import HEAD_DIM
from far_scale.utils.errors import UserError

MODULES = {
    "patch_embedding": "x_embedder",
    "context_patch_embedding": "context_embedder",
    "timestep_embedding.up": "timestep_embedder.linear_1",
    "timestep_embedding.out": "timestep_embedder.linear_2",
    "output.modulation": "norm_out.linear",
    "output.out": "proj_out",
    "context_output": "context_proj_out",
}
"""Our module's name -> the official one's."""

BLOCK_MODULES = {
    "attention_modulation": ("norm1.linear",),
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.norm_q": ("attn.norm_q",),
    "attention.norm_k": ("attn.norm_k",),
    "attention.out": ("attn.to_out.0",),
    "attention.context_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attention.context_norm_q": ("attn.norm_added_q",),
    "attention.context_norm_k": ("attn.norm_added_k",),
    "attention.context_out": ("attn.to_add_out",),
    "mlp_modulation": ("norm2.linear",),
    "mlp.up": ("mlp.net.0.proj",),
    "mlp.down": ("mlp.net.2",),
}
"""The same within a block; several are stacked along the first axis."""

ACTIONS, LABELS = "action_embedder.embedding_table.weight", "label_embedder.embedding_table.weight"
PARALLEL_PREFIX = "module."  # DistributedDataParallel puts it before every name


def to_far_scale(
    state_dict: Mapping[str, Tensor], window: int = 16, patch: int = 1
) -> tuple[FARConfig, dict[str, Tensor]]:
    """An official state dict as a FARConfig and the state dict of `FAR(config)`.

    Args:
        state_dict: of the official FAR or FAR_Long, also with DistributedDataParallel's `module.` before the names. It
            is not changed; tensors keep their dtype, and all but the stacked ones are the same tensors.
        window: window frames, which the tensors do not tell; 16 officially.
        patch: side of a window frame's patch in latent pixels; only patch^2 x channels is in the tensors. 1 officially.

    Raises:
        UserError: tensors that are missing, unexpected, of another shape or of several dtypes, named.
    """
    if state_dict and all(name.startswith(PARALLEL_PREFIX) for name in state_dict):
        state_dict = {name.removeprefix(PARALLEL_PREFIX): tensor for name, tensor in state_dict.items()}
    config = _find_config(state_dict, window, patch)
    names, expected = _names_and_shapes(config)
    check_fit("official weights: this file", expected, state_dict, "it is not of the official FAR or FAR_Long")
    return config, {ours: _stack([(name, state_dict[name]) for name in theirs]) for ours, theirs in names.items()}


def from_far_scale(config: FARConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_far_scale`: the state dict of `FAR(config)` under the official code's names.

    The official model needs `patch_size=config.patch`, `context_patch_size=config.context_patch`,
    `short_term_ctx_winsize=config.window` and its `condition_cfg`; the file holds none of them. The tensors are views.

    Raises:
        UserError: tensors that are not those of `config`, named, or a model that is not causal.
    """
    if not config.causal:
        raise UserError(
            "these weights: model.causal is false, and the official code has causal models alone; export them "
            "with --format model"
        )
    shapes = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    check_fit("these weights: the model", shapes, state_dict, "config and weights do not fit together")
    official: dict[str, Tensor] = {}
    for ours, theirs in _names_and_shapes(config)[0].items():
        official.update(zip(theirs, state_dict[ours].chunk(len(theirs)), strict=True))
    return official


def _find_config(state: Mapping[str, Tensor], window: int, patch: int) -> FARConfig:
    """The model's shape, as far as a few tensors tell it; the others are checked against it afterwards."""
    embedding = state.get("x_embedder.weight")
    blocks = {match[1] for name in state if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    if embedding is None or embedding.ndim != 2 or not blocks:
        some = ", ".join(list(state)[:3]) or "nothing"
        raise UserError(
            f"official weights: misses x_embedder.weight or transformer_blocks.0 and what follows, has {some}, ...; "
            "it is not of the official FAR or FAR_Long"
        )
    width, inputs = embedding.shape
    if width % HEAD_DIM or patch < 1 or not inputs or inputs % patch**2:
        raise UserError(
            f"official weights: x_embedder.weight is {[width, inputs]}, which is not a width in heads of {HEAD_DIM} by "
            f"channels x patch^2 with patch={patch}; give the patch that the model was trained with"
        )
    channels = inputs // patch**2
    actions = _length(state, ACTIONS, 0)
    labels = 0 if actions else _length(state, LABELS, 0)
    try:
        return FARConfig(
            layers=len(blocks),
            heads=width // HEAD_DIM,
            patch=patch,
            channels=channels,
            window=window,
            actions=max(actions - 1, 0),  # less the null class
            labels=max(labels - 1, 0),
            context_patch=math.isqrt(_length(state, "context_embedder.weight", 1) // channels),
        )
    except ValueError as error:
        raise UserError(f"official weights: {error}") from None


def _length(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    """How long a matrix is; 0 where there is none."""
    return state[name].shape[axis] if name in state and state[name].ndim == 2 else 0


def _names_and_shapes(config: FARConfig) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """Our names -> the official names of their parts, and the official names -> shapes."""
    names: dict[str, list[str]] = {}
    shapes: dict[str, list[int]] = {}
    for ours, tensor in empty_model(config).state_dict().items():
        names[ours] = _official_names(ours, config)
        length, *rest = tensor.shape
        shapes |= {name: [length // len(names[ours]), *rest] for name in names[ours]}
    return names, shapes


def _official_names(name: str, config: FARConfig) -> list[str]:
    if name == "condition_embedding.weight":
        return [ACTIONS if config.actions else LABELS]
    module, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return [f"transformer_blocks.{block[1]}.{part}.{kind}" for part in BLOCK_MODULES[block[2]]]
    return [f"{MODULES[module]}.{kind}"]


def _stack(parts: list[tuple[str, Tensor]]) -> Tensor:
    tensors = [tensor for _, tensor in parts]
    if len(tensors) == 1:
        return tensors[0]
    if len({tensor.dtype for tensor in tensors}) > 1:  # stacking would round some of them
        found = ", ".join(f"{name} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in parts)
        raise UserError(f"official weights: {found}; these must be of one dtype")
    return torch.cat(tensors)
