"""The compact autoencoder: the shipped weights, its network, and what is said of wrong files."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from far_scale import autoencoder as autoencoders
from far_scale.autoencoder.compact import CompactAutoencoder, CompactConfig
from far_scale.autoencoder.training import load_autoencoder_recipe, psnr, to_pixels
from far_scale.data.demo.episodes import record_episode
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256, write_json

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "autoencoder_compact.yaml"
NAME = "compact-vizdoom-f8c32"
DEMO_SEEDS = range(0, 20_000)  # train and held-out episodes of the demo


@pytest.fixture(scope="module")
def shipped() -> autoencoders.Autoencoder:
    return autoencoders.load(NAME)


@pytest.fixture(scope="module")
def metadata() -> dict:
    return json.loads((autoencoders.SHIPPED_WEIGHTS / f"{NAME}.json").read_text())


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """Freshly recorded frames uint8 [N, 3, 64, 64] of the autoencoder's held-out seeds and the demo's."""
    seeds = (30_000, 30_007, 10_000, 10_950)
    return torch.from_numpy(np.concatenate([record_episode(seed, 60).frames for seed in seeds])).permute(0, 3, 1, 2)


def test_shipped_weights_reconstruct_unseen_episodes(shipped: autoencoders.Autoencoder, frames: Tensor) -> None:
    reached = [psnr(shipped, episode) for episode in frames.split(60)]
    assert min(reached) >= 33, reached
    part = frames[::20]
    error = (shipped.decode(shipped.encode(to_pixels(part))) - to_pixels(part)).square().mean()
    of_the_mean = 10 * math.log10(4 / error.item())  # psnr is the mean over frames, which is a little higher
    assert of_the_mean == pytest.approx(psnr(shipped, part), abs=1.5)


def test_shipped_decoder_is_robust_to_small_errors(
    shipped: autoencoders.Autoencoder, frames: Tensor, metadata: dict
) -> None:
    latents = shipped.encode(to_pixels(frames[::8]))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = latents + 0.1 * torch.tensor(metadata["channel_std"])[:, None, None] * noise
    assert 10 * torch.log10(4 / (shipped.decode(noisy) - to_pixels(frames[::8])).square().mean()) > 29


def test_metadata_matches_the_weights(
    shipped: autoencoders.Autoencoder, frames: Tensor, metadata: dict, tmp_path: Path
) -> None:
    path = autoencoders.SHIPPED_WEIGHTS / f"{NAME}.safetensors"
    assert shipped.weight_hash == metadata["weights_sha256"] == sha256(path)
    assert path.stat().st_size < 5e6 and metadata["weights_dtype"] == "float16"
    assert metadata["psnr_db"] == pytest.approx(psnr(shipped, frames), abs=1.0)
    latents = shipped.encode(to_pixels(frames))
    assert shipped.scaling_factor * latents.std().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.tensor(metadata["channel_std"]), rtol=0.3, atol=0)
    off = (latents.mean((0, 2, 3)) - torch.tensor(metadata["channel_mean"])) / torch.tensor(metadata["channel_std"])
    assert off.abs().max() < 0.4  # four mazes are not ninety-six
    write_json(
        tmp_path / "recipe.yaml", metadata["recipe"]
    )  # JSON is YAML, and keys of later versions have their defaults
    assert load_autoencoder_recipe(tmp_path / "recipe.yaml") == load_autoencoder_recipe(RECIPE)
    assert f"--out {autoencoders.SHIPPED_WEIGHTS.relative_to(ROOT)}" in metadata["command"]
    for seeds in (metadata["recipe"]["data"]["train_seeds"], metadata["recipe"]["data"]["heldout_seeds"]):
        assert not set(range(*seeds)) & set(DEMO_SEEDS)


def test_shapes_ranges_and_determinism(shipped: autoencoders.Autoencoder, frames: Tensor) -> None:
    assert (shipped.name, shipped.latent_channels, shipped.downsample) == (NAME, 32, 8)
    pixels = to_pixels(frames[:70])  # more than one pass
    latents = shipped.encode(pixels)
    assert latents.shape == (70, 32, 8, 8) and latents.dtype == torch.float32 and latents.is_contiguous()
    decoded = shipped.decode(latents)
    assert decoded.shape == pixels.shape and decoded.dtype == torch.float32 and decoded.is_contiguous()
    assert shipped.decode(latents * 5).abs().max() == 1.0  # clamped
    assert torch.equal(latents, autoencoders.load(NAME).encode(pixels))
    torch.testing.assert_close(latents[:3], shipped.encode(pixels[:3]), atol=1e-4, rtol=1e-4)
    assert shipped.encode(torch.zeros(1, 3, 16, 40)).shape == (1, 32, 2, 5)
    torch.testing.assert_close(shipped.encode(pixels[:2].double()), shipped.encode(pixels[:2]), atol=1e-4, rtol=1e-4)


def test_wrong_shapes_are_refused(shipped: autoencoders.Autoencoder) -> None:
    for shape in ((3, 64, 64), (1, 4, 64, 64), (1, 3, 60, 64)):
        with pytest.raises(ValueError, match="must be"):
            shipped.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="32, H, W"):
        shipped.decode(torch.zeros(1, 16, 8, 8))


def test_starts_at_the_best_linear_code(frames: Tensor) -> None:
    """With all 192 components nothing is lost; with 32 the error is the sum of the eigenvalues left out."""
    pixels = to_pixels(frames[::6])
    with torch.no_grad():
        whole = CompactAutoencoder(CompactConfig(channels=192, width=8))
        whole.start_from_patches(pixels)
        torch.testing.assert_close(whole.decode(whole.encode(pixels)), pixels, atol=2e-3, rtol=0)
        part = CompactAutoencoder(CompactConfig(channels=32, width=8))
        part.start_from_patches(pixels)
        error = (part.decode(part.encode(pixels)) - pixels).square().mean().item()
    centred = pixels - pixels.mean((0, 2, 3))[:, None, None]
    patches = centred.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 192).double()
    values = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    assert error == pytest.approx(values[:-32].sum().item() / 192, rel=1e-3)


def test_wrong_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    whole, metadata = (autoencoders.SHIPPED_WEIGHTS / f"{NAME}{suffix}" for suffix in (".safetensors", ".json"))

    def refused(content: bytes, card_text: str | None, said: str) -> None:
        path = tmp_path / "mine.safetensors"
        path.write_bytes(content)
        path.with_suffix(".json").unlink(missing_ok=True)
        if card_text is not None:
            path.with_suffix(".json").write_text(card_text)
        with pytest.raises(UserError, match=said) as caught:
            autoencoders.load(path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)

    refused(whole.read_bytes(), None, "there is no metadata")
    refused(whole.read_bytes(), "{", "not readable JSON")
    refused(whole.read_bytes(), "[]", "not metadata")
    refused(whole.read_bytes(), '{"name": "mine"}', "not metadata")
    other = json.loads(metadata.read_text())
    other["config"]["width"] = 32
    refused(whole.read_bytes(), json.dumps(other), "of another autoencoder")
    refused(whole.read_bytes()[:5000], metadata.read_text(), "weights are broken")
    refused(b"text", metadata.read_text(), "weights are broken")
    with pytest.raises(UserError, match=f"compact-vizdom: no such name; shipped: {NAME}"):
        autoencoders.load("compact-vizdom")
    with pytest.raises(UserError, match=r"mine.safetensors: there is no such file"):
        autoencoders.load("mine.safetensors")


def test_a_file_of_ones_own_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".safetensors", ".json"):
        shutil.copy(autoencoders.SHIPPED_WEIGHTS / f"{NAME}{suffix}", tmp_path / f"mine{suffix}")
    with pytest.raises(UserError, match=f"mine: no such name; shipped: {NAME}; .*FAR_SCALE_AUTOENCODERS"):
        autoencoders.load("mine")
    monkeypatch.setenv("FAR_SCALE_AUTOENCODERS", str(tmp_path))
    assert autoencoders.load("mine").weight_hash == autoencoders.load(NAME).weight_hash


def test_without_diffusers_a_dc_ae_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (tmp_path / "mine.safetensors").touch()
    metadata = {"name": "mine", "scaling_factor": 1.0, "config": {"_class_name": "AutoencoderDC"}}
    (tmp_path / "mine.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"mine.json: DC-AE needs diffusers.*pip install 'far_scale\[dcae\]'"):
        autoencoders.load(tmp_path / "mine.safetensors")
