"""What people look at after an evaluation: a table, each clip's scores, curves over frames, pictures and a video.

It is made only from the evaluation's result files (see results.py).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from far_scale.data.video.videos import write_mp4
from far_scale.evaluation.curves import COLOURS, RECONSTRUCTION_STYLE, REPEAT_STYLE, Line, draw_curves
from far_scale.evaluation.protocol import Protocol
from far_scale.evaluation.results import PAIRED, PerClip, Scores, parse_scores, read_frames, read_per_clip, read_scores
from far_scale.evaluation.rollouts.video_grid import ContactSheet, GridSpec, Pixels, VideoGrid
from far_scale.evaluation.tables import (
    LABELS,
    LEGEND,
    RECONSTRUCTION,
    REPEAT_LAST,
    Table,
    comparison_notes,
    format_score,
    score_rows,
    scores_table,
)
from far_scale.utils.io import atomic_write

VIDEO_CLIPS = 8
RANKED_CLIPS = 3  # of the best, and of the worst
FPS = 8.0  # as the official evaluation's videos

_PSNR_OF = {
    "frames": "mean over the frames' PSNR",
    "clips": "mean over the clips' PSNR",
    "set": "of the mean squared error over all clips",
}


REPORT_FILES = (
    "scores.md",
    "clips.csv",
    "best_worst.png",
    "samples.mp4",
)  # and by_frame.png, with metrics of single frames


def write_report(out: Path) -> None:
    """Write scores.md, clips.csv, by_frame.png, best_worst.png and samples.mp4 into `out`, each atomically.

    `out` holds scores.json, per_clip.npz and samples/KEY.npz with `frames` and `truth`, uint8 `[F, H, W, 3]`.

    Raises:
        UserError: one of these is missing, or not written by an evaluation.
    """
    scores = read_scores(out)
    clips = read_per_clip(out, scores.settings)
    _write_text(out / "scores.md", _format_markdown(scores))
    _write_clips(out / "clips.csv", clips)
    draw_curves(
        out / "by_frame.png", [(f"{scores.protocol}, {scores.n} clips, band: 95% interval", _curve_lines(clips))]
    )
    _write_contact_sheet(out, _best_and_worst(clips), scores.settings)
    _write_video(out, clips.keys[:VIDEO_CLIPS], scores.settings)


def format_table(scores: Mapping[str, Any]) -> str:
    """The content of a scores.json as aligned text for the console.

    Raises:
        UserError: it is not that of an evaluation.
    """
    return _table(parse_scores(scores, "scores.json")).plain()


class _CaptionedClip(NamedTuple):
    """A clip of the contact sheet."""

    key: str
    caption: str


def _table(scores: Scores) -> Table:
    return scores_table(score_rows(scores), scores.settings.metrics)


def _format_markdown(scores: Scores) -> str:
    weights = scores.weights
    step = "" if weights.step is None else f" of step {weights.step}"
    lines = [
        f"# {scores.protocol}: {weights.source}\n",
        _table(scores).markdown(),
        f"{LEGEND}\n",
        f"- N: {scores.n} clips",
        f"- protocol: {scores.protocol}, hash {scores.protocol_hash[:12]}",
        f"- weights: {weights.kind}{step}, SHA-256 {weights.sha256[:12]}",
        *(f"- {line}" for line in describe_settings(scores)),
        "",
        *(f"{line}\n" for line in comparison_notes([scores])),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def describe_settings(scores: Scores) -> Iterator[str]:
    """The main settings, a line each."""
    protocol, sampling = scores.settings, scores.settings.sampling
    yield f"frames: {sampling.given} given -> {sampling.predicted} predicted, {protocol.clips.size} px"
    yield f"sampling: {sampling.steps} steps per frame, guidance {scores.guidance:g}"
    yield f"seeds: {', '.join(map(str, sampling.seeds))}"
    if sampling.trajectories > 1:
        yield f"{sampling.trajectories} samples of each clip: the best one counts (of FVD: the mean)"
    if protocol.fvd is not None and "fvd" in scores.scores:
        yield f"FVD sees {protocol.fvd_frames} frames of a clip ({protocol.fvd.frames})"
    if protocol.psnr is not None and "psnr" in scores.scores:
        yield f"PSNR: {_PSNR_OF[protocol.psnr.mean_of]}"


def _write_clips(path: Path, clips: PerClip) -> None:
    columns = {f"{system}_{metric}": clips.clip_scores(system, metric) for system, metric in clips.values}
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["key", *columns])
        for number, key in enumerate(clips.keys):
            writer.writerow([key, *(f"{values[number]:.6g}" for values in columns.values())])


def _curve_lines(clips: PerClip) -> list[Line]:
    return [
        Line("model", clips, "prediction", COLOURS[0]),
        Line(REPEAT_LAST, clips, "repeat_last", *REPEAT_STYLE),
        Line(RECONSTRUCTION, clips, "reconstruction", *RECONSTRUCTION_STYLE),
    ]


def _best_and_worst(clips: PerClip) -> list[_CaptionedClip]:
    """The best and the worst clips; the first clips if no metric compares a clip with its truth."""
    leading = next((metric for metric in PAIRED if ("prediction", metric) in clips.values), None)
    if leading is None:
        return [
            _CaptionedClip(key, f"first clips, not chosen by score: {key}") for key in clips.keys[: 2 * RANKED_CLIPS]
        ]
    scores = clips.clip_scores("prediction", leading)
    ranked = np.argsort(scores if leading == "lpips" else -scores, kind="stable").tolist()
    best = ranked[: min(RANKED_CLIPS, (len(ranked) + 1) // 2)]
    worst = ranked[len(best) :][::-1][:RANKED_CLIPS]
    labelled = [("best", clip) for clip in best] + [("worst", clip) for clip in worst]
    return [
        _CaptionedClip(
            clips.keys[clip], f"{word} {LABELS[leading]} {format_score(leading, scores[clip])}: {clips.keys[clip]}"
        )
        for word, clip in labelled
    ]


def _write_contact_sheet(out: Path, chosen: list[_CaptionedClip], protocol: Protocol) -> None:
    sheet: ContactSheet | None = None
    for number, (key, _) in enumerate(chosen):
        for index, (truth, prediction) in enumerate(_frame_pairs(out, key)):
            if sheet is None:
                sheet = ContactSheet(_grid_spec(protocol, len(chosen), truth), [clip.caption for clip in chosen])
            sheet.add(index, truth[None], prediction[None], first=number)
    if sheet is not None:
        sheet.write(out / "best_worst.png")


def _write_video(out: Path, keys: list[str], protocol: Protocol) -> None:
    def pictures() -> Iterator[Pixels]:
        grid: VideoGrid | None = None
        for index, pairs in enumerate(zip(*(_frame_pairs(out, key) for key in keys), strict=True)):
            truth, prediction = (np.stack(frames) for frames in zip(*pairs, strict=True))
            grid = grid or VideoGrid(_grid_spec(protocol, len(keys), truth[0]))
            yield grid.picture(index, truth, prediction)

    write_mp4(out / "samples.mp4", pictures(), FPS)


def _frame_pairs(out: Path, key: str) -> Iterator[tuple[Pixels, Pixels]]:
    """The true and the predicted frames of a clip, one pair at a time."""
    sample = out / "samples" / f"{key}.npz"
    return zip(read_frames(sample, "truth"), read_frames(sample, "frames"), strict=True)


def _grid_spec(protocol: Protocol, clips: int, frame: Pixels) -> GridSpec:
    frames = protocol.total_frames
    # a window of all frames, so that no frame is marked as past the window
    return GridSpec(clips, frames, protocol.sampling.given, frames, (frame.shape[0], frame.shape[1]), truth=True)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
