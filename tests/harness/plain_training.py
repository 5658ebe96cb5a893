"""The reference that training over many ranks is held against: the same steps in plain PyTorch on one process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from far_scale.config.recipe import load_recipe
from far_scale.data.loader.pack_loader import PackLoader
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.shard_set import ShardSet
from far_scale.train.curriculum import stages
from far_scale.train.engine import build_model
from far_scale.train.flow_matching import add_noise, pack_loss
from far_scale.train.lr_schedule import learning_rate
from harness.launch import small_recipe


class Plain(NamedTuple):
    """The loss and the gradient's norm before clipping of each step, and the EMA after the last one by name."""

    losses: list[float]
    norms: list[float]
    ema: dict[str, torch.Tensor]


def train_plainly(shards: Path, *more: str) -> Plain:
    """`small_recipe` with the overrides `more` on `shards`, in float32."""
    spec, *overrides = small_recipe(shards, Path("unused"), *more)
    recipe = load_recipe(spec, overrides)
    shard_set = ShardSet.open(shards)
    scaling = LatentScaling.of(shard_set.manifest, recipe.data.scaling)
    model = build_model(recipe.far_config(), recipe.seed).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1.0, betas=recipe.optimizer.betas, weight_decay=0.0)
    ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, norms, decay = [], [], recipe.optimizer.ema_decay
    (stage,) = stages(recipe)
    with PackLoader(shard_set, scaling, range(recipe.data.lanes), stage.packing(recipe.seed)) as loader:
        for step, packs in zip(range(recipe.train.steps), loader, strict=False):
            adam.param_groups[0]["lr"] = learning_rate(recipe.optimizer, recipe.train.steps, step)
            adam.zero_grad()
            total = 0.0
            for pack in packs:
                noisy = add_noise(pack, recipe.objective, recipe.far_config(), recipe.seed)
                velocity = model(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
                loss = pack_loss(velocity, noisy) / recipe.data.lanes
                loss.backward()
                total += loss.item()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm).item())
            adam.step()
            for name, parameter in model.named_parameters():
                ema[name] = decay * ema[name] + (1 - decay) * parameter.detach()
            losses.append(total)
    return Plain(losses, norms, ema)
