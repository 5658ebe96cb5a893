"""`FAR.from_pretrained`: folders, and repositories of a hub that runs in this process."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, save_model_dir
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.model import FAR, FARConfig
from far_scale.model.hub import find_model, is_repository
from harness.hub_server import TOKEN, Hub, commit_of, running_hub
from harness.refusal import refused

CONFIG = FARConfig(layers=2, heads=1, channels=4, window=4, actions=3)
METADATA = ModelMetadata(
    autoencoder=AutoencoderInfo(name="some-autoencoder", weight_hash="ab" * 32, scaling_factor=0.5),
    scaling=LatentScaling(shift=(0.0,) * 4, scale=(0.5,) * 4),
    latent_shape=(4, 2, 2),
    fps=8.0,
    training=TrainingMetadata(step=12, recipe_hash="cd" * 32, weights="ema", far_scale="0.1.0"),
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(x.shape, generator=draw) for name, x in FAR(CONFIG).state_dict().items()}
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, max_file_bytes: int = 10**9) -> Path:
    save_model_dir(folder, CONFIG, some_state(seed, dtype), METADATA, max_file_bytes)
    return folder


def holds(model: FAR, state: dict[str, torch.Tensor]) -> bool:
    """Whether the weights are these, bit by bit."""
    loaded = model.state_dict()
    return loaded.keys() == state.keys() and all(
        loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor) for name, tensor in state.items()
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with running_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_loads_bit_by_bit_without_huggingface_hub(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # its import fails
    folder = write_model(tmp_path / "org" / "maze", dtype=dtype)
    model = FAR.from_pretrained(folder)
    assert model.config == CONFIG and not model.training and holds(model, some_state(dtype=dtype))
    monkeypatch.chdir(tmp_path)
    assert holds(FAR.from_pretrained("org/maze"), some_state(dtype=dtype))  # a path, though it looks like a repository
    wide = FAR.from_pretrained("org/maze", dtype=torch.float64)
    assert holds(wide, {name: tensor.double() for name, tensor in some_state(dtype=dtype).items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_repository_loads_bit_by_bit_and_only_its_model_is_downloaded(
    dtype: torch.dtype, hub: Hub, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", dtype=dtype)
    (folder / "README.md").write_text("a card")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.upload("org/maze", folder)
    assert holds(FAR.from_pretrained("org/maze"), some_state(dtype=dtype))
    assert hub.downloads == ["config.json", "model.safetensors"]
    assert holds(FAR.from_pretrained("org/maze", dtype=torch.float32), {
        name: tensor.float() for name, tensor in some_state(dtype=dtype).items()
    })  # fmt: skip
    assert len(hub.downloads) == 2  # from the cache


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(seed), seed, max_file_bytes=10**9 if seed else 100_000) for seed in range(3)]
    repository = hub.upload("org/maze", *folders, tags={"v1": 0})
    for revision, seed in ((None, 2), ("main", 2), ("v1", 0), (commit_of(1), 1), (commit_of(0), 0)):
        assert holds(FAR.from_pretrained("org/maze", revision=revision), some_state(seed)), revision
    refused(lambda: FAR.from_pretrained("org/maze", "v9"), "org/maze at revision v9", "no such revision", "tag")
    # All files are of the commit that config.json is of, also if main moves on meanwhile.
    asked = find_model("org/maze")
    repository.commits.append(repository.commits[0])
    assert asked.name == commit_of(2) and find_model("org/maze").name == commit_of(3)
    assert holds(FAR.from_pretrained("org/maze"), some_state(0))


def test_directories_without_a_list_of_files_load(hub: Hub, tmp_path: Path) -> None:
    for name, limit in (("one", 10**9), ("split", 100_000)):
        folder = write_model(tmp_path / name, max_file_bytes=limit)
        config = json.loads((folder / "config.json").read_text())
        del config["files"]
        (folder / "config.json").write_text(json.dumps(config))
        hub.upload(f"org/{name}", folder)
        assert holds(FAR.from_pretrained(f"org/{name}"), some_state()), name


def test_private_and_gated_repositories_need_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model")
    hub.upload("org/private", folder, needs="token")
    hub.upload("org/gated", folder, needs="access")
    for name in ("org/private", "org/nothing"):
        refused(lambda name=name: FAR.from_pretrained(name), f"{name}: ", "or it is private", "set HF_TOKEN")
    refused(lambda: FAR.from_pretrained("org/gated"), "org/gated: ", "gated", "ask for access")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    refused(lambda: FAR.from_pretrained("org/private"), "org/private: ", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert holds(FAR.from_pretrained("org/private"), some_state())
    assert holds(FAR.from_pretrained("org/gated"), some_state())


def test_a_repository_of_something_else_is_refused_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    for problem, content in (
        ("has no config.json", None),
        ("not readable JSON", "{"),
        ("format in its config.json is None", json.dumps({"model_type": "bert"})),
        ("format in its config.json is None", "[]"),
        ("'pytorch_model.bin' as a file of weights", json.dumps(config | {"files": {"pytorch_model.bin": {}}})),
        ("'../model.safetensors' as a file", json.dumps(config | {"files": {"../model.safetensors": {}}})),
    ):
        (folder / "config.json").unlink(missing_ok=True)
        if content is not None:
            (folder / "config.json").write_text(content)
        hub.upload("org/other", folder)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        refused(lambda: FAR.from_pretrained("org/other"), problem)
    assert set(hub.downloads) == {"config.json"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    hub.upload("org/other", folder)
    shutil.rmtree(tmp_path / "cache")
    refused(lambda: FAR.from_pretrained("org/other"), "org/other: ", "has no model.safetensors", "export_checkpoint.py")


def test_offline_only_what_is_in_the_cache_loads(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.upload("org/maze", write_model(tmp_path / "model"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: FAR.from_pretrained("org/maze"), "org/maze: config.json is not in", "HF_HUB_OFFLINE is set")
    assert hub.requests == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    FAR.from_pretrained("org/maze")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = hub.requests
    assert holds(FAR.from_pretrained("org/maze"), some_state()) and hub.requests == requests
    (find_model("org/maze") / "model.safetensors").unlink()
    refused(lambda: FAR.from_pretrained("org/maze"), "model.safetensors is not in", "HF_HUB_OFFLINE is set; unset it")


def test_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.upload("org/maze", write_model(tmp_path / "model"))
    FAR.from_pretrained("org/maze")
    dead = "http://127.0.0.1:9"  # the port of the discard service, which nothing listens on
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead + "/{repo_id}/resolve/{revision}/{filename}")
    assert holds(FAR.from_pretrained("org/maze"), some_state())  # from the cache
    refused(lambda: FAR.from_pretrained("org/other"), "org/other: there is no such folder here", dead, "connection")


def test_a_download_that_breaks_off_is_resumed_or_leaves_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of complete ones the transfer is resumed
    folder = write_model(tmp_path / "model")
    size = (folder / "model.safetensors").stat().st_size
    hub.upload("org/maze", folder)
    hub.cuts["model.safetensors"] = 1
    assert holds(FAR.from_pretrained("org/maze"), some_state())
    assert hub.ranges == [f"bytes={size // 2 // 1000 * 1000}-"]

    shutil.rmtree(tmp_path / "cache")
    hub.cuts["model.safetensors"] = 1000
    refused(lambda: FAR.from_pretrained("org/maze"), "model.safetensors could not be downloaded", "run it again")
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert left == [] and not list((tmp_path / "cache").rglob("model.safetensors"))
    hub.cuts.clear()
    assert holds(FAR.from_pretrained("org/maze"), some_state())


def test_weights_that_were_changed_are_refused(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-10] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    hub.upload("org/maze", folder)
    refused(lambda: FAR.from_pretrained("org/maze"), "org--maze", "does not have the SHA-256")


def test_without_huggingface_hub_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(
        lambda: FAR.from_pretrained("org/maze"), "org/maze: there is no such folder", "pip install 'far_scale[hub]'"
    )


def test_a_path_is_never_looked_up(hub: Hub, tmp_path: Path) -> None:
    hub.upload("runs/maze", write_model(tmp_path / "model"))
    for source in ("model", "./runs/maze", "/runs/maze", "runs/a/b", "~/maze", "../maze", "runs/", Path("maze")):
        assert not is_repository(source), source
    assert is_repository("runs/maze") and is_repository(Path("runs/maze"))
    os.mkdir("runs")  # now a mistyped path
    for source in ("runs/maze", str(tmp_path / "nowhere")):
        refused(lambda source=source: FAR.from_pretrained(source), f"{source}: there is no model directory here")
    refused(lambda: FAR.from_pretrained("runs/maze", "v1"), "runs/maze: is a path here", "leave revision out")
    os.mkdir("runs/maze")
    refused(lambda: FAR.from_pretrained("runs/maze"), "config.json: there is no")
    assert hub.requests == 0
