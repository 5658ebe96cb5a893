"""Official weights in and out, against velocities that the official code gave for the same weights and inputs.

tests/data/official/NAME.safetensors was made by running the official code (showlab/FAR, `FAR` and `FAR_Long` of
far/models, with diffusers, float32, CPU, training mode so that it gives all frames, its condition dropout off) on tiny
models whose weights and inputs are those of `drawn` below. It holds the velocities of the window frames only, and in
its metadata the names and shapes of the official state dict. Context frames went in with the timestep -1, which the
official model doubles by itself.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from far_scale.convert import official
from far_scale.errors import UserError
from far_scale.model import FAR, FARConfig

RECORDED = Path(__file__).parent / "data" / "official"
CLIPS = 2
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A recorded model: its config, the latent's height and width, and the frame counts run through it."""

    config: FARConfig
    size: tuple[int, int]
    frames: tuple[int, ...]


CASES = {
    "far": Case(FARConfig(2, 1, channels=4), (2, 3), (1, 5)),
    "far_action": Case(FARConfig(2, 1, channels=4, actions=3), (4, 3), (5,)),
    "far_label": Case(FARConfig(3, 2, channels=8, labels=5), (2, 2), (4,)),
    "far_patch": Case(FARConfig(2, 1, channels=4, patch=2), (4, 6), (4,)),
    "long_action": Case(FARConfig(3, 2, channels=4, window=4, actions=3, context_patch=4), (8, 12), (3, 4, 5, 9)),
    "long": Case(FARConfig(2, 1, channels=4, window=4, context_patch=2), (4, 6), (8,)),
    "long_patch": Case(FARConfig(2, 1, channels=4, patch=2, window=3, context_patch=4), (8, 4), (6,)),
}
LONG = [name for name, case in CASES.items() if case.config.context_patch]


def drawn(name: str, shape: Sequence[int], std: float = 1.0) -> torch.Tensor:
    """Uniform float32 numbers of deviation `std`, by a counter-based generator keyed by the name: the same anywhere."""
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    centred = ((raw >> 40).astype(np.int64) - 2**23).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(centred * np.float32(std * 12**0.5)).reshape(*shape)


def recorded_shapes(name: str) -> dict[str, list[int]]:
    with safe_open(RECORDED / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["shapes"])


def official_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """An official state dict: every tensor drawn with deviation 0.08, around 1 where it is a norm's weight."""
    return {
        name: drawn(name, shape, 0.08) + (1.0 if ".norm_" in name else 0.0) for name, shape in sorted(shapes.items())
    }


def inputs(case: Case, frames: int) -> dict[str, torch.Tensor]:
    """`[B, F, ...]`: latents, timesteps of which context frames and some others are clean, actions or labels."""
    config = case.config
    key = f"{frames} frames"
    timesteps = ((drawn(f"timesteps of {key}", (CLIPS, frames), 12**-0.5) + 0.5) * 1000).floor()
    timesteps[0, frames // 2] = -1
    if config.context_patch:
        timesteps[:, : max(0, frames - config.window)] = -2
    values = {
        "latents": drawn(f"latents of {key}", (CLIPS, frames, config.channels, *case.size)),
        "timesteps": timesteps,
    }
    if config.actions:  # the null class as well
        values["actions"] = torch.arange(CLIPS * frames).reshape(CLIPS, frames) * 5 % (config.actions + 1)
    if config.labels:
        values["labels"] = torch.tensor([1, config.labels])
    return values


def both(name: str) -> tuple[FARConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A case's config and state dict as we read them, and the official state dict they were read from."""
    theirs = official_weights(recorded_shapes(name))
    config, ours = official.to_far_scale(theirs, CASES[name].config.window, CASES[name].config.patch)
    return config, ours, theirs


def loaded(name: str) -> FAR:
    config, state, _ = both(name)
    model = FAR(config).eval()
    model.load_state_dict(state, strict=True)
    return model


def pack(batch: torch.Tensor) -> torch.Tensor:
    return batch.flatten(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_config_names_and_shapes(name: str) -> None:
    config, ours, _ = both(name)
    assert config == CASES[name].config
    expected = {key: tensor.shape for key, tensor in FAR(config).state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    theirs = {key: tensor.to(dtype) for key, tensor in official_weights(recorded_shapes(name)).items()}
    theirs["proj_out.bias"][0] = float("nan")
    before = {key: tensor.clone() for key, tensor in theirs.items()}
    window, patch = CASES[name].config.window, CASES[name].config.patch
    config, ours = official.to_far_scale(theirs, window, patch)
    back = official.from_far_scale(config, ours)
    same_bits(back, before)
    same_bits(theirs, before)
    again = official.to_far_scale(back, window, patch)
    assert again[0] == config
    same_bits(again[1], ours)
    parts = {name for name in theirs if ".to_q." in name or ".to_k." in name or ".to_v." in name or ".add_" in name}
    addresses = {tensor.data_ptr() for tensor in ours.values()}
    assert {
        key for key, tensor in theirs.items() if tensor.data_ptr() not in addresses
    } == parts  # only these are copies
    assert {tensor.untyped_storage().data_ptr() for tensor in back.values()} == {
        tensor.untyped_storage().data_ptr() for tensor in ours.values()
    }


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize(("name", "frames"), [(name, frames) for name, case in CASES.items() for frames in case.frames])
@torch.no_grad()
def test_the_velocity_is_the_official_one(name: str, frames: int) -> None:
    case, model, given = CASES[name], loaded(name), inputs(CASES[name], frames)
    recorded = load_file(RECORDED / f"{name}.safetensors")[f"velocity_{frames}"]
    packed = {key: values if key == "labels" else pack(values) for key, values in given.items()}
    velocity = model(**packed, layout=case.config.layout((frames,) * CLIPS, case.size))
    assert recorded.std() > 0.3
    torch.testing.assert_close(velocity, pack(recorded), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_clips_of_all_lengths_in_one_pack_give_the_official_velocities() -> None:
    case, model = CASES["long_action"], loaded("long_action")
    recorded = load_file(RECORDED / "long_action.safetensors")
    given = [inputs(case, frames) for frames in case.frames]
    packed = {key: torch.cat([pack(values[key]) for values in given]) for key in given[0]}
    lengths = [frames for frames in case.frames for _ in range(CLIPS)]
    velocity = model(**packed, layout=case.config.layout(lengths, case.size))
    expected = torch.cat([pack(recorded[f"velocity_{frames}"]) for frames in case.frames])
    torch.testing.assert_close(velocity, expected, rtol=0, atol=TOLERANCE)


def test_a_data_parallel_prefix_is_dropped() -> None:
    config, ours, theirs = both("long_action")
    prefixed = {f"module.{key}": tensor for key, tensor in theirs.items()}
    again = official.to_far_scale(prefixed, window=config.window)
    assert again[0] == config
    same_bits(again[1], ours)
    assert all(key.startswith("module.") for key in prefixed)


def test_the_window_is_the_official_one_unless_given() -> None:
    theirs = official_weights(recorded_shapes("long_action"))
    assert official.to_far_scale(theirs)[0] == replace(CASES["long_action"].config, window=16)


def refusal(weights: dict[str, torch.Tensor], changes: dict[str, torch.Tensor | None]) -> str:
    """The message for `weights` with some tensors changed, added, or left out where None."""
    changed = {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}
    with pytest.raises(UserError) as error:
        official.to_far_scale(changed, window=4)
    assert "\n" not in str(error.value)
    return str(error.value)


SOME = torch.zeros(2)
REFUSALS: list[tuple[dict[str, torch.Tensor | None], str]] = [
    (
        {"transformer_blocks.1.attn.to_add_out.bias": None},
        "misses tensors: transformer_blocks.1.attn.to_add_out.bias; it is not",
    ),
    (
        {"transformer_blocks.2.attn.to_add_out.bias": SOME},  # the last block has none
        "has unexpected tensors: transformer_blocks.2.attn.to_add_out.bias; it is not",
    ),
    (
        {"transformer_blocks.1.attn.norm_q.weight": SOME},
        "has in another shape tensors: transformer_blocks.1.attn.norm_q.weight ([2] in place of [64]); it is not",
    ),
    (
        {"proj_out.bias": None, "label_embedder.embedding_table.weight": torch.zeros(6, 128)},
        "misses tensors: proj_out.bias; has unexpected tensors: label_embedder.embedding_table.weight; it is not",
    ),
    ({"action_embedder.embedding_table.weight": SOME}, "unexpected tensors: action_embedder.embedding_table.weight"),
    (
        {"context_embedder.weight": torch.zeros(128, 60)},
        "has in another shape tensors: context_embedder.weight ([128, 60] in place of [128, 36])",
    ),
    ({"context_embedder.weight": torch.tensor(1.0)}, "unexpected tensors: context_embedder.bias, context_embedder."),
    (
        {"transformer_blocks.0.attn.to_k.bias": torch.zeros(128).bfloat16()},
        "transformer_blocks.0.attn.to_k.bias bfloat16",
    ),
    ({"x_embedder.weight": None}, "misses x_embedder.weight"),
    ({"x_embedder.weight": torch.zeros(100, 4)}, "[100, 4], which is not a width in heads of 64"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_what_does_not_fit_is_named(changes: dict[str, torch.Tensor | None], message: str) -> None:
    assert message in refusal(official_weights(recorded_shapes("long_action")), changes)


def test_a_missing_block_is_told_by_a_few_names_and_a_count() -> None:
    weights = official_weights(recorded_shapes("long_action"))
    message = refusal(weights, dict.fromkeys(name for name in weights if name.startswith("transformer_blocks.1.")))
    # block 2 is one too many for two blocks, and the last one has no to_add_out
    assert "misses tensors: transformer_blocks.1." in message
    assert " and 23 more; has unexpected tensors: transformer_blocks.2." in message
    assert message.count("transformer_blocks") == 6


def test_other_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"has conv\.weight, "):
        official.to_far_scale({"conv.weight": SOME})
    with pytest.raises(UserError, match="has nothing"):
        official.to_far_scale({})


def test_a_state_dict_that_is_not_the_config_s_is_refused() -> None:
    config, ours, _ = both("far_action")
    with pytest.raises(UserError, match=r"the model misses tensors: output.out.bias; config and weights"):
        official.from_far_scale(config, {key: tensor for key, tensor in ours.items() if key != "output.out.bias"})
    with pytest.raises(UserError, match=r"condition_embedding.weight \(\[4, 64\] in place of \[8, 64\]\)"):
        official.from_far_scale(replace(config, actions=7), ours)
