"""FAR with long short-term context: causality, packing, precision of the parts that window-only models lack."""

from __future__ import annotations

import pytest
import torch

from far_scale.model import FAR, FARConfig

CONFIG = FARConfig(layers=3, heads=2, channels=4, window=3, context_patch=2, actions=3)


CHECKPOINTING = ("none", "attention-kept", "full")


def trained_like(config: FARConfig) -> FAR:
    """A float64 model whose every weight is random: at its start the gates are zero and would hide the blocks."""
    torch.manual_seed(0)
    model = FAR(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.double().eval()


def clip(frames: int, window: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents `[1, F, 4, 4, 4]`, timesteps and actions `[1, F]`; the frames before the window are clean."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, frames, 4, 4, 4, generator=generator, dtype=torch.float64)
    timesteps = torch.randint(1, 1001, (1, frames), generator=generator).double()
    timesteps[:, : max(0, frames - window)] = -2
    return latents, timesteps, torch.randint(0, 3, (1, frames), generator=generator)


@pytest.mark.parametrize("changed", [0, 3, 4, 5, 6])
def test_no_frame_leaks_into_an_earlier_one(changed: int) -> None:
    """7 frames, 4 of context: window outputs before the changed frame stay bitwise, its own and later ones change."""
    model = trained_like(CONFIG)
    latents, timesteps, actions = clip(7)
    before = model(latents, timesteps, actions)
    assert before.shape == (1, 3, 4, 4, 4)
    for what in ("latents", "actions"):
        given = {"latents": latents.clone(), "actions": actions.clone()}
        given[what][0, changed] += 1
        given["actions"] %= 3
        after = model(given["latents"], timesteps, given["actions"])
        for frame in range(3):
            assert torch.equal(after[0, frame], before[0, frame]) == (4 + frame < changed), (what, frame)


def test_context_is_causal_among_itself() -> None:
    """What a context frame becomes does not depend on later ones: its part of the window's velocity stays the same
    when the clip goes on, as the cache relies on. Shown on the last block's input."""
    model = trained_like(CONFIG)
    seen = []
    model.blocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[5]))
    latents, timesteps, actions = clip(8)
    for frames in (6, 8):
        model(
            latents[:, :frames],
            timesteps[:, :frames].masked_fill(torch.arange(frames) < frames - 3, -2),
            actions[:, :frames],
        )
    short, long = seen
    assert short.shape[0] == 3 and long.shape[0] == 5
    torch.testing.assert_close(long[:3], short, rtol=0, atol=1e-12)


@pytest.mark.parametrize("condition", ["actions", "labels", "none"])
def test_a_pack_of_mixed_clips_equals_single_clips(condition: str) -> None:
    config = FARConfig(
        layers=3, heads=2, channels=4, window=3, context_patch=2,
        actions=3 if condition == "actions" else 0, labels=3 if condition == "labels" else 0,
    )  # fmt: skip
    model = trained_like(config)
    lengths, labels = (9, 2, 3, 4), torch.tensor([2, 0, 1, 3])
    clips = [clip(frames, seed=seed) for seed, frames in enumerate(lengths)]
    latents, timesteps, actions = (torch.cat(parts, 1).squeeze(0) for parts in zip(*clips, strict=True))
    packed = model(
        latents,
        timesteps,
        actions if condition == "actions" else None,
        labels if condition == "labels" else None,
        config.layout(lengths, (4, 4)),
    )
    alone = [
        model(x, t, a if condition == "actions" else None, label[None] if condition == "labels" else None)
        for (x, t, a), label in zip(clips, labels, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 1).squeeze(0), rtol=0, atol=1e-12)


def test_without_context_frames_every_weight_still_gets_a_gradient() -> None:
    """Ranks reduce gradients together, so a rank whose clips are all short must have them too (as zeros)."""
    model = trained_like(CONFIG).train()
    latents, timesteps, actions = clip(3)
    model(latents, timesteps, actions).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() != ("context" in name), name


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in CHECKPOINTING:
        model = trained_like(CONFIG).train()
        model.configure_execution(checkpointing=checkpointing)
        model(*clip(7)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, *others in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in others)


def test_unused_weights_are_kept_but_not_trained() -> None:
    model = FAR(CONFIG)
    unread = {"context_output.weight", "context_output.bias", "blocks.2.attention.context_norm_q.weight"}
    assert {name for name, _ in model.named_buffers()} == unread
    assert unread <= set(model.state_dict())
    assert "blocks.2.attention.context_out.weight" not in model.state_dict()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of patch 2"):
        FARConfig(layers=1, heads=1, patch=2, context_patch=3)
    with pytest.raises(ValueError, match="6 x 6 cannot be cut into patches of 1 and 4"):
        FARConfig(layers=1, heads=1, context_patch=4).layout((20,), (6, 6))
    with pytest.raises(ValueError, match="longer than the window of 3"):
        FARConfig(layers=1, heads=1, window=3).layout((4,), (4, 4))
