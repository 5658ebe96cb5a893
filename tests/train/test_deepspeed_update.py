"""Between backward and Adam's step: the same update as of torch's or DeepSpeed's clipping, in fewer passes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from far_scale.train import deepspeed_update
from far_scale.train.pack_gradients import PackGradients

SHAPES, CLIP_NORM = ((40, 30), (7,), (20, 10)), 1.0
STEPS = (0.01, 10.0, 3.0)
"""Size of the gradient in each step: the first is not clipped."""


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(step)
    return [(torch.randn(shape, generator=numbers) * STEPS[step]).to(dtype) for shape in SHAPES]


def masters() -> list[nn.Parameter]:
    numbers = torch.Generator().manual_seed(99)
    return [nn.Parameter(torch.randn(shape, generator=numbers)) for shape in SHAPES]


def adam_of(weights: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=True)


def engine_of(
    adam: torch.optim.AdamW, stage: int, wrapper: Any, module: nn.Module | None = None, bf16: bool = True
) -> Any:
    return types.SimpleNamespace(
        basic_optimizer=adam,
        optimizer=wrapper,
        module=module,
        device=torch.device("cpu"),
        zero_optimization_stage=lambda: stage,
        bfloat16_enabled=lambda: bf16,
    )


def expected(dtype: torch.dtype, scale: float = 1.0) -> tuple[list[Tensor], list[float]]:
    """Weights after the steps, and the norms, of torch's own functions on gradients times `scale`."""
    weights, norms = masters(), []
    adam = adam_of(weights)
    for step in range(len(STEPS)):
        for weight, gradient in zip(weights, gradients(step, dtype), strict=True):
            weight.grad = gradient.float() * scale
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)))
        adam.step()
    assert norms[0] < CLIP_NORM < norms[1]
    return [weight.detach() for weight in weights], norms


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-6, atol=1e-7)


def test_adam_clips_as_it_reads_the_gradient() -> None:
    """In float32, within rounding: dividing by norm / limit, where torch multiplies by limit / norm."""
    wanted, norms = expected(torch.float32)
    weights = masters()
    adam, wrapper = adam_of(weights), types.SimpleNamespace(_global_grad_norm=None)
    engine = engine_of(adam, 0, wrapper, bf16=False)
    adam.register_step_pre_hook(lambda adam, *_: deepspeed_update._clip(engine, adam, CLIP_NORM))
    for step, norm in enumerate(norms):
        given = gradients(step, torch.float32)
        for weight, gradient in zip(weights, given, strict=True):
            weight.grad = gradient.clone()
        adam.step()
        assert float(wrapper._global_grad_norm) == norm, "before clipping"
        assert (adam.grad_scale.item() > 1) == (step > 0)  # type: ignore[attr-defined]
        untouched = [torch.equal(gradient, weight.grad) for gradient, weight in zip(given, weights, strict=True)]  # type: ignore[arg-type]
        assert all(untouched) == (step == 0), "a gradient that is not clipped keeps every bit"
    assert_close(list(weights), wanted)


@pytest.mark.parametrize("norm", [0.5, 7.3])
def test_bf16_clips_as_deepspeed_does(norm: float) -> None:
    """To the last bit: ZeRO-2 and -3, whose norm DeepSpeed has found."""
    weights, given = masters(), gradients(1, torch.float32)
    wrapper = types.SimpleNamespace(_global_grad_norm=torch.tensor(norm))
    adam = adam_of(weights)
    for weight, gradient in zip(weights, given, strict=True):
        weight.grad = gradient.clone()
    deepspeed_update._clip(engine_of(adam, 3, wrapper), adam, CLIP_NORM)
    factor = 1 / ((torch.tensor(norm) + 1e-6) / CLIP_NORM).clamp(min=1.0)
    for weight, gradient in zip(weights, given, strict=True):
        assert weight.grad is not None and torch.equal(weight.grad, gradient * factor)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(bf16: bool) -> None:
    weights = masters()
    adam, wrapper = adam_of(weights), types.SimpleNamespace(_global_grad_norm=None)
    engine = engine_of(adam, 0, wrapper, bf16=bf16)
    adam.register_step_pre_hook(lambda adam, *_: deepspeed_update._clip(engine, adam, CLIP_NORM))
    adam.found_inf = torch.ones(())  # type: ignore[attr-defined]  # as the guard sets it
    for weight in weights:
        weight.grad = torch.full_like(weight, float("nan"))
    adam.step()
    assert all(map(torch.equal, weights, masters())) and not wrapper._global_grad_norm.isfinite()
    assert all(float(adam.state[weight]["step"]) == 0 for weight in weights)


def test_stage_0_in_bf16_clips_in_the_cast() -> None:
    wanted, norms = expected(torch.bfloat16)
    weights = masters()
    model = nn.ParameterList([nn.Parameter(weight.detach().bfloat16()) for weight in weights])
    wrapper = types.SimpleNamespace(_global_grad_norm=None)
    engine = engine_of(adam_of(weights), 0, wrapper, model)
    for step, norm in enumerate(norms):
        for parameter, gradient in zip(model, gradients(step, torch.bfloat16), strict=True):
            parameter.grad = gradient
        deepspeed_update._step_bf16_stage_0(engine, CLIP_NORM)
        assert float(wrapper._global_grad_norm) == pytest.approx(norm, rel=1e-6)
    assert_close(list(weights), wanted)
    assert all(torch.equal(parameter, weight.bfloat16()) for parameter, weight in zip(model, weights, strict=True))
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["reduced in bf16", "reduced in float32"])
def test_stage_1_in_bf16_takes_its_part_of_the_reduced_sum(
    packs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of 2 ranks that have the same gradients: the sum over the ranks is divided by them on the way to Adam."""
    reductions: list[Callable[[Tensor], Tensor]] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda squares: reductions[-1](squares))
    wanted, norms = expected(torch.bfloat16, float(packs))
    model = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    flat = torch.cat([weight.detach().flatten() for weight in masters()])
    length = -(-len(flat) // 4) * 4
    flat = torch.cat([flat, torch.zeros(length - len(flat))])
    half = length // 2
    master = nn.Parameter(flat[half:].clone())
    wrapper = types.SimpleNamespace(_global_grad_norm=None, update_lp_params=lambda: None)
    engine = engine_of(adam_of([master]), 1, wrapper)
    sums = PackGradients(model, length, dtype, packs)
    for step, norm in enumerate(norms):
        for _ in range(packs):
            for parameter, gradient in zip(model, gradients(step, torch.bfloat16), strict=True):
                parameter.grad = gradient
            sums.add()
        sums.flat.mul_(2)  # the reduction over both ranks
        other = sums.flat[:half].float().square().sum()
        reductions.append(lambda squares, other=other: squares.add_(other))  # type: ignore[misc]
        deepspeed_update._step_bf16_stage_1(engine, sums, CLIP_NORM, divisor=2)
        sums.clear()
        assert float(wrapper._global_grad_norm) == pytest.approx(norm, rel=1e-6)
    whole = torch.cat([weight.flatten() for weight in wanted])
    assert_close([master.detach()[: len(whole) - half]], [whole[half:]])


def test_zero_3_reads_gradients_where_they_lie() -> None:
    buffer = torch.arange(12.0)
    parts = [buffer[2:5], buffer[5:6], buffer[6:10]]
    joined = deepspeed_update._join(parts)
    assert torch.equal(joined, buffer[2:10]) and joined.data_ptr() == parts[0].data_ptr()
    for apart in ([buffer[0:2], buffer[3:5]], [buffer[3:5], buffer[0:3]], [buffer[0:2], buffer[4:8].view(2, 2).t()]):
        joined = deepspeed_update._join(apart)
        assert torch.equal(joined, torch.cat([part.reshape(-1) for part in apart]))
        assert joined.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()
