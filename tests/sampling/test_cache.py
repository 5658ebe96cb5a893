"""The multi-level KV cache against no cache and against the training layout: the same frames."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from far_scale.model import FAR, FARConfig
from far_scale.model.layout import FrameLayout
from far_scale.sampling.cache import MultiLevelCache
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.denoisers import CachedDenoiser, FinishedFrame, Schedule
from far_scale.sampling.sampler import cache_bytes, roll_out
from far_scale.sampling.session import Session

SIZE = (4, 4)
STEPS = 3


def trained_like(dtype: torch.dtype = torch.float32, **shape: int) -> FAR:
    """A model whose every weight is random, so that every frame matters to every later one."""
    torch.manual_seed(0)
    model = FAR(FARConfig(layers=3, heads=2, channels=4, window=4, **shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model.to(dtype).eval()


def given(frames: int, clips: int = 2) -> torch.Tensor:
    return torch.randn(clips, frames, 4, *SIZE, generator=torch.Generator().manual_seed(1))


CASES = [  # model, conditions, guidance
    ({"context_patch": 2, "actions": 3}, "actions", 1.5),
    ({"context_patch": 4, "actions": 3}, "actions", -1),
    ({"context_patch": 2, "labels": 3}, "labels", 2.0),
    ({"context_patch": 2}, "none", 1.0),
    ({"patch": 2, "context_patch": 4}, "none", 1.0),
    ({"actions": 3}, "actions", 1.5),
    ({}, "none", 1.0),
]


@pytest.mark.parametrize(("shape", "conditions", "guidance"), CASES)
@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
@pytest.mark.slow
def test_with_the_cache_and_without_it(shape: dict[str, int], conditions: str, guidance: float, start: int) -> None:
    """A roll-out to far past the window of 4 frames, from nothing, inside the window and from beyond it."""
    model, new = trained_like(**shape), 8
    classes = torch.Generator().manual_seed(2)
    classes_by_kind = {}
    if conditions == "actions":
        classes_by_kind["actions"] = torch.randint(0, 3, (2, start + new), generator=classes)
    elif conditions == "labels":
        classes_by_kind["labels"] = torch.tensor([2, 0])
    frames = [
        roll_out(
            model,
            given(start),
            SamplingConfig(frames=new, steps=STEPS, guidance=guidance, use_cache=cache),
            **classes_by_kind,
        )
        for cache in (True, False)
    ]
    assert frames[0].abs().max() > 0.5 and frames[0][0].std() > 0.1
    torch.testing.assert_close(*frames, rtol=0, atol=1e-4)
    if conditions == "actions" and guidance > 0:
        classes_by_kind["actions"] = (classes_by_kind["actions"] + 1) % 3
        assert not torch.allclose(
            roll_out(
                model, given(start), SamplingConfig(frames=new, steps=STEPS, guidance=guidance), **classes_by_kind
            ),
            frames[0],
            atol=1e-2,
        )


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 11])
def test_one_step_is_the_training_layout_s_velocity(frames: int) -> None:
    """float32, 1e-5: the newest frame's velocity out of the cache, built up frame by frame, against one forward."""
    model = trained_like(context_patch=2, actions=3)
    clip, timestep = given(frames), 437.0
    actions = torch.randint(0, 3, (2, frames), generator=torch.Generator().manual_seed(3))
    timesteps = torch.full((2, frames), -1.0)
    timesteps[:, : max(0, frames - 4)] = -2
    timesteps[:, -1] = timestep
    with torch.no_grad():
        expected = model(clip, timesteps, actions)[:, -1]
        cpu = torch.device("cpu")
        schedule = Schedule(torch.tensor([0.9, timestep / 1000, 0.0]), SamplingConfig(1, 2), cpu)
        cache = MultiLevelCache(model.config, 2, SIZE, 4, None, cpu, torch.float32)
        denoiser, history = CachedDenoiser(model, schedule, 1, cache, SIZE), []
        for frame in range(frames):
            denoiser.begin_frame(history, frame, actions[:, frame])
            denoiser.denoise(torch.full_like(clip[:, frame], 7.0), 0)  # must leave nothing behind
            history.append(FinishedFrame(clip[:, frame], clip[:, frame], actions[:, frame]))
        torch.testing.assert_close(denoiser.velocity(clip[:, -1], 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [{}, {"context_patch": 2}])
@pytest.mark.slow
def test_context_noise_with_the_cache_and_without_it(shape: dict[str, int]) -> None:
    """float32, past the window of 4 frames; coarse context stays clean, so it is not the same as noising all."""
    model = trained_like(**shape)
    frames = [
        roll_out(model, given(2), SamplingConfig(frames=8, steps=STEPS, use_cache=cache, context_noise=0.2))
        for cache in (True, False)
    ]
    torch.testing.assert_close(*frames, rtol=0, atol=1e-4)
    clean, again = (
        roll_out(model, given(2), SamplingConfig(frames=8, steps=STEPS)),
        roll_out(model, given(2), SamplingConfig(frames=8, steps=STEPS, context_noise=0.0)),
    )
    assert torch.equal(clean, again) and not torch.allclose(clean[:, 0], frames[0][:, 0], atol=1e-2)


@pytest.mark.slow
def test_float64_roll_out_is_exact() -> None:
    model = trained_like(torch.float64, context_patch=2, actions=3)
    actions = torch.randint(0, 3, (2, 14), generator=torch.Generator().manual_seed(4))
    frames = [
        roll_out(
            model, given(2), SamplingConfig(frames=12, steps=STEPS, guidance=1.5, use_cache=cache), actions=actions
        )
        for cache in (True, False)
    ]
    # The state between steps is float32 in either.
    torch.testing.assert_close(*frames, rtol=0, atol=2e-6)


def test_a_window_in_the_cache_sees_what_the_mask_lets_it_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the window a new frame costs one context frame and window - 1 clean frames, and its steps one frame each."""
    model = trained_like(context_patch=2)
    tokens = []
    model.blocks[0].mlp.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[:2].numel()))
    roll_out(model, given(6, clips=1), SamplingConfig(frames=2, steps=STEPS))
    fine, coarse = 16, 4
    first = [3 * coarse, 3 * fine] + [fine] * STEPS
    second = [1 * coarse, 3 * fine] + [fine] * STEPS
    assert tokens == first + second


def test_the_cache_size_is_known_beforehand() -> None:
    model, sampling = trained_like(context_patch=2, actions=3), SamplingConfig(999, 1, guidance=1.5)
    held = Session(model, sampling, SIZE, clip_ids=(0, 1), max_frames=1000).cache_bytes
    assert cache_bytes(model, sampling, 2, 1000, SIZE) == held == 2 * 3 * 4 * (4 * 16 + 996 * 4) * 128 * 4
    layout = FrameLayout.of((1000,), SIZE, window=4, coarsening=2)
    assert held == 2 * 3 * 4 * layout.tokens * 128 * 4
    limited = replace(sampling, context_frames=10, window_stride=3)
    held = Session(model, limited, SIZE, clip_ids=(0, 1), max_frames=1000).cache_bytes
    assert cache_bytes(model, limited, 2, 1000, SIZE) == held == 2 * 3 * 4 * (4 * 16 + 10 * 4) * 128 * 4


def test_cudnn_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would build a plan for each new frame."""
    attention, enabled = torch.nn.functional.scaled_dot_product_attention, []

    def recorded_attention(*args: torch.Tensor) -> torch.Tensor:
        cuda = torch.backends.cuda
        enabled.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()))
        return attention(*args)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded_attention)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    roll_out(trained_like(), given(2), SamplingConfig(frames=1, steps=STEPS))
    assert set(enabled) == {(False, True, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_the_cache_changes_nothing_either(dtype: torch.dtype) -> None:
    """Past the window, guided by actions. bfloat16 is compared by its own distance, uncached, from float32."""
    shape = {"context_patch": 2, "actions": 3}
    actions = torch.randint(0, 3, (2, 11), generator=torch.Generator().manual_seed(2))

    def frames(dtype: torch.dtype, cache: bool) -> torch.Tensor:
        model = trained_like(dtype, **shape).cuda()
        return roll_out(
            model, given(3), SamplingConfig(frames=8, steps=STEPS, guidance=1.5, use_cache=cache), actions=actions
        ).cpu()

    exact = frames(torch.float32, cache=False)
    allowed = 1e-3 if dtype == torch.float32 else 2 * (frames(dtype, cache=False) - exact).abs().max().item()
    assert (frames(dtype, cache=True) - exact).abs().max() <= allowed
