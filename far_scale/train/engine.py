"""DeepSpeed around the model: the engine of a recipe, and its optimizer state as fragments of named parameters.

ZeRO cuts the float32 weights and Adam's moments over the ranks, each stage in its own way. `fragments` gives every
stage's cut in one form, so that the EMA and the checkpoints need not know the stage:

    stage 0     each rank holds every parameter whole
    stage 1, 2  all parameters laid end to end, cut into equal runs: a rank holds a run of whole and partial parameters
    stage 3     every parameter by itself cut into equal runs: a rank holds a piece of each

DeepSpeed's own ways to judge a step (is the gradient finite? larger than the clip norm?) make the host wait for the
device in every step, differ from stage to stage, and hide the norm where it is not finite. `_leave_steps_to_us` takes
them out: here the gradient is only clipped, on the device, and far_scale/train/faults/guard.py decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from far_scale.distributed.ledger import phase
from far_scale.model import FAR
from far_scale.model.layers import Block
from far_scale.recipe import Recipe
from far_scale.recipe_deepspeed import STAGES
from far_scale.train.processes import Processes
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
    """Shard `model` over the processes as decided; returns the DeepSpeed engine.

    One optimizer step follows lanes / ranks backward passes. The optimizer's state exists at once (torch makes it
    at the first step), so that it can be loaded before.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model.run_as(recipe.train.compile, recipe.train.activation_checkpointing, recipe.train.attention)
    model.to(processes.device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.optimizer.learning_rate,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
        fused=True,
    )
    if sharding.stage == 3:
        # Gather a block's weights in one go: an eighth of the messages and hooks of gathering each layer's by itself.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
    config = deepspeed_config(recipe, processes, sharding)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    _leave_steps_to_us(engine, recipe.optimizer.clip_norm)
    for master in _masters(engine):
        state = optimizer.state[master]
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    return engine


def deepspeed_config(recipe: Recipe, processes: Processes, sharding: Sharding) -> dict[str, Any]:
    """The configuration that DeepSpeed is started with."""
    bf16, stage = recipe.train.precision == "bf16", sharding.stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": recipe.data.lanes // processes.count,
        "gradient_clipping": 0.0 if _clips_here(stage, bf16) else recipe.optimizer.clip_norm,
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
        given = {name: value for name, value in recipe.train.deepspeed.given().items() if stage in STAGES[name]}
        if "communication_data_type" in given:
            config["communication_data_type"] = given.pop("communication_data_type")
        config["zero_optimization"] |= given
    if sharding.hpz > 1:
        config["zero_optimization"]["zero_hpz_partition_size"] = sharding.hpz
    return config


def _leave_steps_to_us(engine: Any, clip_norm: float) -> None:
    """Keep DeepSpeed from judging gradients; `grad_norm` is true afterwards, also where it is not finite.

    DeepSpeed's one setting for this (bf16.check_grad_overflow) leaves most of it, and its versions (0.16 to 0.19 were
    tried) judge in different places: so these methods are replaced on the instance, and one function in its modules.
    """
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    if _clips_here(stage, engine.bfloat16_enabled()):
        wrapper._global_grad_norm = torch.zeros((), device=engine.device)
        _adam(engine).register_step_pre_hook(lambda *_: _clip(engine, clip_norm))
        if engine.bfloat16_enabled():
            wrapper.step = (lambda: _step_bf16_whole(engine)) if stage == 0 else (lambda: _step_bf16_runs(engine))
        return
    # ZeRO puts -1 for a norm that is not finite, by a copy that the host waits for; and newer versions then ask.
    wrapper.get_grad_norm_direct = _zero_norm
    wrapper.check_grad_overflow = False
    for module in (stage3, stage_1_and_2):
        if hasattr(module, "is_invalid_grad_norm"):
            module.is_invalid_grad_norm = lambda norm: False


def _clips_here(stage: int, bf16: bool) -> bool:
    """Whether the gradient is clipped by `_clip`; otherwise by ZeRO, as it goes through its parts."""
    return stage == 0 or (stage == 1 and bf16)


def _clip(engine: Any, clip_norm: float) -> None:
    """Before Adam's step: clip the masters' gradients and keep their norm."""
    masters = _masters(engine)
    gradients = [master.grad for master in masters if master.grad is not None]
    if engine.zero_optimization_stage() == 0:
        norm = torch.nn.utils.get_total_norm(gradients)  # every rank holds all of it
    else:
        norm = _zero_norm(gradients, masters)
    torch.nn.utils.clip_grads_with_norm_(masters, clip_norm, norm)
    engine.optimizer._global_grad_norm = norm


def _zero_norm(gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: float = 2) -> Tensor:
    """The norm of all ranks' `gradients`, this rank's parts of them; in place of ZeRO's `get_grad_norm_direct`."""
    own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    if own:
        squares = torch.stack(torch._foreach_norm(own, norm_type, torch.float32)).square().sum()
    else:
        squares = torch.zeros((), device=params[0].device)
    with phase("norm"):
        dist.all_reduce(squares)
    return squares.sqrt()


def _step_bf16_whole(engine: Any) -> None:
    """Stage 0 in bf16, in place of DeepSpeed's step, which asks the device about every gradient."""
    masters = _masters(engine)
    with torch.no_grad():
        for parameter, master in zip(engine.module.parameters(), masters, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
        _adam(engine).step()
        for parameter, master in zip(engine.module.parameters(), masters, strict=True):
            parameter.copy_(master)
            master.grad = None


def _step_bf16_runs(engine: Any) -> None:
    """Stage 1 in bf16, in place of DeepSpeed's step, which asks whether the norm is finite and whether to clip."""
    wrapper = engine.optimizer
    for master, gradient in zip(_masters(engine), wrapper.fp32_groups_gradient_flat_partition, strict=True):
        master.grad = gradient
    _adam(engine).step()
    wrapper.update_lp_params()
    wrapper.clear_hp_grads()


def communication_backend() -> Any:
    """The object by whose methods DeepSpeed starts its collectives."""
    from deepspeed.comm import comm

    return comm.cdb


def before_adam(engine: Any, do: Callable[[torch.optim.AdamW], None]) -> None:
    """Call `do` with the optimizer before each of its steps, when `grad_norm` is known and the gradients are clipped.

    ZeRO-3 steps the optimizer once for each of its groups of parameters, several times for a large model.
    """
    _adam(engine).register_step_pre_hook(lambda adam, *_: do(adam))


def grad_norm(engine: Any) -> Tensor:
    """The global norm of this step's gradient before clipping, on the device: a scalar, the same on all ranks."""
    return engine.optimizer._global_grad_norm.detach().reshape(())


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """What the next step uses."""
    for group in _adam(engine).param_groups:
        group["lr"] = learning_rate


def set_adam_step(engine: Any, step: int) -> None:
    """Tell the optimizer how many steps its moments have seen (for the bias correction)."""
    for master in _masters(engine):
        _adam(engine).state[master]["step"].fill_(step)


def fragments(engine: Any) -> list[Fragment]:
    """This rank's part of every parameter, in the model's order; parameters it has no part of are left out."""
    return list(_fragments(engine))


def use_loaded_weights(engine: Any) -> None:
    """After the fragments' weights were written to: bring the weights that the model computes with in line."""
    stage = engine.zero_optimization_stage()
    with torch.no_grad():
        if stage == 3:
            engine.empty_partition_cache()  # gathered copies of the old weights would be used silently
            by_name = {fragment.name: fragment for fragment in fragments(engine)}
            for name, parameter in engine.module.named_parameters():
                if name in by_name:
                    fragment = by_name[name]
                    parameter.ds_tensor[: len(fragment.weight)].copy_(fragment.weight)
            engine.optimizer.invalidate_secondary_tensor()  # hpZ's copies, which may be of the old weights too
        elif stage > 0:
            engine.optimizer.update_lp_params()
        elif engine.bfloat16_enabled():
            for parameter, master in zip(engine.module.parameters(), _masters(engine), strict=True):
                parameter.copy_(master)


def _adam(engine: Any) -> torch.optim.AdamW:
    """The optimizer given to `start_engine`, whatever DeepSpeed wrapped around it."""
    return engine.basic_optimizer


def _masters(engine: Any) -> list[Tensor]:
    """The float32 tensors that the optimizer steps."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [master for group in _adam(engine).param_groups for master in group["params"]]


def _fragments(engine: Any) -> Iterator[Fragment]:
    stage, state = engine.zero_optimization_stage(), _adam(engine).state
    named = list(engine.module.named_parameters())
    if stage == 0:
        for (name, parameter), master in zip(named, _masters(engine), strict=True):
            moments = state[master]
            flat = (x.detach().view(-1) for x in (master, moments["exp_avg"], moments["exp_avg_sq"]))
            yield Fragment(name, parameter.numel(), 0, *flat)
    elif stage == 3:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for name, parameter in named:
            part = parameter.ds_tensor.numel()
            offset = torch.distributed.get_rank() * part
            length = min(part, parameter.ds_numel - offset)  # the last ranks' parts end in padding
            if length > 0:
                moments = (safe_get_local_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq"))
                tensors = (x.view(-1)[:length] for x in (safe_get_local_fp32_param(parameter), *moments))
                yield Fragment(name, parameter.ds_numel, offset, *tensors)
    else:
        (master,) = _masters(engine)  # one parameter group, so one run
        moments = state[master]
        for name, parameter in named:
            mapping = parameter._hp_mapping
            if mapping is not None:
                start, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                flat = (x.detach()[start : start + length] for x in (master, moments["exp_avg"], moments["exp_avg_sq"]))
                yield Fragment(name, parameter.numel(), mapping.lp_fragment_address.start, *flat)
