"""Official weights in and out, against velocities that the official code gave for the same weights and inputs.

tests/recorded/official/NAME.safetensors was made by benchmarks/record_official.py. It holds, in float64, the velocities
of the window frames only, and in its metadata the names and shapes of the official state dict.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from far_scale.convert import official
from far_scale.model import FAR, FARConfig
from far_scale.utils.errors import UserError
from harness.official_cases import (
    CASES,
    CLIPS,
    RECORDED,
    InFloat64,
    inputs,
    official_weights,
    recorded_shapes,
    same_bits,
)

FLOAT64_TOLERANCE = 1e-9  # of values of up to 4; 1e-14 is seen
FLOAT32_TOLERANCE = 5e-4  # of the velocities' std; see the test


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


def velocity(name: str, frames: int, dtype: torch.dtype) -> torch.Tensor:
    """Our velocities `[B * Fw, C, H, W]` of a case, with weights and latents of `dtype`."""
    case, given = CASES[name], inputs(CASES[name], frames)
    packed = {key: values if key == "labels" else pack(values) for key, values in given.items()}
    packed["latents"] = packed["latents"].to(dtype)
    return loaded(name).to(dtype)(**packed, layout=case.config.layout((frames,) * CLIPS, case.size))


def recorded(name: str, frames: int) -> torch.Tensor:
    """The official ones, float64."""
    return pack(load_file(RECORDED / f"{name}.safetensors")[f"velocity_{frames}"])


RUNS = [(name, frames) for name, case in CASES.items() for frames in case.frames]


@pytest.mark.parametrize(("name", "frames"), RUNS)
@torch.no_grad()
def test_the_velocity_is_the_official_one(name: str, frames: int) -> None:
    expected = recorded(name, frames)
    with InFloat64():
        found = velocity(name, frames, torch.float64)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_TOLERANCE)


@torch.no_grad()
def test_the_velocity_in_float32_too() -> None:
    """Float32 weights and latents, as users run it, against the same float64 velocities.

    What it may differ by is set by the sinusoids of the timestep, which both codes compute in float32: an angle is up
    to 1000 radians, and the roundings of its exponent, power and product are worth up to 2e-4 radians. A velocity moves
    by about as much as a sinusoid. Seen of either code on two machines, with and without vector instructions: 5e-5.
    """
    for name, frames in RUNS:
        expected = recorded(name, frames)
        found = velocity(name, frames, torch.float32)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), expected, rtol=0, atol=FLOAT32_TOLERANCE * expected.std().item(), msg=f"{name}, {frames}"
        )


@torch.no_grad()
def test_clips_of_all_lengths_in_one_pack_give_the_official_velocities() -> None:
    case, model = CASES["long_action"], loaded("long_action").double()
    given = [inputs(case, frames) for frames in case.frames]
    packed = {key: torch.cat([pack(values[key]) for values in given]) for key in given[0]}
    packed["latents"] = packed["latents"].double()
    lengths = [frames for frames in case.frames for _ in range(CLIPS)]
    with InFloat64():
        found = model(**packed, layout=case.config.layout(lengths, case.size))
    expected = torch.cat([recorded("long_action", frames) for frames in case.frames])
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_TOLERANCE)


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
        "has in another shape tensors: transformer_blocks.1.attn.norm_q.weight ([2] instead of [64]); it is not",
    ),
    (
        {"proj_out.bias": None, "label_embedder.embedding_table.weight": torch.zeros(6, 128)},
        "misses tensors: proj_out.bias; has unexpected tensors: label_embedder.embedding_table.weight; it is not",
    ),
    ({"action_embedder.embedding_table.weight": SOME}, "unexpected tensors: action_embedder.embedding_table.weight"),
    (
        {"context_embedder.weight": torch.zeros(128, 60)},
        "has in another shape tensors: context_embedder.weight ([128, 60] instead of [128, 36])",
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


def test_a_missing_block_is_reported_by_a_few_names_and_a_count() -> None:
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
    with pytest.raises(UserError, match=r"condition_embedding.weight \(\[4, 64\] instead of \[8, 64\]\)"):
        official.from_far_scale(replace(config, actions=7), ours)
