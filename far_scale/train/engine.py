"""The engine of a run: the model sharded by DeepSpeed, and its optimizer state as fragments.

ZeRO shards the float32 weights and Adam's moments over the ranks, each stage in its own way. `fragments` gives all
stages one form, so that the EMA and the checkpoints need not know the stage:

    stage 0     each rank holds every parameter whole
    stage 1, 2  all parameters are concatenated and cut into equal parts: a rank holds whole and partial parameters
    stage 3     every parameter is cut into equal parts: a rank holds a part of each

What depends on DeepSpeed's internals is in deepspeed_adapter.py and deepspeed_update.py.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from far_scale.config.deepspeed_keys import KEY_STAGES
from far_scale.config.schema import OptimizerSection, TrainSection
from far_scale.distributed.process_group import Processes
from far_scale.model import FAR, FARConfig
from far_scale.model.attention import choose_kernel
from far_scale.model.attention.selection import KernelChoice
from far_scale.model.layers import HEAD_DIM, Block
from far_scale.train.deepspeed_adapter import (
    adam_optimizer,
    make_engine,
    master_weights,
    parameter_parts,
)
from far_scale.train.deepspeed_update import replace_update
from far_scale.train.sharding import Sharding
from far_scale.utils.errors import UserError


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter: views of the live float32 tensors that the optimizer updates.

    Attributes:
        name: the parameter's name in the model's state dict.
        size: number of elements of the whole parameter.
        offset: where this part starts in the flattened parameter.
        weight, exp_avg, exp_avg_sq: `[part]` float32, the master weights and Adam's two moments.
    """

    name: str
    size: int
    offset: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def check_computation(train: TrainSection, device: torch.device) -> KernelChoice:
    """Check the attention kernel and the compiler; returns the kernel.

    Raises:
        UserError: the kernel is unknown or not usable here, or there is no compiler for train.compile.
    """
    if train.compile:
        check_compiler(device)
    return choose_kernel(train.attention, device, compute_dtype(train), HEAD_DIM)


def check_compiler(device: torch.device) -> None:
    """Check before the first step that torch.compile can generate code for `device`.

    Raises:
        UserError: triton or a C++ compiler is missing.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("train.compile: triton is not installed; pip install triton, or train.compile=false")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("train.compile: there is no C++ compiler; install g++ (or set CXX), or train.compile=false")


def compute_dtype(train: TrainSection) -> torch.dtype:
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def build_model(config: FARConfig, seed: int) -> FAR:
    """The model with random initial weights, which depend only on `seed`: the same on every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAR(config)


def start_engine(
    model: FAR,
    optimizer: OptimizerSection,
    train: TrainSection,
    packs_per_step: int,
    processes: Processes,
    sharding: Sharding,
) -> Any:
    """Shard `model` over the processes; returns the DeepSpeed engine, for `optimizer_step`.

    Creates the optimizer's state, so that a checkpoint can be loaded (torch creates it in the first step).

    Args:
        packs_per_step: packs of each rank.
    """
    model.configure_execution(train.compile, train.activation_checkpointing, train.attention)
    model.to(processes.device)
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    on_gpu = processes.device.type == "cuda"
    engine = make_engine(model, adam, deepspeed_config(train, packs_per_step, on_gpu, sharding), Block)
    replace_update(engine, optimizer.clip_norm)
    for master in master_weights(engine):
        state = adam.state[master]
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    return engine


def deepspeed_config(train: TrainSection, packs_per_step: int, on_gpu: bool, sharding: Sharding) -> dict[str, Any]:
    """DeepSpeed's configuration, without gradient clipping, which `replace_update` adds."""
    bf16, stage = train.precision == "bf16", sharding.stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # If the packs' gradients are summed before DeepSpeed sees them, they count as one pass.
        "gradient_accumulation_steps": 1 if sharding.reduce_once else packs_per_step,
        "zero_optimization": {"stage": stage, "overlap_comm": on_gpu},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW; DeepSpeed's would be compiled at start
        "gradient_clipping": 0.0,  # else versions differ: newer ones clip at 1.0 by default
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**62,
    }
    if stage == 3:
        # Otherwise DeepSpeed replaces torch.nn.functional.linear in the whole process by one that rounds differently.
        config["zero_optimization"]["memory_efficient_linear"] = False
        config["zero_optimization"]["stage3_param_persistence_threshold"] = train.whole_below
    if bf16 and stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if train.deepspeed is not None:
        explicit = train.deepspeed.explicit_values()
        keys = {name: value for name, value in explicit.items() if stage in KEY_STAGES[name]}
        if "communication_data_type" in keys:
            config["communication_data_type"] = keys.pop("communication_data_type")
        config["zero_optimization"] |= keys
        if "offload_optimizer" in keys:
            config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, so that the guard can skip its steps
    if sharding.hpz > 1:
        config["zero_optimization"]["zero_hpz_partition_size"] = sharding.hpz
    return config


def call_before_adam(engine: Any, hook: Callable[[torch.optim.AdamW], None]) -> None:
    """Call `hook` with the optimizer before each of its steps, when `grad_norm` is known and gradients are clipped.

    ZeRO-3 steps the optimizer once for each of its parameter groups, several times for a large model.
    """
    adam_optimizer(engine).register_step_pre_hook(lambda adam, *_: hook(adam))


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in adam_optimizer(engine).param_groups:
        group["lr"] = learning_rate


def set_adam_step(engine: Any, step: int) -> None:
    """Set the number of steps in Adam's moments, for the bias correction."""
    for master in master_weights(engine):
        adam_optimizer(engine).state[master]["step"].fill_(step)


def fragments(engine: Any) -> list[Fragment]:
    """This rank's part of every parameter, in the model's order, without parameters that it holds nothing of."""
    state = adam_optimizer(engine).state
    result = []
    for part in parameter_parts(engine):
        masters = (part.master, state[part.master]["exp_avg"], state[part.master]["exp_avg_sq"])
        views = (tensor.detach().view(-1)[part.start : part.start + part.length] for tensor in masters)
        result.append(Fragment(part.name, part.size, part.offset, *views))
    return result
