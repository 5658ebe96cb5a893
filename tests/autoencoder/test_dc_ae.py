"""DC-AE through diffusers: FAR's configurations, files and folders of them, official weights in, bf16."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from far_scale import autoencoder as autoencoders
from far_scale.autoencoder.deep_compression import CLASS_NAME, PRESETS, SCALING_FACTOR
from far_scale.convert.dc_ae import import_autoencoder
from far_scale.data.encode.plan import encode_videos
from far_scale.data.shards.inspect import matching_autoencoder
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.video.find import find_videos
from far_scale.data.video.videos import read_video
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256, write_json

diffusers = pytest.importorskip("diffusers", reason="DC-AE needs diffusers")

ROOT = Path(__file__).parents[2]
DOWNSAMPLE = {"f8c32": 8, "f16c32": 16, "f32c32": 32}
OFFICIAL_STATE_DICTS = {
    "f8c32": "793be76f39c92a28779e164f9a08056da996d2fea9c8742c953d75df941e8527",
    "f16c32": "f22596b4a999b00f2b0081e83946d97070259450c2ab62f56a6c69164fa8ab6d",
    "f32c32": "3e18c08dd6a71815875cd697deb1d811b6e985ff2f49ef0ededdd0c5519728c2",
}
"""SHA-256 of the names, shapes and types in the state dict of the official MyAutoencoderDC of each configuration."""


def narrow(preset: str) -> dict[str, Any]:
    """A configuration of FAR's in a sixteenth of its width, with one block a stage."""
    config = dict(PRESETS[preset])
    stages = len(config["encoder_block_types"])
    for side in ("encoder", "decoder"):
        config[f"{side}_block_out_channels"] = [32] * stages
        config[f"{side}_layers_per_block"] = [0] + [1] * (stages - 1)
    return config


@pytest.fixture(scope="module")
def pixels(recorded: Path) -> Tensor:
    """Eight recorded frames [8, 3, 64, 64] in [-1, 1]."""
    frames = [read_video(path).frames[0] for path in sorted(recorded.glob("*.npz"))]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def theirs(preset: str, pixels: Tensor) -> Any:
    """diffusers' own class, narrow, whose batch norms have seen pictures."""
    torch.manual_seed(3)
    model = diffusers.AutoencoderDC(**narrow(preset), scaling_factor=0.25).train()
    with torch.no_grad():
        for _ in range(20):
            model(pixels)
    return model.eval()


@pytest.fixture(scope="module")
def model(pixels: Tensor) -> Any:
    return theirs("f8c32", pixels)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """`model` as diffusers saves it."""
    model.save_pretrained(tmp_path / "own-f8c32")
    return tmp_path / "own-f8c32"


@pytest.fixture
def official(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`model` as the official code saves it; the narrow configuration stands in for the official one."""
    monkeypatch.setitem(PRESETS, "f8c32", narrow("f8c32"))
    torch.save(model.state_dict(), tmp_path / "DCAE_Res64.pth")
    return tmp_path / "DCAE_Res64.pth"


@torch.no_grad()
def expect_same(autoencoder: autoencoders.Autoencoder, model: Any, pixels: Tensor) -> None:
    latents = model.encode(pixels).latent
    assert latents.std() > 0.1
    torch.testing.assert_close(autoencoder.encode(pixels), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        autoencoder.decode(latents), model.decode(latents).sample.clamp(-1, 1), atol=1e-5, rtol=1e-4
    )


def tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["import_checkpoint.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "import_checkpoint.py"), run_name="__main__")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_official_state_dicts(preset: str) -> None:
    with torch.device("meta"):
        network = autoencoders.build_network({"_class_name": CLASS_NAME, **PRESETS[preset]})
    lines = [f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(network.state_dict().items())]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == OFFICIAL_STATE_DICTS[preset]
    assert (network.downsample, network.latent_channels) == (DOWNSAMPLE[preset], 32)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_computes_what_diffusers_does(preset: str, pixels: Tensor) -> None:
    model = theirs(preset, pixels)
    network = autoencoders.build_network({"_class_name": CLASS_NAME, **narrow(preset)})
    network.load_state_dict(model.state_dict())
    autoencoder = autoencoders.Autoencoder("narrow", "", 1.0, network, torch.device("cpu"))
    side = 64 // DOWNSAMPLE[preset]
    assert autoencoder.encode(pixels).shape == (8, 32, side, side)
    expect_same(autoencoder, model, pixels)
    with pytest.raises(ValueError, match=f"multiples of {DOWNSAMPLE[preset]}"):
        autoencoder.encode(pixels[:, :, : 64 - DOWNSAMPLE[preset] // 2])


def test_the_last_layer_is_where_the_pixels_come_out(pixels: Tensor) -> None:
    for config in ({"_class_name": CLASS_NAME, **narrow("f8c32")}, {"channels": 8, "width": 16}):
        network = autoencoders.build_network(config)
        loss = network.decode(network.encode(pixels)).square().mean()
        (gradient,) = torch.autograd.grad(loss, network.last_layer)
        assert gradient.abs().max() > 0
        again = autoencoders.build_network(json.loads(json.dumps(network.config_dict())))
        assert again.load_state_dict(network.state_dict())


def test_a_diffusers_folder_is_loaded_by_path_and_name(
    folder: Path, model: Any, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_path = autoencoders.load(folder)
    assert (by_path.name, by_path.scaling_factor) == ("own-f8c32", 0.25)
    assert by_path.weight_hash == sha256(folder / "diffusion_pytorch_model.safetensors")
    expect_same(by_path, model, pixels)
    monkeypatch.setenv("FAR_SCALE_AUTOENCODERS", str(folder.parent))
    assert autoencoders.load("own-f8c32").weight_hash == by_path.weight_hash
    monkeypatch.chdir(folder)
    assert autoencoders.load(".").name == "own-f8c32"


def test_official_weights_are_imported_bit_for_bit(
    official: Path, model: Any, pixels: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = official.parent / "autoencoders" / "dcae-test-64-f8c32.safetensors"
    tool(monkeypatch, official, "--out", out)
    assert f"{out}: DC-AE f8c32, named dcae-test-64-f8c32" in capsys.readouterr().out
    state, stored = model.state_dict(), load_file(out)
    assert set(stored) == set(state)
    assert all(torch.equal(stored[name], state[name]) and stored[name].dtype == state[name].dtype for name in state)
    imported = autoencoders.load(out)
    expect_same(imported, model, pixels)
    assert (imported.name, imported.scaling_factor) == ("dcae-test-64-f8c32", SCALING_FACTOR)
    metadata = json.loads(out.with_suffix(".json").read_text())
    assert metadata["weights_sha256"] == imported.weight_hash == sha256(out)
    assert (metadata["imported_from"], metadata["imported_sha256"]) == ("DCAE_Res64.pth", sha256(official))


def test_a_shard_set_finds_its_imported_autoencoder_by_name(
    official: Path, recorded: Path, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(official.parent)
    import_autoencoder(official, "autoencoders/dcae-test.safetensors")  # the folder that is looked into by itself
    encode_videos(find_videos(recorded)[:2], "set", "dcae-test", samples_per_shard=2)
    shards = ShardSet.open("set")
    autoencoder = matching_autoencoder(shards.manifest)
    assert shards.manifest.latent_shape == (32, 8, 8) and shards.manifest.autoencoder.scaling_factor == SCALING_FACTOR
    stored = shards.read(0, 0).latents[0].float()
    torch.testing.assert_close(stored, autoencoder.encode(pixels[:1])[0], atol=1e-3, rtol=2**-8)  # stored in bf16


@pytest.mark.parametrize("kind", ["dc_ae", "compact"])
def test_bf16_is_close_to_fp32(kind: str, folder: Path, pixels: Tensor) -> None:
    """Latents within 2% of their deviation, root mean square, and pixels within 0.02 (of -1 to 1)."""
    source = folder if kind == "dc_ae" else "compact-vizdoom-f8c32"
    exact, rounded = autoencoders.load(source), autoencoders.load(source, dtype=torch.bfloat16)
    latents, close = exact.encode(pixels), rounded.encode(pixels)
    assert close.dtype == torch.float32 and not torch.equal(close, latents)
    assert (close - latents).square().mean().sqrt() < 0.02 * latents.std()
    decoded = rounded.decode(latents)
    assert decoded.dtype == torch.float32 and decoded.shape == pixels.shape
    assert (decoded - exact.decode(latents)).square().mean().sqrt() < 0.02


def test_invalid_folders_are_refused_in_one_line(folder: Path) -> None:
    config_file, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    config = json.loads(config_file.read_text())

    def refused(said: str, **changes: object) -> None:
        write_json(config_file, config | changes)
        with pytest.raises(UserError, match=said) as caught:
            autoencoders.load(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    refused("_class_name is AutoencoderKL, only AutoencoderDC is supported", _class_name="AutoencoderKL")
    refused("not a config of diffusers' AutoencoderDC .*latent_chanels", latent_chanels=8)
    refused("not a config of diffusers' AutoencoderDC", encoder_block_out_channels=[32])
    refused("of another autoencoder", decoder_layers_per_block=[0, 1, 1, 2])
    weights.write_bytes(weights.read_bytes()[:5000])
    refused("weights are broken")
    weights.unlink()
    refused("has no diffusion_pytorch_model.safetensors; save it again")
    config_file.unlink()
    with pytest.raises(UserError, match="no such name"):
        autoencoders.load(folder)


def test_official_files_that_do_not_fit_are_refused_in_one_line(
    official: Path, model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = official.parent / "out.safetensors"

    def refused(said: str, *arguments: object) -> None:
        with pytest.raises(SystemExit) as stopped:
            tool(monkeypatch, *arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]

    state = model.state_dict()
    refused(
        "an autoencoder is a file; give a name that ends in .safetensors", official, "--out", official.parent / "out"
    )
    refused("--window is for FAR models, and", official, "--window", 8, "--out", out)
    other = official.with_name("other.pth")
    torch.save({name: tensor for name, tensor in state.items() if "conv_in" not in name}, other)
    refused("it has as many stages as f8c32, but misses tensors: encoder.conv_in", other, "--out", out)
    torch.save({"encoder.stages.0.weight": torch.zeros(1)}, other)
    refused("has unexpected tensors: encoder.stages.0.weight; it is not an official DC-AE", other, "--out", out)
    torch.save({"generator.weight": torch.zeros(1)}, other)
    refused("holds generator.weight, ...: neither an official FAR or FAR_Long", other, "--out", out)
    assert not out.exists() and not out.with_suffix(".json").exists()


def test_weights_of_other_metadata_are_refused(official: Path, model: Any) -> None:
    out = official.parent / "own.safetensors"
    import_autoencoder(official, out)
    save_file({name: tensor + 1 for name, tensor in model.state_dict().items()}, out)
    with pytest.raises(UserError, match=r"own.safetensors: not the weights that own.json describes"):
        autoencoders.load(out)
