"""The scores of a run's checkpoints and exported models on the page, each with its protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from far_scale.evaluation.aggregate import SCORES_FILE
from far_scale.evaluation.protocol import METRICS, Metric
from far_scale.evaluation.report import describe_settings
from far_scale.evaluation.results import Score, Scores, read_scores
from far_scale.evaluation.run_page.charts import Series, line_chart
from far_scale.evaluation.run_page.markup import Markup, join, table, tag
from far_scale.evaluation.scores_by_step import (
    SCORES_BY_STEP,
    ScoresByStep,
    is_evaluated,
    read_scores_by_step,
    step_folders,
)
from far_scale.evaluation.tables import (
    LABELS,
    LEGEND,
    RECONSTRUCTION,
    REPEAT_LAST,
    Row,
    comparison_notes,
    score_rows,
    scores_table,
)
from far_scale.utils.errors import UserError

_MAX_ROWS = 40  # of a table by step; the curves have all


def score_section(roots: Sequence[Path]) -> Markup:
    """The scores in ROOT/evaluation and in its folders, of each root; empty if there are none."""
    return join(*(part for folder in _folders(roots) for part in _scores(folder)))


def _folders(roots: Sequence[Path]) -> Iterator[Path]:
    for root in dict.fromkeys(root.resolve() for root in roots):
        evaluation = root / "evaluation"
        for folder in (evaluation, *sorted(evaluation.glob("*"))):
            if any((folder / name).is_file() for name in (SCORES_FILE, SCORES_BY_STEP)):
                yield folder


def _scores(folder: Path) -> Iterator[Markup]:
    try:
        if (folder / SCORES_BY_STEP).is_file():
            finished = [path for path in step_folders(folder).values() if is_evaluated(path)]
            newest = read_scores(finished[-1]) if finished else None
            yield _by_step(read_scores_by_step(folder), newest)
        if (folder / SCORES_FILE).is_file():
            scores = read_scores(folder)
            yield tag("h3", f"{scores.protocol}: {_weights(scores)}")
            lines = scores_table(score_rows(scores), scores.settings.metrics).lines
            yield table(lines[0], lines[1:])
            yield _protocol(scores)
    except UserError as error:
        yield tag("p", str(error), class_="note")


def _weights(scores: Scores) -> str:
    step = "" if scores.weights.step is None else f" of step {scores.weights.step:,}"
    return f"{scores.weights.kind}{step}"


def _by_step(scores: ScoresByStep, newest: Scores | None) -> Markup:
    metrics = [metric for metric in METRICS if any(metric in step.scores for step in scores.steps)]
    charts = [_chart(scores, metric) for metric in metrics] if len(scores.steps) > 1 else []
    rows = [Row(f"step {step.step:,}", step.scores) for step in reversed(scores.steps[-_MAX_ROWS:])]
    for name, baseline in ((REPEAT_LAST, scores.repeat_last), (RECONSTRUCTION, scores.reconstruction)):
        rows += [] if baseline is None else [Row(name, baseline)]
    lines = scores_table(rows, metrics).lines
    known = [tag("p", f"N: {scores.n} clips; protocol hash {scores.protocol_hash[:12]}", class_="note")]
    return join(
        tag("h3", f"{scores.protocol}: by training step"),
        tag("div", *charts, class_="charts"),
        table(lines[0], lines[1:]),
        *(known if newest is None else [_protocol(newest)]),
    )


def _chart(scores: ScoresByStep, metric: Metric) -> Markup:
    steps = np.array([float(step.step) for step in scores.steps])
    series = [Series("model", steps, np.array([_mean(step.scores.get(metric)) for step in scores.steps]), 1, "dots")]
    for name, baseline, colour in (
        ("repeat last", scores.repeat_last, 2),
        ("reconstruction", scores.reconstruction, 3),
    ):
        mean = _mean((baseline or {}).get(metric))
        series.append(Series(name, steps[[0, -1]], np.array([mean, mean]), colour, "dashed"))
    better = "lower" if metric in ("lpips", "fvd") else "higher"
    unit = " in dB" if metric == "psnr" else ""
    return line_chart(f"{LABELS[metric]}{unit} ({better} is better)", series)


def _mean(score: Score | None) -> float:
    return float("nan") if score is None or score.mean is None else score.mean


def _protocol(scores: Scores) -> Markup:
    """What fixes the scores, as text below a table."""
    settings = [
        f"N: {scores.n} clips",
        f"protocol: {scores.protocol}, hash {scores.protocol_hash[:12]}",
        f"weights: {scores.weights.source}, {_weights(scores)}, SHA-256 {scores.weights.sha256[:12]}",
        *describe_settings(scores),
    ]
    notes = [LEGEND, *comparison_notes([scores])]
    return join(tag("p", "; ".join(settings), class_="note"), tag("p", " ".join(notes), class_="note"))
