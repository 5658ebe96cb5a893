"""The FAR model: causality, conditions, shapes, and the official formulas written out plainly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from far_scale.model import FAR, FARConfig
from far_scale.model.layers import apply_rotary, modulated_norm, rotary_embedding
from far_scale.model.layout import FrameLayout
from far_scale.model.presets import PRESETS

CHECKPOINTING = ("none", "attention-kept", "full")


def trained_like(config: FARConfig, dtype: torch.dtype = torch.float32) -> FAR:
    """A model whose every weight is random: at its start the gates are zero and would hide the blocks."""
    torch.manual_seed(0)
    model = FAR(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def inputs(clips: int = 2, frames: int = 5, channels: int = 4, side: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(clips, frames, channels, side, side, generator=generator)
    timesteps = torch.randint(1, 1001, (clips, frames), generator=generator).float()
    timesteps[:, 0] = -1
    return latents, timesteps


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("changed", [0, 2, 4])
def test_no_frame_leaks_into_an_earlier_one(patch: int, changed: int) -> None:
    """Perturb frame f: every earlier output is bitwise unchanged, its own and every later one changes."""
    model = trained_like(FARConfig(layers=3, heads=2, patch=patch, channels=4, actions=3))
    latents, timesteps = inputs()
    actions = torch.tensor([[0, 1, 2, 0, 1]]).expand(2, -1)
    before = model(latents, timesteps, actions)
    for what in ("latents", "timesteps", "actions"):
        perturbed = {"latents": latents.clone(), "timesteps": timesteps.clone(), "actions": actions.clone()}
        perturbed[what][0, changed] += 1
        if what == "actions":
            perturbed[what] %= 3
        after = model(**perturbed)
        assert torch.equal(after[0, :changed], before[0, :changed]), what
        for frame in range(changed, 5):
            assert not torch.equal(after[0, frame], before[0, frame]), (what, frame)
        assert torch.equal(after[1], before[1]), f"{what} of one clip changed another clip"


def test_clips_of_different_lengths_in_one_pack_equal_single_clips() -> None:
    model = trained_like(FARConfig(layers=2, heads=2, channels=4, labels=5), torch.float64)
    generator = torch.Generator().manual_seed(2)
    lengths, labels = (3, 1, 5), torch.tensor([4, 0, 5])
    clips = [torch.randn(1, count, 4, 4, 4, generator=generator, dtype=torch.float64) for count in lengths]
    timesteps = [torch.rand(1, count, generator=generator, dtype=torch.float64) * 1000 for count in lengths]
    packed = model(
        torch.cat(clips, 1).squeeze(0),
        torch.cat(timesteps, 1).squeeze(0),
        labels=labels,
        layout=FrameLayout.of(lengths, (4, 4), window=16),
    )
    alone = [model(x, t, labels=label[None]) for x, t, label in zip(clips, timesteps, labels, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, 1).squeeze(0), rtol=0, atol=1e-12)


def test_the_first_output_is_zero() -> None:
    latents, timesteps = inputs()
    assert torch.equal(FAR(FARConfig(layers=1, heads=1, channels=4))(latents, timesteps), torch.zeros_like(latents))


def test_activation_checkpointing_changes_nothing() -> None:
    config = FARConfig(layers=2, heads=1, channels=4)
    latents, timesteps = inputs()
    gradients = []
    for checkpointing in CHECKPOINTING:
        model = trained_like(config).train()
        model.configure_execution(checkpointing=checkpointing)
        model(latents, timesteps).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, *others in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in others)


def test_conditions_are_checked() -> None:
    latents, timesteps = inputs()
    by_action = FAR(FARConfig(layers=1, heads=1, channels=4, actions=3))
    with pytest.raises(ValueError, match="takes actions"):
        by_action(latents, timesteps)
    with pytest.raises(ValueError, match="takes no condition"):
        FAR(FARConfig(layers=1, heads=1, channels=4))(latents, timesteps, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="not on both"):
        FARConfig(layers=1, heads=1, actions=2, labels=2)
    with pytest.raises(ValueError, match="do not have 4 channels"):
        by_action(latents[:, :, :3], timesteps)


def test_sizes_are_those_of_the_paper() -> None:
    """Parameters in millions. B and L are what the official README says; for XL it says 657, but 28 layers of 18 heads,
    which its code builds, have 674."""
    millions = {}
    for name, (layers, heads) in PRESETS.items():
        with torch.device("meta"):
            millions[name] = round(sum(p.numel() for p in FAR(FARConfig(layers, heads)).parameters()) / 1e6)
    assert {name: millions[name] for name in ("B", "L", "XL")} == {"B": 130, "L": 457, "XL": 674}


def test_rotation_is_flux_rope() -> None:
    """Channel pairs (2i, 2i+1) turn by position * theta^(-2i/axis), 16 channels for the frame, 24 for y, 24 for x."""
    positions = torch.tensor([[3, 1, 2]])
    x = torch.randn(1, 1, 64, dtype=torch.float64)
    expected = x.clone()
    start = 0
    for axis, size in enumerate((16, 24, 24)):
        for pair in range(size // 2):
            angle = positions[0, axis].item() * 10000.0 ** (-2 * pair / size)
            at = start + 2 * pair
            a, b = x[0, 0, at].item(), x[0, 0, at + 1].item()
            expected[0, 0, at] = a * math.cos(angle) - b * math.sin(angle)
            expected[0, 0, at + 1] = b * math.cos(angle) + a * math.sin(angle)
        start += size
    torch.testing.assert_close(apply_rotary(x, rotary_embedding(positions)), expected, rtol=0, atol=1e-12)


def test_a_block_is_the_official_formula_written_out_per_token() -> None:
    """Modulation per frame equals modulation per token, fused q/k/v equals three projections, no mask equals a mask."""
    config = FARConfig(layers=1, heads=2, channels=4)
    model = trained_like(config, torch.float64)
    block, layout = model.blocks[0], FrameLayout.of((3,), (2, 2), window=16)
    x = torch.randn(3, 4, config.width, dtype=torch.float64)
    condition = torch.randn(3, config.width, dtype=torch.float64)
    rotation = rotary_embedding(layout.window.positions)

    tokens = x.reshape(12, -1)
    per_token = condition.repeat_interleave(4, 0)
    norm = lambda y: F.layer_norm(y, (config.width,), eps=1e-6)  # noqa: E731
    shift, scale, gate = F.linear(per_token, *block.attention_modulation.parameters()).chunk(3, -1)
    attention = block.attention
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    q, k, v = (
        F.linear(norm(tokens) * (1 + scale) + shift, w, b).view(12, 2, 64) for w, b in zip(weights, biases, strict=True)
    )
    rms = lambda y, weight: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight  # noqa: E731
    q, k = (
        apply_rotary(rms(q, attention.norm_q.weight), rotation),
        apply_rotary(rms(k, attention.norm_k.weight), rotation),
    )
    scores = torch.einsum("qnd,knd->nqk", q, k) / 8
    scores = scores.masked_fill(~layout.window.mask(torch.device("cpu")), -math.inf)
    mixed = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v).reshape(12, -1)
    tokens = tokens + gate * attention.out(mixed)
    shift, scale, gate = F.linear(per_token, *block.mlp_modulation.parameters()).chunk(3, -1)
    hidden = F.gelu(block.mlp.up(norm(tokens) * (1 + scale) + shift), approximate="tanh")
    tokens = tokens + gate * block.mlp.down(hidden)

    out, _ = block("cpu", x, condition, rotation, layout.window_plan.handle)
    torch.testing.assert_close(out.reshape(12, -1), tokens, rtol=0, atol=1e-11)


def test_modulated_norm() -> None:
    x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulated_norm(x, scale, shift), expected)
