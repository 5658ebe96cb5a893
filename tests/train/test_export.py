"""Exports: of the checkpoint that was named, verified, and written again wherever the folder is not that very one."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.convert.model_dir import load_model, load_model_dir, read_config, save_model_dir
from far_scale.evaluation.rollouts.runner import load_for_sampling
from far_scale.train import checkpoint
from far_scale.train.checkpoint.export import export, export_if_needed, export_official
from harness.refusal import refused
from harness.tools import tool
from harness.written_runs import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in their weights alone; one of them has two steps."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", 7)
    write_run(folder / "a", 8, 3.0)
    write_run(folder / "b", 7, 5.0)
    return folder


def bias(model: Path) -> float:
    """A weight, by which the exports differ."""
    return load_model(model).state_dict()["output.out.bias"].abs().max().item()


def flip(path: Path, place: int) -> None:
    """Change one bit of the byte at `place`."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_folder_of_another_export_is_written_again(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    found = []
    for run, step, weights in (("a", 7, "ema"), ("b", 7, "ema"), ("a", 7, "ema"), ("a", 7, "model"), ("a", 8, "model")):
        assert export(runs / run, step, weights, out) == step  # type: ignore[arg-type]
        found.append(bias(out))
    assert [value / found[3] for value in found] == pytest.approx([2, 10, 2, 1, 3])


def test_a_whole_export_is_kept_and_reported(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    tool(monkeypatch, "export_checkpoint.py", runs / "a", "--out", out)
    assert "ema weights of step 8 exported" in capsys.readouterr().out
    before = (out / "model.safetensors").stat()
    later = time.time() + 100  # times say nothing
    for state in runs.glob("a/checkpoints/*/state.json"):
        os.utime(state, (later, later))
    tool(monkeypatch, "export_checkpoint.py", runs / "a", "--out", out)
    assert "ema weights of step 8 exist already and are intact" in capsys.readouterr().out
    assert (out / "model.safetensors").stat() == before
    shutil.copytree(runs / "a", tmp_path / "copy")  # the same content elsewhere
    assert export(tmp_path / "copy", None, "ema", out) == 8
    assert (out / "model.safetensors").stat() == before


@pytest.mark.parametrize(
    "harm", ["cut", "removed", "altered", "emptied", "config cut", "config altered", "of an older version", "one more"]
)
def test_a_damaged_folder_is_written_again(runs: Path, tmp_path: Path, harm: str) -> None:
    out, path = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    export(runs / "a", 7, "ema", out)
    config, right = out / "config.json", path.read_bytes()
    values = json.loads(config.read_text())
    if harm == "cut":
        os.truncate(path, 1000)
    elif harm == "removed":
        path.unlink()
    elif harm == "altered":
        flip(path, -100)
    elif harm == "emptied":
        path.write_bytes(b"")
    elif harm == "config cut":
        config.write_text(config.read_text()[:200])
    elif harm == "config altered":
        config.write_text(json.dumps(values | {"scaling": {"shift": [0.0] * 4, "scale": [0.25] * 4}}))
    elif harm == "of an older version":
        older = json.loads(config.read_text())
        del older["files"], older["training"]["checkpoint"]
        config.write_text(json.dumps(older))
        flip(path, -100)
    else:
        (out / "model-00001-of-00002.safetensors").write_bytes(right)
    later = time.time() + 100
    for file in out.iterdir():
        os.utime(file, (later, later))
    export(runs / "a", 7, "ema", out)
    assert path.read_bytes() == right and json.loads(config.read_text()) == values
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]


def test_an_altered_byte_of_a_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export(runs / "a", 7, "ema", out)
    shutil.copytree(runs / "a", tmp_path / "run")
    folder = checkpoint.step_folder(tmp_path / "run", 7)
    for name in (".metadata", "__0_0.distcp", "state.json", "checksums.json"):
        whole = (folder / name).read_bytes()
        flip(folder / name, len(whole) // 2)
        for target in (out, tmp_path / "new"):
            refused(lambda target=target: export(tmp_path / "run", 7, "ema", target), "step-00000007")
        refused(lambda: export_official(tmp_path / "run", 7, "ema", tmp_path / "own.pth"), "step-00000007")
        if name in (".metadata", "__0_0.distcp"):
            refused(
                lambda name=name: export(tmp_path / "run", 7, "ema", out), f"{folder}: damaged: {name}: ", "SHA-256"
            )
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "new").exists() and not (tmp_path / "own.pth").exists()
    assert export(tmp_path / "run", 7, "ema", tmp_path / "new") == 7


@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_an_altered_byte_of_a_model_directory_is_refused(runs: Path, tmp_path: Path, limit: int) -> None:
    export(runs / "a", 7, "ema", tmp_path / "one")
    model, card = load_model_dir(tmp_path / "one")
    save_model_dir(tmp_path / "model", model.config, model.state_dict(), card, max_file_bytes=limit)
    file = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    flip(file, -10)
    for read in (load_model_dir, load_model):
        refused(lambda read=read: read(tmp_path / "model"), str(file), "SHA-256", "export the model again")
    refused(lambda: export_official(tmp_path / "model", None, "ema", tmp_path / "own.pth"), str(file))
    flip(file, -10)
    assert torch.equal(load_model(tmp_path / "model").state_dict()["output.out.bias"], model.output.out.bias)


def test_directories_without_checksums_still_load(runs: Path, tmp_path: Path) -> None:
    export(runs / "a", 7, "ema", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    assert values["files"]["model.safetensors"]["bytes"] == (tmp_path / "model" / "model.safetensors").stat().st_size
    before = bias(tmp_path / "model")
    values.pop("files")
    values["training"].pop("checkpoint")
    config.write_text(json.dumps(values))
    assert bias(tmp_path / "model") == before


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"data": {"frames": 4}}, 0),
        ({"data": {"frames": [3, 20]}, "curriculum": None}, 16),
        ({"data": {"frames": 9}, "curriculum": [{"frames": {"4": 0.5, "30": 0.5}}, {"steps": 5}]}, 26),
        ({"data": {"frames": 99}, "curriculum": [{"frames": 6}]}, 2),
        (None, None),
    ],
    ids=str,
)
def test_the_metadata_has_the_longest_context(recipe: Any, expected: int | None, tmp_path: Path) -> None:
    write_run(tmp_path / "run", **({} if recipe is None else {"recipe": recipe}))
    export(tmp_path / "run", None, "ema", tmp_path / "model")
    assert read_config(tmp_path / "model")[1].context_frames == expected
    assert ("context_frames" in (tmp_path / "model" / "config.json").read_text()) == (expected is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_round_to_the_nearest_number(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    name, out = str(dtype).removeprefix("torch."), tmp_path / "model"
    export(runs / "a", 7, "ema", tmp_path / "float32")
    tool(monkeypatch, "export_checkpoint.py", runs / "a", "--step", 7, "--dtype", name, "--out", out)
    exact, rounded = load_model(tmp_path / "float32").state_dict(), load_model(out).state_dict()
    limits = torch.finfo(dtype)
    for key, tensor in rounded.items():
        assert tensor.dtype == dtype
        # Half of the distance between the numbers around a weight: eps is that at 1, and it is constant below tiny.
        magnitude = exact[key].double().abs().clamp(min=limits.tiny)
        unit = limits.eps * 2.0 ** magnitude.log2().floor()
        assert ((tensor.double() - exact[key].double()).abs() <= unit / 2).all(), key
    size = (out / "model.safetensors").stat().st_size
    assert 0.5 <= size / (tmp_path / "float32" / "model.safetensors").stat().st_size < 0.52

    # On a CPU it computes in float32, with the stored numbers.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded, metadata = load_for_sampling(out)
    assert metadata == load_model_dir(tmp_path / "float32")[1]
    assert all(torch.equal(tensor, rounded[key].float()) for key, tensor in loaded.state_dict().items())
    assert loaded.patch_embedding.weight.dtype == torch.float32


def test_a_folder_of_another_type_is_written_again(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    for dtype, written in (
        (torch.float16, True),
        (torch.float16, False),
        (torch.bfloat16, True),
        (torch.float32, True),
        (torch.float32, False),
    ):
        assert export_if_needed(runs / "a", 7, "ema", out, dtype) == (7, written)
        assert {tensor.dtype for tensor in load_model(out).state_dict().values()} == {dtype}


def test_weights_beyond_a_type_and_other_formats_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", 7, factor=1e6)
    out = tmp_path / "model"
    refused(
        lambda: export_if_needed(tmp_path / "run", 7, "ema", out, torch.float16),
        str(tmp_path / "run"), "the largest value of", "float16 ends at 6.55e+04", "--dtype float32",
    )  # fmt: skip
    assert not out.exists()
    assert export_if_needed(tmp_path / "run", 7, "ema", out, torch.bfloat16) == (7, True)
    with pytest.raises(SystemExit):
        tool(
            monkeypatch, "export_checkpoint.py", tmp_path / "run", "--dtype", "float16", "--format", "official",
            "--out", tmp_path / "own.pth",
        )  # fmt: skip
    assert "--dtype is for model directories" in capsys.readouterr().err
