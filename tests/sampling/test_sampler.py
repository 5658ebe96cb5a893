"""Sampling against a straight-line Euler loop, and what must not change a clip's result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from far_scale.model import FAR, FARConfig
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.noise import euler_sigmas
from far_scale.sampling.sampler import roll_out
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

SHAPE = (4, 2, 2)
WINDOW = 5


def small_model(**conditions: int) -> FAR:
    """A model with weights that are nowhere zero, since a fresh one always answers with zero."""
    model = FAR(FARConfig(layers=2, heads=1, channels=SHAPE[0], window=WINDOW, **conditions)).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return model


def some_context(clips: int, frames: int) -> Tensor:
    return torch.randn(clips, frames, *SHAPE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def straight_line(model: FAR, context: Tensor, frames: int, steps: int, seed: int, actions: Tensor | None) -> Tensor:
    """One clip `[G, C, H, W]`, all in plain loops; the sigmas by their formula, frames of the window only."""
    clip = list(context)
    for frame in range(len(context), len(context) + frames):
        noise = generator(seed, "sample", step=frame, lane=0).standard_normal(SHAPE, dtype=np.float32)
        x = torch.from_numpy(noise)
        for step in range(steps):
            sigma = 1 - step * (1 - 0.001) / (steps - 1)
            sigma_next = 1 - (step + 1) * (1 - 0.001) / (steps - 1) if step + 1 < steps else 0.0
            window = [*clip, x][-WINDOW:]
            timesteps = torch.tensor([[-1.0] * (len(window) - 1) + [sigma * 1000]])
            window_actions = None if actions is None else actions[None, : frame + 1][:, -WINDOW:]
            velocity = model(torch.stack(window)[None], timesteps, window_actions)[0, -1]
            x = x + (sigma_next - sigma) * velocity
        clip.append(x)
    return torch.stack(clip[len(context) :])


def test_sigmas_are_those_of_the_official_scheduler() -> None:
    # FlowMatchEulerDiscreteScheduler(shift=1).set_timesteps(4).sigmas, worked out by hand
    assert torch.allclose(euler_sigmas(4), torch.tensor([1.0, 0.667, 0.334, 0.001, 0.0]), rtol=0, atol=1e-7)
    assert euler_sigmas(1).tolist() == [1.0, 0.0]
    assert euler_sigmas(50).dtype == torch.float32 and len(euler_sigmas(50)) == 51


@pytest.mark.parametrize("given", [0, 1, 3])
def test_equals_a_straight_line_euler_loop(given: int) -> None:
    model, context = small_model(), some_context(1, given)
    expected = straight_line(model, context[0], frames=2, steps=4, seed=7, actions=None)
    assert torch.allclose(
        roll_out(model, context, SamplingConfig(frames=2, steps=4, seed=7))[0], expected, rtol=1e-4, atol=1e-5
    )


def test_equals_a_straight_line_euler_loop_with_actions_past_the_window() -> None:
    model, context = small_model(actions=3), some_context(1, 3)
    actions = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2])
    expected = straight_line(model, context[0], frames=5, steps=3, seed=7, actions=actions)
    result = roll_out(model, context, SamplingConfig(frames=5, steps=3, seed=7), actions=actions[None])
    assert torch.allclose(result[0], expected, rtol=1e-3, atol=1e-3)  # rounding grows over the frames


def test_only_the_window_is_seen() -> None:
    model, context = small_model(), some_context(1, WINDOW + 2)
    result = roll_out(model, context, SamplingConfig(frames=1, steps=2))
    older = context.clone()
    older[:, :3] += 1.0  # WINDOW + 2 given frames and the new one: the three oldest are outside
    assert torch.equal(roll_out(model, older, SamplingConfig(frames=1, steps=2)), result)
    newer = context.clone()
    newer[:, 3] += 1.0
    assert not torch.allclose(roll_out(model, newer, SamplingConfig(frames=1, steps=2)), result, atol=1e-3)


def test_a_later_frame_does_not_change_an_earlier_one() -> None:
    model, context = small_model(actions=3), some_context(2, 2)
    actions = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 2, 0, 1]])
    long = roll_out(model, context, SamplingConfig(frames=3, steps=3), actions=actions)
    short = roll_out(model, context, SamplingConfig(frames=2, steps=3), actions=actions[:, :4])
    assert torch.equal(long[:, :2], short)
    actions[:, -1] = (actions[:, -1] + 1) % 3
    other = roll_out(model, context, SamplingConfig(frames=3, steps=3), actions=actions)
    assert torch.equal(other[:, :2], short)
    assert not torch.allclose(other[:, 2], long[:, 2], atol=1e-3)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    model, context = small_model(labels=3), some_context(3, 2)
    labels = torch.tensor([2, 0, 1])
    together = roll_out(
        model, context, SamplingConfig(frames=2, steps=3, guidance=2.0), labels=labels, clip_ids=[11, 12, 13]
    )
    alone = roll_out(
        model, context[2:], SamplingConfig(frames=2, steps=3, guidance=2.0), labels=labels[2:], clip_ids=[13]
    )
    assert torch.allclose(together[2:], alone, rtol=1e-4, atol=1e-4)
    order = [2, 0, 1]
    turned = roll_out(
        model,
        context[order],
        SamplingConfig(frames=2, steps=3, guidance=2.0),
        labels=labels[order],
        clip_ids=[13, 11, 12],
    )
    assert torch.allclose(together[order], turned, rtol=1e-4, atol=1e-4)


def test_the_noise_is_named_by_seed_clip_and_frame() -> None:
    model, context = small_model(), some_context(1, 1).expand(2, -1, -1, -1, -1)
    first = roll_out(model, context, SamplingConfig(frames=2, steps=2, seed=3))
    assert torch.equal(roll_out(model, context, SamplingConfig(frames=2, steps=2, seed=3)), first)
    assert torch.equal(roll_out(model, context, SamplingConfig(frames=2, steps=2, seed=3), clip_ids=[0, 1]), first)
    assert not torch.allclose(first[0], first[1], atol=1e-2)
    assert not torch.allclose(roll_out(model, context, SamplingConfig(frames=2, steps=2, seed=4)), first, atol=1e-2)
    same_clip = roll_out(model, context, SamplingConfig(frames=2, steps=2, seed=3), clip_ids=[1, 1])
    assert torch.allclose(same_clip[0], first[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["actions", "labels"])
def test_guidance(kind: str) -> None:
    model, context = small_model(**{kind: 3}), some_context(2, 2)
    classes = torch.tensor([[0, 1, 2], [2, 1, 1]]) if kind == "actions" else torch.tensor([1, 2])

    @torch.no_grad()
    def one_step(classes: Tensor) -> Tensor:
        draws = [generator(0, "sample", step=2, lane=clip) for clip in (0, 1)]
        x = torch.from_numpy(np.stack([draw.standard_normal(SHAPE, np.float32) for draw in draws]))
        timesteps = torch.tensor([[-1.0, -1.0, 1000.0]] * 2)
        return x - model(torch.cat([context, x[:, None]], dim=1), timesteps, **{kind: classes})[:, -1]

    conditioned, null = one_step(classes), one_step(torch.full_like(classes, 3))
    assert not torch.allclose(conditioned, null, atol=1e-2)

    def sampled(guidance: float, **given: Tensor) -> Tensor:
        return roll_out(model, context, SamplingConfig(frames=1, steps=1, guidance=guidance), **given)[:, 0]

    near = {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(sampled(1.0, **{kind: classes}), conditioned, **near)
    assert torch.allclose(sampled(-1.0, **{kind: classes}), null, **near)
    assert torch.equal(sampled(-1.0), sampled(-1.0, **{kind: classes}))  # no classes are needed for it
    assert torch.allclose(sampled(2.5, **{kind: classes}), null + 2.5 * (conditioned - null), **near)


def test_bfloat16_weights_keep_a_float32_state() -> None:
    model, context = small_model(), some_context(1, 2)
    exact = roll_out(model, context, SamplingConfig(frames=1, steps=4))
    rough = roll_out(model.to(torch.bfloat16), context, SamplingConfig(frames=1, steps=4))
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, rough.bfloat16().float())
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_what_does_not_fit_is_refused() -> None:
    plain, acting, labelled = small_model(), small_model(actions=3), small_model(labels=3)
    context = some_context(2, 1)
    actions, labels = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    two = SamplingConfig(frames=2, steps=2)
    cases = [
        (lambda: roll_out(acting, context, two), r"the model needs actions of shape \[2, 3\]"),
        (lambda: roll_out(acting, context, two, actions=actions[:, 1:]), r"the shape is \[2, 2\], needed is \[2, 3\]"),
        (lambda: roll_out(acting, context, two, actions=actions + 3), "classes 3 to 3 .* has 0 to 2"),
        (lambda: roll_out(acting, context, two, actions=actions - 1), "classes -1 to -1"),
        (lambda: roll_out(acting, context, two, actions=actions.float()), "integers"),
        (lambda: roll_out(acting, context, two, actions=actions, labels=labels), "labels: .* trained without"),
        (lambda: roll_out(labelled, context, two), r"the model needs labels of shape \[2\]"),
        (lambda: roll_out(plain, context, two, actions=actions), "actions: the model was trained without"),
        (lambda: roll_out(plain, context, SamplingConfig(2, 2, guidance=2.0)), "needs a model with actions or labels"),
        (lambda: roll_out(plain, context, SamplingConfig(2, 2, guidance=-1.0)), "needs a model with actions or labels"),
        (lambda: roll_out(acting, context, SamplingConfig(2, 2, 0.5), actions=actions), "guidance: 0.5 has no meaning"),
        (lambda: roll_out(plain, context, SamplingConfig(0, 2)), "frames=0: at least 1 is needed"),
        (lambda: roll_out(plain, context, SamplingConfig(2, 0)), "steps=0: 1 to 1000 Euler steps"),
        (lambda: roll_out(plain, context[0], two), r"context: the shape is \[1, 4, 2, 2\]"),
        (lambda: roll_out(plain, context[:, :, :3], two), r"context: the shape is \[2, 1, 3, 2, 2\]"),
        (lambda: roll_out(plain, context, two, clip_ids=[1]), "clip_ids"),
    ]  # fmt: skip
    for case, message in cases:
        with pytest.raises(UserError, match=message):
            case()


def test_context_noise_is_put_on_finished_frames() -> None:
    """float32: one new frame past the window, by the model itself, with noise drawn as the docstring says."""
    model, s, clip = small_model(), 0.125, 3
    context = some_context(1, WINDOW + 1)
    result = roll_out(model, context, SamplingConfig(frames=2, steps=1, seed=7, context_noise=s), clip_ids=[clip])[0]

    def draw(purpose: str, frame: int) -> Tensor:
        numbers = generator(7, purpose, step=frame, lane=clip).standard_normal(SHAPE, dtype=np.float32)
        return torch.from_numpy(numbers)

    frames = list(context[0])
    for frame in (WINDOW + 1, WINDOW + 2):
        seen = [s * draw("context noise", i) + (1 - s) * frames[i] for i in range(frame - WINDOW + 1, frame)]
        timesteps = torch.tensor([[1000 * s] * (WINDOW - 1) + [1000.0]])
        noise = draw("sample", frame)
        with torch.no_grad():
            frames.append(noise - model(torch.stack([*seen, noise])[None], timesteps)[0, -1])
    torch.testing.assert_close(result, torch.stack(frames[-2:]), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="context_noise: 1 is not a noise level"):
        roll_out(model, context, SamplingConfig(frames=1, steps=1, context_noise=1.0))
