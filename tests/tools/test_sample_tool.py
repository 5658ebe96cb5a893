"""tools/sample.py on recorded episodes, past the window of a small model with context."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from far_scale.model import FARConfig
from harness.launch import ROOT
from harness.random_models import write_random_model

CONFIG = FARConfig(layers=1, heads=1, patch=2, context_patch=4, window=4, actions=4)


@pytest.fixture(scope="module")
def model_dir(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; a fresh model's velocity would be zero."""
    return write_random_model(tmp_path_factory.mktemp("model") / "model", CONFIG, recorded_shards, std=0.1, step=0)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "sample.py"), run_name="__main__")


@pytest.mark.slow
def test_a_video_its_sheet_and_its_report(
    model_dir: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "walk.mp4"
    arguments = [model_dir, "--context", recorded, "--frames", 14, "--steps", 2, "--guidance", 1.5, "--episodes", 2]
    run(monkeypatch, *arguments, "--seed", 3, "--out", out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["walk.json", "walk.mp4", "walk.png"]
    said = capsys.readouterr().out.splitlines()
    for part in (str(model_dir), "window 4, context patch 4", "2 clips", "4 frames given + 14 new", "2 steps", " MB"):
        assert part in said[0], said[0]
    assert "recorded pixels of 14 frames" in said[2] and said[3].split()[:2] == ["prediction", "PSNR"]
    with av.open(str(out)) as file:
        assert file.streams.video[0].codec_context.name == "h264"
        assert len(list(file.decode(video=0))) == 18
    assert Image.open(out.with_suffix(".png")).size[0] > 18 * 128
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["given"], report["frames"], report["seed"]) == (4, 14, 3)
    assert len(report["prediction"]["psnr_per_frame"]) == 14

    run(monkeypatch, *arguments, "--seed", 3, "--out", tmp_path / "again.mp4")
    run(monkeypatch, *arguments, "--seed", 4, "--out", tmp_path / "other.mp4")
    for suffix in (".png", ".json", ".mp4"):
        same, other = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in ("again", "other"))
        assert same == out.with_suffix(suffix).read_bytes() != other, suffix


def test_a_shard_set_or_one_file_may_be_the_context(
    model_dir: Path, recorded: Path, recorded_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    for name, context in (("set", recorded_shards), ("file", sorted(recorded.iterdir())[0])):
        arguments = ["--context", context, "--given", 6, "--frames", 3, "--steps", 1, "--episodes", 1]
        run(monkeypatch, model_dir, *arguments, "--out", tmp_path / f"{name}.mp4")
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert [report["truth"] for report in reports] == ["decoded latents", "recorded pixels"]
    psnr = [report["prediction"]["psnr"] for report in reports]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.5)  # apart from what the autoencoder loses


def test_wrong_use_is_reported_in_one_line(
    model_dir: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = tmp_path / "silent.npz"
    np.savez(silent, frames=np.zeros((8, 64, 64, 3), np.uint8))
    out = tmp_path / "out"
    cases = [
        (recorded, ["--out", out / "walk.avi"], "must end in .mp4"),
        (recorded, ["--frames", 30, "--out", out / "walk.mp4"], "24 frames, but 31 are needed (for the actions"),
        (silent, ["--out", out / "walk.mp4"], "silent.npz: holds no actions"),
        (tmp_path / "absent", ["--out", out / "walk.mp4"], "no such file or folder"),
        (recorded, ["--out", "/proc/none/walk.mp4"], "/proc/none/walk.mp4: cannot be written"),
        (recorded, ["--guidance", "inf", "--out", out / "walk.mp4"], "guidance: inf has no meaning"),
        (recorded, ["--seed", 2**64, "--out", out / "walk.mp4"], "must be from 0 to 2^64 - 1"),
        (recorded, ["--guidance", 0, "--out", out / "walk.mp4"], "guidance: 0 has no meaning"),
    ]
    for context, arguments, message in cases:
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, model_dir, "--context", context, *arguments)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in error
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert not out.exists()
