"""The report of an evaluation shows the numbers that the evaluation wrote, and compares only what can be compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from far_scale.data.video.videos import read_video
from far_scale.evaluation.compare import SEPARATE_TABLES, compare
from far_scale.evaluation.curves import mean_curve
from far_scale.evaluation.protocol import Metric, Protocol, Published, load_protocol
from far_scale.evaluation.report import format_table, write_report
from far_scale.evaluation.results import PAIRED, SYSTEMS, PerClip, System, Values, read_per_clip
from far_scale.evaluation.rollouts.psnr_ssim import PSNR_CAP
from far_scale.evaluation.rollouts.video_grid import (
    BORDER,
    CAPTION_WIDTH,
    GIVEN_COLOUR,
    LINE_HEIGHT,
    SHEET_CAPTION_HEIGHT,
)
from far_scale.evaluation.score_statistics import bootstrap_interval
from far_scale.utils.errors import UserError

CLIPS, GIVEN, PREDICTED, SIDE = 5, 8, 8, 16
HEIGHT, WIDTH = 486, 1512  # of curves: three panels
SCORES = {
    "lpips": {"mean": 0.42, "ci95": [0.4, 0.4444]},
    "psnr": {"mean": 15.8, "ci95": [15.0, 16.25]},
    "ssim": {"mean": 0.51, "ci95": [0.5, 0.52]},
    "fvd": {"mean": 812.34, "std": None},
}
REPEATED = {"lpips": {"mean": 0.384, "ci95": [0.3, 0.4]}, "psnr": {"mean": None, "ci95": [20.0, None]}}
DECODED = {"lpips": {"mean": 0.026, "ci95": [0.025, 0.027]}, "fvd": {"mean": 60.0}}


def protocol(**changes: Any) -> Protocol:
    return load_protocol("vizdoom-8to8").with_clips(count=CLIPS, size=SIDE).model_copy(update=changes)


def without_given_frames() -> Protocol:
    sampling = protocol().sampling.model_copy(update={"given": 0, "predicted": GIVEN + PREDICTED})
    return protocol(sampling=sampling, metrics=("fvd",))


def write_scores(folder: Path, used: Protocol, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "protocol": used.name,
        "protocol_hash": used.hash(),
        "n": CLIPS,
        "weights": {"source": "runs/quickstart/model", "kind": "ema", "step": 1500, "sha256": "ab" * 32},
        "guidance": 1.5,
        "scores": SCORES,
        "repeat_last": REPEATED,
        "reconstruction": DECODED,
        "settings": used.model_dump(mode="json"),
        "device": "cpu",  # what a report does not read
    }
    values |= changes
    folder.mkdir(exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(values))
    return values


def evaluated(folder: Path, used: Protocol | None = None, offset: float = 0.0, **changes: Any) -> Path:
    """A folder as an evaluation leaves it; clip 3 is the best one, and then 1, 4, 0, 2."""
    used = used or protocol()
    write_scores(folder, used, **changes)
    shape, draw = (CLIPS, used.sampling.predicted), np.random.default_rng(0)
    arrays: dict[str, Any] = {"keys": np.array([f"clip-{i}" for i in range(CLIPS)]), "given": np.array(GIVEN)}
    lpips = np.array([0.4, 0.2, 0.5, 0.1, 0.3])[:, None] + offset
    if used.sampling.given:
        for system in SYSTEMS:
            arrays |= {f"{system}/{metric}": draw.random(shape) for metric in ("psnr", "ssim")}
            arrays[f"{system}/lpips"] = np.broadcast_to(lpips, shape)
    np.savez(folder / "per_clip.npz", **arrays)
    (folder / "samples").mkdir()
    for clip in range(CLIPS):
        frames = np.full((1, used.total_frames, SIDE, SIDE, 3), 50 * clip, dtype=np.uint8)
        other_trajectory = np.full_like(frames, 255)
        truth = frames[0] + np.uint8(10)
        both = np.concatenate([frames, other_trajectory]) if clip == 2 else frames[0]
        np.savez_compressed(folder / "samples" / f"clip-{clip}.npz", frames=both, truth=truth)
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its report; not to be changed."""
    folder = evaluated(tmp_path_factory.mktemp("evaluation") / "a")
    write_report(folder)
    return folder


def picture(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def test_the_table_has_the_scores_and_what_they_were_made_with(reported: Path) -> None:
    text = (reported / "scores.md").read_text()
    lines = text.splitlines()
    assert lines[2] == "|  | LPIPS ↓ | PSNR (dB) ↑ | SSIM ↑ | FVD ↓ |"
    assert lines[4] == "| model | 0.420 [0.400, 0.444] | 15.80 [15.00, 16.25] | 0.510 [0.500, 0.520] | 812.3 |"
    assert lines[5] == "| repeat the last given frame | 0.384 [0.300, 0.400] | not finite [20.00, not finite] | - | - |"
    assert lines[6] == "| autoencoder's reconstruction (the ceiling) | 0.026 [0.025, 0.027] | - | - | 60.0 |"
    for setting in (
        "N: 5 clips",
        f"vizdoom-8to8, hash {protocol().hash()[:12]}",
        "ema of step 1500, SHA-256 abababababab",
        "8 given -> 8 predicted, 16 px",
        "8 steps per frame, guidance 1.5",
        "seeds: 0",
        "FVD sees 16 frames of a clip (all)",
        "of the mean squared error over all clips",
        "must not be compared",
        "5 clips: below 401",
        "singular",
    ):
        assert setting in text, setting
    assert "published" not in text


def test_the_console_has_the_same_table_aligned(tmp_path: Path) -> None:
    reordered = protocol(metrics=("fvd", "ssim", "psnr", "lpips"))
    lines = format_table(write_scores(tmp_path, reordered)).splitlines()
    assert lines[0].split() == ["LPIPS", "↓", "FVD", "↓", "SSIM", "↑", "PSNR", "(dB)", "↑"]
    column = lines[0].index("FVD")
    assert [line[column:].split()[0] for line in lines] == ["FVD", "812.3", "-", "60.0"]
    assert not any(line.endswith(" ") for line in lines)


def test_published_scores_seeds_and_extrapolation(tmp_path: Path) -> None:
    published = (Published(model="FAR-B", lpips=0.037, fvd=194.1), Published(model="A|B", psnr=22.0))
    scores = {**SCORES, "fvd": {"mean": 812.34, "std": 10.26, "infinity": 700.0}}
    folder = evaluated(tmp_path / "a", protocol(published=published), scores=scores, repeat_last=None, n=401)
    write_report(folder)
    text = (folder / "scores.md").read_text()
    assert "| FVD ↓ | FVD-infinity ↓ |" in text
    assert "| 812.3 ± 10.3 | 700.0 |" in text
    assert "| FAR-B (published) | 0.037 | - | - | 194.1 | - |" in text
    assert r"| A\|B (published) | - | 22 | - | - | - |" in text
    assert "repeat the last" not in text and "singular" not in text


def test_clip_scores_follow_the_protocol() -> None:
    values: dict[tuple[System, Metric], Values] = {
        ("prediction", "psnr"): np.array([[10.0, 20.0], [np.inf, 30.0]]).clip(max=PSNR_CAP)
    }
    pooled = PerClip(["a", "b"], 2, values, "clips").clip_scores("prediction", "psnr")
    assert pooled == pytest.approx([-10 * np.log10(0.055), 30 + 10 * np.log10(2)])
    of_frames = PerClip(["a", "b"], 2, values, "frames").clip_scores("prediction", "psnr")
    assert of_frames == pytest.approx([15.0, (PSNR_CAP + 30) / 2])


def test_curves_are_means_over_clips_with_the_bootstrap_band() -> None:
    lpips = np.array([[0.1, 0.2], [0.3, 0.8], [0.2, 0.5]])
    psnr = np.array([[10.0, 20.0], [20.0, 20.0], [10.0, 20.0]])
    clips = PerClip(["a", "b", "c"], 2, {("prediction", "lpips"): lpips, ("prediction", "psnr"): psnr}, "set")
    drawn = mean_curve(clips, "prediction", "lpips")
    assert drawn.mean == pytest.approx([0.2, 0.5])
    assert drawn.low is not None and drawn.high is not None
    assert (drawn.low[1], drawn.high[1]) == pytest.approx(bootstrap_interval(lpips[:, 1]))
    drawn = mean_curve(clips, "prediction", "psnr")
    assert drawn.mean == pytest.approx([-10 * np.log10(0.07), 20.0])
    assert drawn.low is not None and drawn.high is not None
    assert (drawn.low <= drawn.mean + 1e-9).all() and (drawn.mean <= drawn.high + 1e-9).all()
    assert (drawn.low[0], drawn.high[0]) == pytest.approx((10.0, 20.0))  # all of three draws from one clip
    one = PerClip(["a"], 2, {("prediction", "lpips"): lpips[:1]}, "set")
    assert mean_curve(one, "prediction", "lpips").low is None


def test_every_clip_has_a_line(reported: Path) -> None:
    with open(reported / "clips.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    clips = read_per_clip(reported, protocol())
    assert [row["key"] for row in rows] == clips.keys
    assert [float(row["prediction_lpips"]) for row in rows] == pytest.approx([0.4, 0.2, 0.5, 0.1, 0.3])
    for system in SYSTEMS:
        for metric in PAIRED:
            column = [float(row[f"{system}_{metric}"]) for row in rows]
            assert column == pytest.approx(clips.clip_scores(system, metric).tolist(), rel=1e-5)


def test_the_contact_sheet_has_the_best_and_the_worst_clips(reported: Path) -> None:
    sheet, cell = picture(reported / "best_worst.png"), 128 + 2 * BORDER
    episode = LINE_HEIGHT + 2 * cell + 4 * BORDER
    assert sheet.shape[0] == pytest.approx(SHEET_CAPTION_HEIGHT + 5 * episode, abs=4 * BORDER)
    for place, clip in enumerate((3, 1, 4, 2, 0)):  # three best ones, and the others from the worst on
        top = SHEET_CAPTION_HEIGHT + place * episode
        assert (sheet[top : top + LINE_HEIGHT].min(axis=2) < 128).any()  # the caption
        for row, colour in enumerate((50 * clip + 10, 50 * clip)):
            above = top + LINE_HEIGHT + row * cell
            middle = CAPTION_WIDTH + 15 * cell + cell // 2
            assert sheet[above + cell // 2, middle].tolist() == [colour] * 3, (place, row)
            borders = (sheet[above + 1, CAPTION_WIDTH:] == GIVEN_COLOUR).all(axis=-1).sum()
            assert borders == GIVEN * cell, (place, row)


def test_the_video_shows_the_first_clips(reported: Path) -> None:
    video = read_video(reported / "samples.mp4")
    cell = 192 + 2 * BORDER
    assert len(video.frames) == GIVEN + PREDICTED and video.fps == 8
    for clip in range(CLIPS):
        middle = CAPTION_WIDTH + clip * (cell + 4 * BORDER) + cell // 2
        for row, colour in enumerate((50 * clip + 10, 50 * clip)):
            shown = video.frames[-1, LINE_HEIGHT + row * cell + cell // 2, middle].astype(int)
            assert abs(shown - colour).max() <= 6, (clip, row)  # H.264


def test_the_pictures_follow_the_data(reported: Path, tmp_path: Path) -> None:
    write_report(evaluated(tmp_path / "a", offset=0.2))
    assert picture(reported / "by_frame.png").shape == (HEIGHT, WIDTH, 3)
    for name in ("by_frame.png", "best_worst.png"):  # the captions of the second one have the scores
        before, after = picture(reported / name), picture(tmp_path / "a" / name)
        assert before.shape == after.shape and (before != after).any(), name


def test_without_given_frames_the_first_clips_are_drawn(tmp_path: Path) -> None:
    fvd = {"fvd": {"mean": 300.0, "std": 4.0}}
    folder = evaluated(tmp_path / "a", without_given_frames(), scores=fvd, repeat_last=None, reconstruction=None)
    (folder / "by_frame.png").write_bytes(b"of an earlier evaluation")
    write_report(folder)
    assert "| model | 300.0 ± 4.0 |" in (folder / "scores.md").read_text()
    assert not (folder / "by_frame.png").exists()
    assert (folder / "clips.csv").read_text().splitlines() == ["key", *(f"clip-{i}" for i in range(CLIPS))]
    sheet, cell = picture(folder / "best_worst.png"), 128 + 2 * BORDER
    episode = LINE_HEIGHT + 2 * cell + 4 * BORDER
    for clip in range(CLIPS):
        top = SHEET_CAPTION_HEIGHT + clip * episode + LINE_HEIGHT
        assert sheet[top + cell // 2, CAPTION_WIDTH + cell // 2].tolist() == [50 * clip + 10] * 3
    assert not (sheet == GIVEN_COLOUR).all(axis=-1).any()


def test_scores_of_one_hash_share_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worse = {**SCORES, "lpips": {"mean": 0.6, "ci95": [0.5, 0.7]}}
    again = {**DECODED, "fvd": {"mean": 60.0 + 1e-9}}  # as another machine has it
    weights = {"source": "runs/b", "kind": "model", "step": None, "sha256": "cd" * 32}
    changes: dict[str, Any] = {"scores": worse, "reconstruction": again, "weights": weights}
    folders = [evaluated(tmp_path / "a"), evaluated(tmp_path / "b", **changes)]
    monkeypatch.chdir(tmp_path)
    text = compare([folders[0], Path("b")], tmp_path / "out")
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    title = f"vizdoom-8to8, hash {protocol().hash()[:12]}, 5 clips"
    assert markdown.count("## ") == 1 and f"## {title}\n" in markdown and text.startswith(title)
    assert "| a | 0.420 [0.400, 0.444] |" in markdown and "| b | 0.600 [0.500, 0.700] |" in markdown
    for both in (markdown, text):
        assert both.count("repeat the last given frame") == both.count("(the ceiling)") == 1
        assert SEPARATE_TABLES not in both
    assert picture(tmp_path / "out" / "comparison.png").shape == (HEIGHT, WIDTH, 3)


def test_scores_of_two_hashes_never_share_a_table(tmp_path: Path) -> None:
    folders = [evaluated(tmp_path / "a"), evaluated(tmp_path / "b"), tmp_path / "c"]
    other = protocol(psnr=None, metrics=("lpips", "ssim", "fvd"))
    evaluated(folders[2], other)
    text = compare(folders, tmp_path / "out")
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert SEPARATE_TABLES in text and SEPARATE_TABLES in markdown
    first, second = markdown.split("## ")[1:]
    assert protocol().hash()[:12] in first and other.hash()[:12] in second
    assert "| a |" in first and "| b |" in first and "| c |" not in first
    assert "| c |" in second and "| a |" not in second
    assert picture(tmp_path / "out" / "comparison.png").shape == (2 * HEIGHT, WIDTH, 3)


def test_folders_of_one_name_are_named_by_their_weights(tmp_path: Path) -> None:
    weights = {"kind": "ema", "step": None, "sha256": "cd" * 32}
    folders = []
    for run in ("x", "y"):
        (tmp_path / run).mkdir()
        folders.append(evaluated(tmp_path / run / "evaluation", weights={**weights, "source": f"runs/{run}"}))
    write_scores(folders[1], protocol(), weights={**weights, "source": "runs/y"}, reconstruction=SCORES)
    text = compare(folders, tmp_path / "out")
    assert "\nruns/x " in text and "\nruns/y " in text
    assert "(the ceiling): runs/x " in text and "(the ceiling): runs/y " in text  # of two autoencoders


def test_folders_without_scores_are_refused(tmp_path: Path) -> None:
    good, out = evaluated(tmp_path / "good"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/scores.json: there are no scores here; give a folder that"):
        compare([good, tmp_path / "empty"], out)
    foreign = tmp_path / "foreign"
    values = write_scores(foreign, protocol())
    del values["protocol_hash"]
    (foreign / "scores.json").write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"foreign/scores.json: not the scores .*\(protocol_hash: .*; run tools/evaluate"
    ):
        compare([good, foreign], out)
    (foreign / "scores.json").write_text("[")
    with pytest.raises(UserError, match=r"foreign/scores.json: .* not readable JSON"):
        compare([good, foreign], out)
    write_scores(foreign, protocol())
    with pytest.raises(UserError, match=r"foreign/per_clip.npz: there are no scores of clips here; run tools/evaluate"):
        compare([good, foreign], out)
    arrays: dict[str, Any] = {"keys": np.array(["a"]), "given": np.array(8), "prediction/ssim": np.zeros((2, 8))}
    np.savez(foreign / "per_clip.npz", **arrays)
    with pytest.raises(
        UserError, match=r"foreign/per_clip.npz: not the scores .*prediction/ssim is \[2, 8\] for 1 keys"
    ):
        compare([good, foreign], out)
    assert not out.exists()
    (good / "samples" / "clip-3.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"samples/clip-3.npz: not a sample of an evaluation"):
        write_report(good)
    (good / "samples" / "clip-3.npz").unlink()
    with pytest.raises(UserError, match=r"samples/clip-3.npz: this sample is missing"):
        write_report(good)
