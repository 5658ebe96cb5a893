"""Flow matching: the draws, the loss, and that both follow from (seed, step, lane) alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from far_scale.config.schema import ObjectiveSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.model import FARConfig
from far_scale.model.sharded_layout import SequenceRank
from far_scale.train.flow_matching import add_noise, pack_loss
from far_scale.utils.rng import generator

CONFIG = FARConfig(layers=1, heads=1, channels=2, window=20000, actions=4, condition_dropout=0.25)


def pack(clip_frames: tuple[int, ...] = (3, 5), step: int = 0, lane: int = 0, labels: bool = False) -> Pack:
    frames = sum(clip_frames)
    generator = torch.Generator().manual_seed(frames)
    return Pack(
        latents=torch.randn(frames, 2, 2, 2, generator=generator),
        actions=None if labels else torch.randint(0, 4, (frames,), generator=generator),
        labels=torch.zeros(len(clip_frames), dtype=torch.int64) if labels else None,
        clip_frames=clip_frames,
        keys=tuple(f"k{i}@0" for i in range(len(clip_frames))),
        lane=lane,
        step=step,
        lane_state={"epoch": 0, "position": 0},
    )


def test_draws_depend_on_seed_step_and_lane_only() -> None:
    objective = ObjectiveSection()
    first = add_noise(pack(step=7, lane=2), objective, CONFIG, seed=1)
    torch.manual_seed(123)
    np.random.seed(5)
    again = add_noise(pack(step=7, lane=2), objective, CONFIG, seed=1)
    assert torch.equal(first.latents, again.latents) and torch.equal(first.timesteps, again.timesteps)
    assert torch.equal(first.actions, again.actions)
    for other in (dict(step=8, lane=2), dict(step=7, lane=3), dict(step=2, lane=7)):
        assert not torch.equal(first.target, add_noise(pack(**other), objective, CONFIG, seed=1).target)
    assert not torch.equal(first.target, add_noise(pack(step=7, lane=2), objective, CONFIG, seed=2).target)


def test_noise_and_target_are_the_official_ones() -> None:
    source = pack((400,))
    noisy = add_noise(source, ObjectiveSection(clean_frame_ratio=0.1), CONFIG, seed=0)
    clean = noisy.timesteps == -1
    assert 0.05 < clean.float().mean() < 0.15
    assert torch.equal(noisy.latents[clean], source.latents[clean])
    steps = noisy.timesteps[~clean]
    assert torch.equal(steps, steps.round()) and steps.min() >= 1 and steps.max() <= 1000
    s = (steps / 1000).view(-1, 1, 1, 1)
    noise = noisy.target[~clean] + source.latents[~clean]
    torch.testing.assert_close(noisy.latents[~clean], s * noise + (1 - s) * source.latents[~clean])


def test_timesteps_are_logit_normal() -> None:
    """sigmoid(N(0, 1)) has median 1/2 and quartiles sigmoid(+-0.6745) = 0.338, 0.662."""
    noisy = add_noise(pack((20000,)), ObjectiveSection(clean_frame_ratio=0.0), CONFIG, seed=0)
    quartiles = torch.quantile(noisy.timesteps, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([338.0, 500.0, 662.0]), rtol=0, atol=8)
    uniform = add_noise(pack((20000,)), ObjectiveSection(timesteps="uniform", clean_frame_ratio=0.0), CONFIG, seed=0)
    assert abs(uniform.timesteps.quantile(0.25).item() - 250) < 10


def test_timesteps_are_counted_down_from_1000() -> None:
    """t = 1000 - floor(1000 u), so u in [0, 1/1000) is the whole noise and t is never 0."""
    noisy = add_noise(pack((20000,)), ObjectiveSection(timesteps="uniform", clean_frame_ratio=0.0), CONFIG, seed=0)
    u = generator(0, "timesteps", 0, 0).random(20000)
    assert u.min() < 1e-3 and u.max() >= 0.999
    assert noisy.timesteps.tolist() == [1000 - math.floor(1000 * each) for each in u]


def test_conditions_are_dropped_to_the_null_class() -> None:
    source = pack((4000,))
    dropped = add_noise(source, ObjectiveSection(), CONFIG, seed=0).actions
    assert abs((dropped == 4).float().mean().item() - 0.25) < 0.03
    kept = dropped != 4
    assert torch.equal(dropped[kept], source.actions[kept])
    by_label = FARConfig(layers=1, heads=1, channels=2, window=4000, labels=1, condition_dropout=0.5)
    labels = add_noise(pack((1,) * 400, labels=True), ObjectiveSection(), by_label, seed=0).labels
    assert abs((labels == 1).float().mean().item() - 0.5) < 0.1


def test_loss_is_a_mean_over_noisy_frames_then_clips() -> None:
    """The loop of the formula, on clips of different lengths with clean frames among them."""
    noisy = add_noise(pack((3, 5, 2)), ObjectiveSection(clean_frame_ratio=0.4), CONFIG, seed=3)
    velocity = torch.randn_like(noisy.target)
    clip_losses, frame = [], 0
    for count in (3, 5, 2):
        errors = [
            ((velocity[i] - noisy.target[i]) ** 2).mean().item()
            for i in range(frame, frame + count)
            if noisy.timesteps[i] != -1
        ]
        clip_losses.append(sum(errors) / max(1, len(errors)))
        frame += count
    assert (noisy.timesteps == -1).any()
    assert abs(pack_loss(velocity, noisy).item() - sum(clip_losses) / 3) < 1e-6


@pytest.mark.parametrize("size", [2, 3])
def test_the_loss_is_the_mean_over_the_ranks_that_share_a_pack(size: int) -> None:
    """Some of which have no window frame of a clip, or none at all; so is its gradient."""
    config = FARConfig(layers=1, heads=1, channels=2, window=4, context_patch=2, labels=3)
    for clip_frames in ((2, 9, 6), (1,)):
        noisy = add_noise(pack(clip_frames, labels=True), ObjectiveSection(clean_frame_ratio=0.3), config, seed=4)
        velocity = torch.randn(noisy.target.shape, requires_grad=True)
        (expected,) = torch.autograd.grad(pack_loss(velocity, noisy), velocity)
        shards = [noisy.shard(SequenceRank(rank, size)) for rank in range(size)]
        for shard in shards:
            assert torch.equal(shard.labels, noisy.labels)
            assert len(shard.latents) == len(shard.timesteps) == len(shard.layout.rows)
        assert torch.equal(torch.cat([shard.target for shard in shards]), noisy.target)
        loss = sum(pack_loss(velocity[shard.layout.window_part], shard) for shard in shards) / size
        torch.testing.assert_close(loss, pack_loss(velocity, noisy))
        torch.testing.assert_close(torch.autograd.grad(loss, velocity)[0], expected)


def test_clean_frames_get_no_gradient() -> None:
    noisy = add_noise(pack((6, 6)), ObjectiveSection(clean_frame_ratio=0.5), CONFIG, seed=1)
    velocity = torch.randn_like(noisy.target, requires_grad=True)
    pack_loss(velocity, noisy).backward()
    by_frame = velocity.grad.abs().flatten(1).sum(1)
    assert torch.equal(by_frame == 0, noisy.timesteps == -1)


def test_context_frames_are_clean_and_without_loss() -> None:
    """Clips of 2, 9 and 6 frames, a window of 4: context frames are given as they are, with timestep -2."""
    config = FARConfig(layers=1, heads=1, channels=2, window=4, context_patch=2, actions=4)
    source = pack((2, 9, 6))
    noisy = add_noise(source, ObjectiveSection(clean_frame_ratio=0.3), config, seed=0)
    context = torch.tensor([False] * 2 + [True] * 5 + [False] * 4 + [True] * 2 + [False] * 4)
    assert torch.equal(noisy.timesteps == -2, context)
    assert torch.equal(noisy.latents[context], source.latents[context])
    assert len(noisy.target) == 10
    noise = noisy.target + source.latents[~context]
    s = (noisy.timesteps[~context] / 1000).view(-1, 1, 1, 1)
    expected = torch.where(s < 0, source.latents[~context], s * noise + (1 - s) * source.latents[~context])
    torch.testing.assert_close(noisy.latents[~context], expected)
    velocity = torch.randn(10, 2, 2, 2, generator=torch.Generator().manual_seed(3))
    error = (velocity - noisy.target).square().flatten(1).mean(1)
    lossy = noisy.timesteps[~context] > 0
    by_clip = [error[rows][lossy[rows]].mean() for rows in (slice(0, 2), slice(2, 6), slice(6, 10))]
    torch.testing.assert_close(pack_loss(velocity, noisy), torch.stack(by_clip).nan_to_num(0).mean())


def test_context_noise_is_a_level_of_its_own_without_loss() -> None:
    """float32: clean frames become s * noise + (1 - s) * x at 1000 s; all else, and at s = 0 everything, stays."""
    config = FARConfig(layers=1, heads=1, channels=2, window=4, context_patch=2, actions=4)
    source, s = pack((2, 9, 6)), 0.125
    plain = add_noise(source, ObjectiveSection(clean_frame_ratio=0.3), config, seed=0)
    noisy = add_noise(source, ObjectiveSection(clean_frame_ratio=0.3, context_noise=s), config, seed=0)
    window = torch.tensor([False] * 5 + [True] * 4 + [False] * 2 + [True] * 4)
    window = torch.cat([torch.tensor([True] * 2), window])
    clean = plain.timesteps == -1
    assert clean.any() and torch.equal(clean[window], ~plain.has_loss) and torch.equal(plain.has_loss, noisy.has_loss)
    assert torch.equal(noisy.timesteps, plain.timesteps.masked_fill(clean, 1000 * s))
    assert torch.equal(noisy.target, plain.target)
    assert torch.equal(noisy.latents[~clean], plain.latents[~clean])
    noise = noisy.target[clean[window]] + source.latents[clean]
    torch.testing.assert_close(noisy.latents[clean], s * noise + (1 - s) * source.latents[clean])
    velocity = torch.randn(noisy.target.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pack_loss(velocity, noisy), pack_loss(velocity, plain))
