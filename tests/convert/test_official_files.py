"""Files of official weights: read whatever wrote them, imported as model directories, exported from all we have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from far_scale.convert import official
from far_scale.convert.model_dir import ModelMetadata, load_model, load_model_dir, read_any_config, read_config
from far_scale.convert.official import import_model, read_official, write_official
from far_scale.data.loader.scaling import LatentScaling
from far_scale.model import FAR
from far_scale.train.checkpoint.export import export, export_official
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256
from harness.latent_sets import FACTS, write_set
from harness.official_cases import CASES, official_weights, recorded_shapes, same_bits
from harness.tools import tool
from harness.written_runs import SMALL, trained_state, write_run

ROOT = Path(__file__).parents[2]
LONG = CASES["long_action"].config


def weights(name: str = "long_action") -> dict[str, torch.Tensor]:
    return official_weights(recorded_shapes(name))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "official.pth")
    return tmp_path / "official.pth"


def small_weights() -> dict[str, torch.Tensor]:
    """Official weights of the SMALL model."""
    shapes = {name: list(tensor.shape) for name, tensor in FAR(SMALL).state_dict().items()}
    return official.from_far_scale(SMALL, official_weights(shapes))


def test_pth_and_safetensors_are_read(file: Path, tmp_path: Path) -> None:
    same_bits(read_official(file), weights())
    save_file(weights(), tmp_path / "model.safetensors")
    same_bits(read_official(tmp_path / "model.safetensors"), weights())


def test_files_without_weights_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.pth: there is no such file"):
        read_official(tmp_path / "nowhere.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("these are no weights\n" * 10)
        with pytest.raises(UserError, match=name):
            read_official(tmp_path / name)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cut.pth: is not a complete torch.save file"):
        read_official(cut)
    for value, found in (
        ({"state_dict": weights(), "epoch": 3}, "a dict with state_dict, epoch"),
        (torch.zeros(3), "Tensor"),
    ):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(UserError, match=rf"other.pth: holds {found} instead of named tensors"):
            read_official(tmp_path / "other.pth")
    torch.save(FAR(SMALL), tmp_path / "pickled.pth")  # an object, which weights_only does not build
    with pytest.raises(UserError, match=r"pickled.pth: cannot be read as weights"):
        read_official(tmp_path / "pickled.pth")


def test_import_then_export_returns_every_tensor(file: Path, tmp_path: Path) -> None:
    assert import_model(file, tmp_path / "model", window=4) == LONG
    what = export_official(tmp_path / "model", None, "ema", tmp_path / "back.pth")
    assert what == "weights imported from official.pth"
    same_bits(torch.load(tmp_path / "back.pth", weights_only=True), weights())


def test_a_directory_of_only_weights_loads_but_does_not_sample(file: Path, tmp_path: Path) -> None:
    import_model(file, tmp_path / "model", window=4)
    model = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert model.config == LONG and not model.training and model.output.out.weight.dtype == torch.bfloat16
    same_bits(load_model(tmp_path / "model").state_dict(), official.to_far_scale(weights(), 4)[1])
    assert read_any_config(tmp_path / "model")[1].training.sha256 == sha256(file)  # type: ignore[union-attr]
    for read in (read_config, load_model_dir):
        with pytest.raises(
            UserError, match=r"autoencoder, scaling and latent_shape are not set; .* with --shards"
        ) as e:
            read(tmp_path / "model")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("scaling", ["factor", "channel"])
def test_a_shard_set_gives_what_sampling_needs(tmp_path: Path, scaling: str) -> None:
    manifest = write_set(tmp_path / "set", [6, 8], 1)
    torch.save(small_weights(), tmp_path / "official.pth")
    import_model(tmp_path / "official.pth", tmp_path / "model", 4, 1, tmp_path / "set", scaling, 2)  # type: ignore[arg-type]
    model, metadata = load_model_dir(tmp_path / "model")
    assert model.config == SMALL and isinstance(metadata, ModelMetadata)
    assert (metadata.autoencoder, metadata.latent_shape, metadata.fps) == (FACTS.autoencoder, FACTS.latent_shape, 8.0)
    assert metadata.frame_stride == 2
    assert metadata.scaling == LatentScaling.of(manifest, scaling)  # type: ignore[arg-type]


def test_a_shard_set_of_other_latents_is_refused(file: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "set", [6, 8], 1)
    with pytest.raises(
        UserError, match=r"set: frame latents of \[4, 2, 2\], the model takes 4 channels in patches of 4"
    ):
        import_model(file, tmp_path / "model", window=4, shards=tmp_path / "set")
    torch.save(weights("far_action"), file)
    with pytest.raises(UserError, match=r"set: 4 actions, the model has 3"):
        import_model(file, tmp_path / "model", shards=tmp_path / "set")
    assert not (tmp_path / "model").exists()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_exports_for_the_official_code_with_what_training_lacks(run: Path, tmp_path: Path) -> None:
    assert export_official(run, None, "model", tmp_path / "own.pth") == "model weights of step 7"
    theirs = torch.load(tmp_path / "own.pth", weights_only=True)
    same_bits(theirs, official.from_far_scale(SMALL, trained_state()))
    assert not theirs["context_proj_out.weight"].any() and not theirs["context_proj_out.bias"].any()
    assert torch.equal(theirs["transformer_blocks.1.attn.norm_added_q.weight"], torch.ones(64))
    export_official(run, 7, "ema", tmp_path / "ema.pth")
    average = torch.load(tmp_path / "ema.pth", weights_only=True)
    assert torch.equal(average["proj_out.weight"], 2 * theirs["proj_out.weight"])


def test_a_run_exports_a_model_directory_with_the_buffers(run: Path, tmp_path: Path) -> None:
    assert export(run, None, "model", tmp_path / "model") == 7
    same_bits(load_model_dir(tmp_path / "model")[0].state_dict(), trained_state())
    assert export_official(tmp_path / "model", None, "ema", tmp_path / "own.pth") == "model weights of step 7"
    same_bits(torch.load(tmp_path / "own.pth", weights_only=True), official.from_far_scale(SMALL, trained_state()))


def test_the_tools(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out, back = tmp_path / "own.pth", tmp_path / "model"
    tool(monkeypatch, "export_checkpoint.py", run, "--weights", "model", "--format", "official", "--out", out)
    tool(monkeypatch, "import_checkpoint.py", out, "--window", 4, "--out", back)
    said = capsys.readouterr().out
    assert f"{out}: model weights of step 7 exported" in said
    assert "FAR-Long, 2 layers of 1 heads, 4 channels, patch 1, window 4, context patches of 2, 4 actions" in said
    same_bits(load_model(back).state_dict(), trained_state())
    for arguments, message in (
        (("export_checkpoint.py", back, "--step", 7, "--format", "official", "--out", out), "leave --step out"),
        (("export_checkpoint.py", back, "--format", "official", "--out", tmp_path / "own.bin"), "name one"),
        (("import_checkpoint.py", run / "nothing.pth", "--out", back), "there is no such file"),
        (("import_checkpoint.py", out, "--patch", 0, "--out", back), "with patch=0"),
        (("import_checkpoint.py", out, "--frame-stride", 0, "--out", back), "frame stride 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            tool(monkeypatch, *arguments)  # type: ignore[arg-type]
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and message in error


def test_a_file_that_cannot_be_written_completely_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"own.pth: could not be written \(unexpected pos 64 vs 0\); free some space"):
        write_official(tmp_path / "own.pth", weights())
    assert not list(tmp_path.iterdir())
