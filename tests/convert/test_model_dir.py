"""Model directories: what is written is what is read, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, load_model_dir, save_model_dir
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.model import FAR, FARConfig
from far_scale.utils.errors import UserError
from far_scale.utils.tensor_files import save_tensors

CONFIG = FARConfig(layers=2, heads=1, channels=4, window=4, actions=3)
METADATA = ModelMetadata(
    autoencoder=AutoencoderInfo(name="some-autoencoder", weight_hash="ab" * 32, scaling_factor=0.5),
    scaling=LatentScaling(shift=(0.0, 0.1, -0.2, 1 / 3), scale=(1.0, 2.0, 0.3, 1e-3)),
    latent_shape=(4, 2, 2),
    fps=8.0,
    training=TrainingMetadata(step=1200, recipe_hash="cd" * 32, weights="ema", far_scale="0.1.0"),
)


def some_state(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=draw) for name, tensor in FAR(CONFIG).state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model_dir(tmp_path / "model", CONFIG, some_state(), METADATA)
    return tmp_path / "model"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(folder: Path) -> None:
    model, metadata = load_model_dir(folder)
    assert (model.config, metadata) == (CONFIG, METADATA)
    assert not model.training
    state = some_state()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name]), name
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing is left beside it


def test_the_loaded_model_computes_what_the_saved_one_did(folder: Path) -> None:
    saved = FAR(CONFIG)
    saved.load_state_dict(some_state())
    latents = torch.randn(1, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    inputs = (latents, torch.tensor([[-1.0, -1.0, 300.0]]), torch.tensor([[0, 2, 1]]))
    output = load_model_dir(folder)[0](*inputs)
    assert output.abs().max() > 0
    assert torch.equal(output, saved(*inputs))


def test_bfloat16_is_kept_and_other_dtypes_are_made_on_request(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in some_state().items()}
    save_model_dir(tmp_path / "model", CONFIG, state, METADATA)
    assert {tensor.dtype for tensor in load_model_dir(tmp_path / "model")[0].parameters()} == {torch.bfloat16}
    wide = load_model_dir(tmp_path / "model", dtype=torch.float64)[0]
    assert all(torch.equal(tensor, state[name].double()) for name, tensor in wide.state_dict().items())


def test_large_weights_are_spread_over_files_with_an_index(tmp_path: Path) -> None:
    folder, state, limit = tmp_path / "model", some_state(), 100_000
    save_model_dir(folder, CONFIG, state, METADATA, max_file_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    loaded = load_model_dir(folder)[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_model_directory_is_replaced_and_anything_else_is_not(folder: Path, tmp_path: Path) -> None:
    save_model_dir(folder, CONFIG, some_state(seed=1), METADATA, max_file_bytes=100_000)
    loaded = load_model_dir(folder)[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in some_state(seed=1).items())
    assert not (folder / "model.safetensors").exists()

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not only a model directory"):
        save_model_dir(folder, CONFIG, some_state(), METADATA)
    assert (folder / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"not only a model directory"):
        save_model_dir(file, CONFIG, some_state(), METADATA)
    assert file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_model_dir(tmp_path / "empty", CONFIG, some_state(), METADATA)
    assert load_model_dir(tmp_path / "empty")[1] == METADATA


def test_the_old_model_stays_where_the_new_one_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if Path(target) == folder and not Path(source).name.endswith(".old.part"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match=r"could not be written .*No space left"):
        save_model_dir(folder, CONFIG, some_state(seed=1), METADATA)
    loaded = load_model_dir(folder)[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in some_state().items())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_wrong_state_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    state = some_state()
    state.pop("output.out.bias")
    with pytest.raises(UserError, match=r"misses tensors: output.out.bias"):
        save_model_dir(tmp_path / "model", CONFIG, state, METADATA)
    assert not list(tmp_path.iterdir())


def test_there_must_be_a_folder_with_a_valid_config(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: there is no model directory here"):
        load_model_dir(tmp_path / "nowhere")
    edit_config(folder, fps="fast")
    with pytest.raises(UserError, match=r"config.json: fps.*: Input should be a valid number"):
        load_model_dir(folder)
    edit_config(folder, fps=8.0, scaling={"shift": [0.0], "scale": [1.0]})
    with pytest.raises(UserError, match=r"scaling must have 4 numbers"):
        load_model_dir(folder)
    edit_config(folder, scaling=METADATA.scaling.to_dict(), model=CONFIG.to_dict() | {"depth": 3})
    with pytest.raises(UserError, match=r"config.json: model: .*\['depth'\]"):
        load_model_dir(folder)
    edit_config(folder, model=CONFIG.to_dict() | {"channels": 8})
    with pytest.raises(UserError, match=r"latent_shape has 4 channels and model.channels is 8"):
        load_model_dir(folder)
    edit_config(folder, format="other/1")
    with pytest.raises(UserError, match=r"format is 'other/1'"):
        load_model_dir(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"not readable JSON"):
        load_model_dir(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"there is no model directory's config.json here"):
        load_model_dir(folder)


def test_wrong_tensors_are_named(folder: Path) -> None:
    weights, state = folder / "model.safetensors", some_state()
    missing = {name: tensor for name, tensor in state.items() if name != "blocks.1.mlp.up.bias"}
    save_file(missing, weights)
    with pytest.raises(UserError, match=r"misses tensors: blocks.1.mlp.up.bias;"):
        load_model_dir(folder)
    save_file(state | {"other.weight": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match=r"unexpected tensors: other.weight;"):
        load_model_dir(folder)
    save_file(state | {"output.out.bias": torch.zeros(5)}, weights)
    with pytest.raises(UserError, match=r"another shape tensors: output.out.bias \(\[5\] instead of \[4\]\)"):
        load_model_dir(folder)
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"model.safetensors: is not a complete safetensors file"):
        load_model_dir(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: this weights file is missing"):
        load_model_dir(folder)


def test_other_users_may_read_the_weights(tmp_path: Path) -> None:
    """On a shared cluster: as readable as any other file of this user."""
    plain = tmp_path / "plain"
    plain.touch()
    save_tensors({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode == plain.stat().st_mode
