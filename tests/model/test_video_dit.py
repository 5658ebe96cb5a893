"""Video DiT, `model.causal: false`: attention over whole clips, one timestep a clip, and joint sampling."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from far_scale.config.schema import ObjectiveSection
from far_scale.convert.official import from_far_scale
from far_scale.data.loader.pack_loader import Pack
from far_scale.model import FAR, FARConfig
from far_scale.model.attention import dense, flex, frame_attention
from far_scale.model.layout import AttentionPlan, FrameGroup, FrameLayout
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.noise import euler_sigmas
from far_scale.sampling.sampler import cache_bytes, roll_out
from far_scale.train.costs import forward_flops
from far_scale.train.flow_matching import add_noise, pack_loss
from far_scale.train.resume_checks import check_fits
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

CPU = torch.device("cpu")
SHAPE = (4, 2, 2)
WINDOW = 5


def dit(**conditions: int) -> FAR:
    """A model whose every weight is random, in float64."""
    model = FAR(FARConfig(layers=2, heads=1, channels=SHAPE[0], window=WINDOW, causal=False, **conditions))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return model.double().eval()


def some_pack(clip_frames: tuple[int, ...], size: int = 2) -> Pack:
    frames = sum(clip_frames)
    return Pack(
        latents=torch.randn(frames, SHAPE[0], size, size, generator=torch.Generator().manual_seed(frames)),
        actions=None,
        labels=None,
        clip_frames=clip_frames,
        keys=("",) * len(clip_frames),
        lane=1,
        step=3,
        lane_state={},
    )


def full_attention(clip_tokens: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over all of a clip's tokens, clip by clip: the definition."""
    parts = []
    for one_q, one_k, one_v in zip(*(x.split(clip_tokens) for x in (q, k, v)), strict=True):
        weights = (torch.einsum("qnd,knd->nqk", one_q, one_k) / q.shape[-1] ** 0.5).softmax(-1)
        parts.append(torch.einsum("nqk,knd->qnd", weights, one_v))
    return torch.cat(parts)


@pytest.mark.parametrize("kernel", ["cpu", "dense"])
def test_a_token_sees_its_whole_clip(kernel: str) -> None:
    """float64, clips of 5, 1 and 3 frames: output and gradients by the definition."""
    group = FrameGroup.of((5, 1, 3), (2, 3), causal=False)
    draw = torch.Generator().manual_seed(0)
    *inputs, dout = (torch.randn(group.tokens, 2, 64, generator=draw, dtype=torch.float64) for _ in range(4))
    results = []
    for attention in (
        lambda q, k, v: frame_attention(q, k, v, group, kernel=kernel),
        lambda q, k, v: full_attention(group.tokens_of_clips, q, k, v),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-14)


def test_flex_sees_the_same() -> None:
    """float32: FlexAttention's forward runs on a CPU, and its block mask is the dense one."""
    plan = AttentionPlan(FrameGroup.of((20, 3), (4, 4), causal=False))
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(plan.group.tokens, 2, 64, generator=draw) for _ in range(3))
    exact, _ = dense.forward(q.double(), k.double(), v.double(), plan)
    torch.testing.assert_close(flex.attend(q, k, v, plan.handle).double(), exact, rtol=0, atol=2e-6)


def test_layouts_count_attended_pairs() -> None:
    """2 x 2 tokens a frame, clips of 3 and 2 frames: 12^2 + 8^2 pairs."""
    layout = FrameLayout.of((3, 2), (2, 2), window=4, causal=False)
    assert layout.attended_pairs == layout.window_pairs == 12**2 + 8**2 == int(layout.window.mask(CPU).sum())
    assert layout.window.upper_triangle(CPU) is None
    causal = FrameLayout.of((3, 2), (2, 2), window=4)
    assert causal is not layout and causal.window != layout.window
    config = FARConfig(layers=3, heads=2, window=4, causal=False)
    more = forward_flops(config, layout) - forward_flops(config, causal)
    assert more == 2 * 3 * 2 * 128 * (layout.attended_pairs - causal.attended_pairs)
    with pytest.raises(ValueError, match="no context"):
        FrameLayout.of((3,), (2, 2), window=2, coarsening=2, causal=False)


def test_earlier_frames_see_later_ones() -> None:
    clip, timesteps = torch.randn(1, 4, *SHAPE, dtype=torch.float64), torch.full((1, 4), 500.0)
    other = clip.clone()
    other[:, -1] += 1
    model = dit()
    with torch.no_grad():
        assert not torch.allclose(model(clip, timesteps)[:, 0], model(other, timesteps)[:, 0], atol=1e-3)


def test_the_configuration_names_causal_only_where_it_is_false() -> None:
    causal, whole = FARConfig(layers=1, heads=1), FARConfig(layers=1, heads=1, causal=False)
    assert "causal" not in causal.to_dict() and whole.to_dict()["causal"] is False
    assert all(FARConfig.from_dict(config.to_dict()) == config for config in (causal, whole))
    assert FARConfig.from_dict(asdict(causal)) == causal
    with pytest.raises(ValueError, match="context_patch must be 0"):
        FARConfig(layers=1, heads=1, context_patch=4, causal=False)
    with pytest.raises(ValueError, match="true or false, got 'no'"):
        FARConfig.from_dict({"layers": 1, "heads": 1, "causal": "no"})


@pytest.mark.parametrize("was_causal", [True, False])
def test_a_run_does_not_resume_as_the_other_kind(was_causal: bool) -> None:
    was, now = (FARConfig(layers=1, heads=1, causal=causal) for causal in (was_causal, not was_causal))
    plan = [SimpleNamespace(index=0, end=10, config=now)]
    state = {"step": 5, "model": was.to_dict()}
    with pytest.raises(UserError, match=rf"model.causal was {was_causal}, the recipe has {not was_causal}"):
        check_fits(Path("step"), state, plan)


def test_the_official_format_is_refused() -> None:
    model = dit()
    with pytest.raises(UserError, match=r"model\.causal is false"):
        from_far_scale(model.config, model.state_dict())


def test_clips_and_noise_are_far_s() -> None:
    """The same pack for both: the same target, and of each clip the timestep of FAR's first frame."""
    config = FARConfig(layers=1, heads=1, channels=SHAPE[0], window=WINDOW)
    pack, objective = some_pack((3, 1, 5)), ObjectiveSection(clean_frame_ratio=0)
    far = add_noise(pack, objective, config, seed=9)
    whole = add_noise(pack, objective, FARConfig.from_dict(config.to_dict() | {"causal": False}), seed=9)
    assert torch.equal(whole.target, far.target)
    first = torch.tensor([0, 0, 0, 3, 4, 4, 4, 4, 4])
    assert torch.equal(whole.timesteps, far.timesteps[first]) and len(far.timesteps.unique()) > 5
    s = (whole.timesteps / 1000).view(-1, 1, 1, 1)
    noise = whole.target + pack.latents
    torch.testing.assert_close(whole.latents, s * noise + (1 - s) * pack.latents)
    assert whole.has_loss.all()


def test_training_lowers_the_loss() -> None:
    """One process, the same pack again and again."""
    torch.manual_seed(0)
    config = FARConfig(layers=2, heads=1, channels=SHAPE[0], window=WINDOW, causal=False)
    model = FAR(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    noisy = add_noise(some_pack((5, 5, 4)), ObjectiveSection(clean_frame_ratio=0), config, seed=0)
    losses = []
    for _ in range(20):
        loss = pack_loss(model(noisy.latents, noisy.timesteps, layout=noisy.layout), noisy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(np.isfinite(losses)) and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("given", [0, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_joint_sampling_is_the_plain_loop(given: int, guidance: float) -> None:
    """float64 model, float32 state: one clip, every frame at one sigma, given frames put in before each step."""
    model, steps, seed, clip = dit(actions=3), 4, 7, 11
    frames = WINDOW - given
    context = torch.randn(1, given, *SHAPE, generator=torch.Generator().manual_seed(1))
    actions = torch.tensor([[0, 1, 2, 2, 1]])
    noise = [generator(seed, "sample", step=i, lane=clip).standard_normal(SHAPE, dtype=np.float32) for i in range(5)]
    noise = torch.from_numpy(np.stack(noise)[None])
    x, sigmas = noise.clone(), euler_sigmas(steps).tolist()
    for step in range(steps):
        x[:, :given] = sigmas[step] * noise[:, :given] + (1 - sigmas[step]) * context
        timesteps = torch.full((1, WINDOW), 1000 * sigmas[step])
        with torch.no_grad():
            conditioned, null = (model(x.double(), timesteps, classes) for classes in (actions, torch.full((1, 5), 3)))
        velocity = (null + guidance * (conditioned - null)).float()
        x = x + (sigmas[step + 1] - sigmas[step]) * velocity
    found = roll_out(
        model,
        context,
        SamplingConfig(frames=frames, steps=steps, guidance=guidance, seed=seed),
        actions=actions,
        clip_ids=[clip],
    )
    torch.testing.assert_close(found, x[:, given:], rtol=0, atol=1e-5)
    again = roll_out(
        model,
        context,
        SamplingConfig(frames=frames, steps=steps, guidance=guidance, seed=seed, use_cache=False),
        actions=actions,
        clip_ids=[clip],
    )
    assert torch.equal(again, found)


def test_what_joint_sampling_refuses() -> None:
    model, context = dit(), torch.zeros(1, 2, *SHAPE)
    assert cache_bytes(model, SamplingConfig(1, 1), 1, WINDOW, SHAPE[1:]) == 0
    with pytest.raises(UserError, match=r"2 given and 4 new ones do not fit the window of 5"):
        roll_out(model, context, SamplingConfig(frames=4, steps=1))
    with pytest.raises(UserError, match=r"context_noise: 0\.1, but this model is not causal"):
        roll_out(model, context, SamplingConfig(frames=3, steps=1, context_noise=0.1))
