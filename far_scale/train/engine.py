"""The engine of a run: the model sharded by DeepSpeed as decided, and its optimizer state as fragments.

ZeRO cuts the float32 weights and Adam's moments over the ranks, each stage in its own way. `fragments` gives every
stage's cut in one form, so that the EMA and the checkpoints need not know the stage:

    stage 0     each rank holds every parameter whole
    stage 1, 2  all parameters laid end to end, cut into equal runs: a rank holds a run of whole and partial parameters
    stage 3     every parameter by itself cut into equal runs: a rank holds a piece of each

What depends on DeepSpeed's internals is in deepspeed_adapter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from far_scale.config.deepspeed_keys import KEY_STAGES
from far_scale.config.recipe import Recipe
from far_scale.distributed.process_group import Processes
from far_scale.model import FAR
from far_scale.model.layers import Block
from far_scale.train.deepspeed_adapter import adam_of, clips_here, leave_steps_to_us, make_engine, masters, parts
from far_scale.train.sharding import Sharding


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter: views of the live float32 tensors that the optimizer updates.

    Attributes:
        name: the parameter's name in the model's state dict.
        size: numbers in the whole parameter.
        offset: where this part starts in the flattened parameter.
        weight, exp_avg, exp_avg_sq: `[part]` float32, the master weights and Adam's two moments.
    """

    name: str
    size: int
    offset: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def start_engine(model: FAR, recipe: Recipe, processes: Processes, sharding: Sharding) -> Any:
    """Shard `model` over the processes as decided; returns the DeepSpeed engine, which `one_step` steps.

    The optimizer's state exists at once (torch makes it
    at the first step), so that it can be loaded before.
    """
    model.configure_execution(recipe.train.compile, recipe.train.activation_checkpointing, recipe.train.attention)
    model.to(processes.device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.optimizer.learning_rate,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
        fused=True,
    )
    engine = make_engine(model, optimizer, deepspeed_config(recipe, processes, sharding), Block)
    leave_steps_to_us(engine, recipe.optimizer.clip_norm)
    for master in masters(engine):
        state = optimizer.state[master]
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    return engine


def deepspeed_config(recipe: Recipe, processes: Processes, sharding: Sharding) -> dict[str, Any]:
    """The configuration that DeepSpeed is started with."""
    bf16, stage = recipe.train.precision == "bf16", sharding.stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # Where the packs' gradients are summed before DeepSpeed sees them, it is to count them as one pass.
        "gradient_accumulation_steps": 1 if sharding.reduce_once else recipe.data.lanes // processes.world_size,
        "gradient_clipping": 0.0 if clips_here(stage, bf16) else recipe.optimizer.clip_norm,
        "zero_optimization": {"stage": stage, "overlap_comm": processes.device.type == "cuda"},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW; DeepSpeed's would be compiled on the spot
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**62,
    }
    if stage == 3:
        # Otherwise DeepSpeed replaces torch.nn.functional.linear in the whole process by one that rounds differently.
        config["zero_optimization"]["memory_efficient_linear"] = False
        config["zero_optimization"]["stage3_param_persistence_threshold"] = recipe.train.whole_below
    if bf16 and stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if recipe.train.deepspeed is not None:
        given = {
            name: value for name, value in recipe.train.deepspeed.explicit_values().items() if stage in KEY_STAGES[name]
        }
        if "communication_data_type" in given:
            config["communication_data_type"] = given.pop("communication_data_type")
        config["zero_optimization"] |= given
        if "offload_optimizer" in given:
            config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, whose steps the guard can skip
    if sharding.hpz > 1:
        config["zero_optimization"]["zero_hpz_partition_size"] = sharding.hpz
    return config


def before_adam(engine: Any, do: Callable[[torch.optim.AdamW], None]) -> None:
    """Call `do` with the optimizer before each of its steps, when `grad_norm` is known and the gradients are clipped.

    ZeRO-3 steps the optimizer once for each of its groups of parameters, several times for a large model.
    """
    adam_of(engine).register_step_pre_hook(lambda adam, *_: do(adam))


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """What the next step uses."""
    for group in adam_of(engine).param_groups:
        group["lr"] = learning_rate


def set_adam_step(engine: Any, step: int) -> None:
    """Tell the optimizer how many steps its moments have seen (for the bias correction)."""
    for master in masters(engine):
        adam_of(engine).state[master]["step"].fill_(step)


def fragments(engine: Any) -> list[Fragment]:
    """This rank's part of every parameter, in the model's order; parameters it has no part of are left out."""
    state = adam_of(engine).state
    found = []
    for part in parts(engine):
        whole = (part.master, state[part.master]["exp_avg"], state[part.master]["exp_avg_sq"])
        own = (tensor.detach().view(-1)[part.start : part.start + part.length] for tensor in whole)
        found.append(Fragment(part.name, part.size, part.offset, *own))
    return found
