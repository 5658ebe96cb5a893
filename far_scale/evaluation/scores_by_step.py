"""Scores of a run's checkpoints over the training step: one file and one plot.

    OUT/step-00001000/             the evaluation of one checkpoint
    OUT/scores_by_step.json        the scores of all of them
    OUT/scores_by_step.png

File and plot are made only from the step folders, so a kill loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ValidationError

from far_scale.evaluation.aggregate import SCORES_FILE
from far_scale.evaluation.curves import COLOURS, RECONSTRUCTION_STYLE, REPEAT_STYLE
from far_scale.evaluation.protocol import METRICS, Metric, Protocol
from far_scale.evaluation.report import REPORT_FILES
from far_scale.evaluation.results import Score, Scores, System, read_scores
from far_scale.evaluation.tables import LABELS, RECONSTRUCTION, REPEAT_LAST
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, read_json, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = "far_scale.scores_by_step/1"
SCORES_BY_STEP = "scores_by_step.json"
PLOT = "scores_by_step.png"
_STEP = re.compile(r"step-(\d{8})")
_LOWER_IS_BETTER = ("lpips", "fvd")
_PANEL = (4.6, 3.6)  # width and height in inches


def step_folders(out: Path) -> dict[int, Path]:
    """The folders of begun or finished evaluations of checkpoints, by step in ascending order."""
    matches = [(_STEP.fullmatch(path.name), path) for path in out.glob("step-*") if path.is_dir()]
    return dict(sorted((int(match.group(1)), path) for match, path in matches if match))


def is_evaluated(folder: Path) -> bool:
    """Whether the evaluation of one checkpoint is finished: its last file exists."""
    return (folder / SCORES_FILE).is_file() and (folder / REPORT_FILES[-1]).is_file()


def check_same_protocol(out: Path, protocol: Protocol, clips_known: bool) -> None:
    """Check that a folder holds no scores by another protocol.

    Args:
        clips_known: whether `protocol` has the fields that `open_clips` sets; otherwise they are not compared.

    Raises:
        UserError: it does; the error names the first file.
    """

    def hash_of(scored: Protocol) -> str:
        return (scored if clips_known else scored.with_clips(fingerprint=None, pixels="recorded")).hash()

    for folder in step_folders(out).values():
        if is_evaluated(folder) and hash_of(read_scores(folder).settings) != hash_of(protocol):
            raise UserError(
                f"{folder / SCORES_FILE}: is of another protocol or of other clips than {protocol.name} is now; "
                "such scores cannot share a curve: give another --out"
            )


def write_scores_by_step(out: Path) -> dict[int, Scores]:
    """Write scores_by_step.json and scores_by_step.png of all finished evaluations in `out`, each atomically.

    Returns:
        The scores by step, in ascending order; if there are none, nothing is written.

    Raises:
        UserError: they are not all by one protocol.
    """
    by_step = {step: read_scores(folder) for step, folder in step_folders(out).items() if is_evaluated(folder)}
    if not by_step:
        return {}
    last = list(by_step.values())[-1]
    for step, scores in by_step.items():
        if scores.protocol_hash != last.protocol_hash:
            raise UserError(
                f"{out}: steps {step} and {max(by_step)} are of two protocols, {scores.protocol_hash[:12]} and "
                f"{last.protocol_hash[:12]}; move one of them to another folder"
            )
    write_json(
        out / SCORES_BY_STEP,
        {
            "format": FORMAT,
            "protocol": last.protocol,
            "protocol_hash": last.protocol_hash,
            "n": last.n,
            "steps": [{"step": step, "scores": _dump_scores(scores.scores)} for step, scores in by_step.items()],
            "repeat_last": _dump_scores(last.repeat_last),
            "reconstruction": _dump_scores(last.reconstruction),
        },
    )
    _draw_plot(out / PLOT, by_step, last)
    return by_step


class StepScores(BaseModel):
    """The scores of one checkpoint."""

    step: int
    scores: dict[Metric, Score]


class ScoresByStep(BaseModel):
    """The content of scores_by_step.json."""

    protocol: str
    protocol_hash: str
    n: int
    steps: list[StepScores]
    repeat_last: dict[Metric, Score] | None
    reconstruction: dict[Metric, Score] | None


def read_scores_by_step(out: Path) -> ScoresByStep:
    """Read OUT/scores_by_step.json.

    Raises:
        UserError: it is missing, or not written by `write_scores_by_step`.
    """
    path = out / SCORES_BY_STEP
    try:
        return ScoresByStep.model_validate(read_json(path, "file of scores"))
    except ValidationError:
        raise UserError(f"{path}: not the scores of a run; run tools/evaluate.py --follow again") from None


def _dump_scores(scores: dict[Metric, Score] | None) -> dict[str, Any] | None:
    return None if scores is None else {key: score.model_dump(exclude_unset=True) for key, score in scores.items()}


def _draw_plot(path: Path, by_step: dict[int, Scores], last: Scores) -> None:
    from matplotlib.figure import Figure  # imported here: slow, and only needed for pictures

    metrics = [metric for metric in METRICS if any(metric in scores.scores for scores in by_step.values())]
    figure = Figure(figsize=(_PANEL[0] * len(metrics), _PANEL[1] + 0.6), layout="constrained")
    figure.suptitle(
        f"{last.protocol}, {last.n} clips, band: 95% interval over clips (FVD: std over seeds)", fontsize=11
    )
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_panel(axes, metric, by_step, last)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_panel(axes: Axes, metric: Metric, by_step: dict[int, Scores], last: Scores) -> None:
    steps = [step for step, scores in by_step.items() if metric in scores.scores]
    mean, low, high = _band([by_step[step].scores[metric] for step in steps])
    axes.plot(steps, mean, color=COLOURS[0], marker="o", markersize=4, label="model")
    axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.18, linewidth=0)
    flat: list[tuple[str, System, tuple[str, str]]] = [
        (REPEAT_LAST, "repeat_last", REPEAT_STYLE),
        (RECONSTRUCTION, "reconstruction", RECONSTRUCTION_STYLE),
    ]
    for name, system, (colour, dashes) in flat:
        score = (last.for_system(system) or {}).get(metric)
        if score is not None and score.mean is not None:
            axes.axhline(score.mean, color=colour, linestyle=dashes, label=name)
    better = "lower" if metric in _LOWER_IS_BETTER else "higher"
    axes.set_title(f"{LABELS[metric]}{' in dB' if metric == 'psnr' else ''} ({better} is better)", fontsize=12)
    axes.set_xlabel("training step", fontsize=11)
    axes.tick_params(labelsize=11)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.grid(alpha=0.3)


def _band(scores: Sequence[Score]) -> tuple[Any, Any, Any]:
    """Means with lower and upper ends of their bands; a score that is not finite leaves a gap."""
    rows = []
    for score in scores:
        mean = np.nan if score.mean is None else score.mean
        spread = score.std or 0.0
        rows.append((mean, *(score.ci95 or (mean - spread, mean + spread))))
    return tuple(np.array(rows, dtype=np.float64).T)
