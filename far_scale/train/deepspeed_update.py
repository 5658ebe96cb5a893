"""Replaces what DeepSpeed does between backward and Adam's step: checks of the gradient, and passes over memory.

DeepSpeed's own checks (is the gradient finite? larger than the clip norm?) make the host wait for the device in every
step, differ between stages, and hide a norm that is not finite. Here the gradient is only clipped, on the device, and
far_scale/train/step_guard.py decides about the step.

Passes over memory are cut where the result stays the same: to the last bit in bf16, within rounding in float32. Their
bytes are in docs/performance.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from far_scale.distributed.ledger import phase
from far_scale.train.deepspeed_adapter import (
    BF16_GRADIENTS,
    STAGE_1_2,
    STAGE_3,
    adam_optimizer,
    grad_norm,
    installed_version,
    master_weights,
)
from far_scale.train.pack_gradients import PackGradients


def replace_update(engine: Any, clip_norm: float) -> None:
    """Replace the checks and the passes of a new engine.

    Afterwards `grad_norm` is the real norm, even if not finite. DeepSpeed's setting for the checks
    (bf16.check_grad_overflow) leaves most of them, and its versions check in different places. So these methods are
    replaced on the instance, and one function in its modules.

    Args:
        clip_norm: maximum norm of the gradient that Adam takes.
    """
    wrapper, stage, bf16 = engine.optimizer, engine.zero_optimization_stage(), engine.bfloat16_enabled()
    if stage == 0:
        wrapper._global_grad_norm = torch.zeros((), device=engine.device)
    if stage == 0 and bf16:
        wrapper.step = lambda: _step_bf16_stage_0(engine, clip_norm)
        return
    if stage == 1 and bf16:
        _replace_bf16_stage_1(engine, clip_norm)
        return
    adam_optimizer(engine).register_step_pre_hook(lambda adam, *_: _clip(engine, adam, clip_norm))
    if stage == 0:
        return
    # ZeRO replaces a norm that is not finite by -1, with a copy that the host waits for; newer versions then check it.
    wrapper.get_grad_norm_direct = _zero_norm
    wrapper.unscale_and_clip_grads = lambda gradients, norm: None
    if stage < 3:
        wrapper.check_grad_overflow = False
    else:
        wrapper.complete_grad_norm_calculation_for_cpu_offload = lambda params: _offloaded_norm(engine, params)
        wrapper.flatten = _join
    module = importlib.import_module(STAGE_3 if stage == 3 else STAGE_1_2)
    if installed_version() >= (0, 19, 8):
        module.is_invalid_grad_norm = lambda norm: False  # type: ignore[attr-defined]


def _clip(engine: Any, adam: torch.optim.AdamW, clip_norm: float) -> None:
    """Before Adam's step: clip the gradient, with ZeRO-0 after its norm is found.

    In float32 Adam's fused kernel divides, which takes no pass of its own. A quotient differs from DeepSpeed's product
    in the last bit. Some bf16 weights would then be rounded the other way, and differ by 1e-4 after 10 steps.
    """
    stepped = [tensor for group in adam.param_groups for tensor in group["params"] if tensor.grad is not None]
    if engine.zero_optimization_stage() == 0:
        norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in stepped])  # every rank has the whole gradient
        engine.optimizer._global_grad_norm = norm
    scale = ((grad_norm(engine) + 1e-6) / clip_norm).clamp(min=1.0).to(stepped[0].device)  # the host's if offloaded
    if engine.bfloat16_enabled():
        torch._foreach_mul_([tensor.grad for tensor in stepped], 1 / scale)
    else:
        adam.grad_scale = scale  # type: ignore[attr-defined]


def _clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """`[1]`: what to multiply a gradient by, as in `torch.nn.utils.clip_grads_with_norm_`."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0).reshape(1)


def _zero_norm(gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: float = 2) -> Tensor:
    """The norm over all ranks' gradients; `gradients` are this rank's. Replaces ZeRO's `get_grad_norm_direct`."""
    real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    if real:
        squares = torch.stack(torch._foreach_norm(real, norm_type, torch.float32)).square().sum()
    else:
        squares = torch.zeros((), device=params[0].device)
    with phase("norm"):
        dist.all_reduce(squares)
    return squares.sqrt()


def _offloaded_norm(engine: Any, params: Sequence[nn.Parameter]) -> Tensor:
    """The norm over all ranks of the gradients of a parameter group in main memory, as a CPU tensor."""
    group, *_ = engine.optimizer.grad_position[engine.optimizer.get_param_id(params[0])]
    squares: Tensor = torch.linalg.vector_norm(master_weights(engine)[group].grad).square().to(engine.device)
    with phase("norm"):
        dist.all_reduce(squares)
    return squares.sqrt().cpu()


@torch.no_grad()
def _step_bf16_stage_0(engine: Any, clip_norm: float) -> None:
    """Stage 0 in bf16; replaces DeepSpeed's step, which makes the host wait for a check of every gradient."""
    masters, parameters = master_weights(engine), list(engine.module.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
    factor = _clip_factor(norm, clip_norm)
    for parameter, master in zip(parameters, masters, strict=True):
        # A factor of shape [1], not [], makes the product float32.
        master.grad = torch.zeros_like(master) if parameter.grad is None else torch.mul(parameter.grad, factor)
    engine.optimizer._global_grad_norm = norm
    adam_optimizer(engine).step()
    torch._foreach_copy_(parameters, masters)
    for master in masters:
        master.grad = None


def _replace_bf16_stage_1(engine: Any, clip_norm: float) -> None:
    """Stage 1 in bf16; replaces DeepSpeed's step, which makes the host wait for checks of the norm, and its gradients.

    DeepSpeed adds each pack's gradients to a float32 buffer by way of float32 copies, casts that to the dtype of the
    reduction and the reduced sum back, and clears it twice a step: passes over the whole model on every rank.
    """
    wrapper = engine.optimizer
    (parameters,), (weights,) = wrapper.bf16_groups, wrapper.bf16_groups_flat
    for name in BF16_GRADIENTS:
        getattr(wrapper, name).clear()
    packs = engine.gradient_accumulation_steps()
    gradients = PackGradients(parameters, len(weights), engine.communication_data_type, packs)
    ranks = dist.get_world_size()
    is_power_of_2 = ranks & (ranks - 1) == 0
    if is_power_of_2:
        engine.gradient_average = False  # dividing by it is exact, and needs no pass: `_step_bf16_stage_1` does it
    wrapper._global_grad_norm = torch.zeros((), device=engine.device)
    wrapper.update_hp_grads = lambda clear_lp_grads=False: gradients.add()
    wrapper.get_grads_for_reduction = lambda: ([gradients.flat], {})
    wrapper.clear_hp_grads = gradients.clear
    wrapper.step = lambda: _step_bf16_stage_1(engine, gradients, clip_norm, ranks if is_power_of_2 else 1)


@torch.no_grad()
def _step_bf16_stage_1(engine: Any, gradients: PackGradients, clip_norm: float, divisor: int) -> None:
    """Step Adam by this rank's part of the reduced gradient, divided by `divisor`."""
    (master,) = master_weights(engine)
    start = dist.get_rank() * len(master)
    part = gradients.flat[start : start + len(master)]
    if part.device.type == "cpu":
        part = part.float()  # there the norm and the product would each make a float32 copy, more slowly than this
    norm = _zero_norm([part], [master]) / divisor
    factor = _clip_factor(norm, clip_norm) / divisor
    if gradients.sums is not None:
        master.grad = torch.mul(part, factor, out=gradients.sums[start : start + len(master)])
    elif part.dtype == torch.float32:
        master.grad = part.mul_(factor)
    else:
        master.grad = torch.mul(part, factor)  # float32, since the factor's shape is [1]
    engine.optimizer._global_grad_norm = norm
    adam_optimizer(engine).step()
    master.grad = None
    engine.optimizer.update_lp_params()


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """`tensors` end to end in one; without a copy where they lie so in memory, as ZeRO-3's gradients do."""
    first, length = tensors[0], 0
    for tensor in tensors:
        beside = tensor.is_contiguous() and tensor.dtype == first.dtype
        if not beside or tensor.data_ptr() != first.data_ptr() + length * first.element_size():
            return torch.cat([tensor.reshape(-1) for tensor in tensors])
        length += tensor.numel()
    return first.as_strided((length,), (1,))
