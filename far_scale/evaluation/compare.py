"""Compares evaluations: those of one protocol hash share a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from far_scale.evaluation.curves import COLOURS, REPEAT_STYLE, Line, draw_curves
from far_scale.evaluation.protocol import METRICS
from far_scale.evaluation.results import PerClip, Scores, System, read_per_clip, read_scores
from far_scale.evaluation.tables import (
    LEGEND,
    RECONSTRUCTION,
    REPEAT_LAST,
    Row,
    Table,
    cell_text,
    comparison_notes,
    published_row,
    scores_table,
)
from far_scale.utils.io import atomic_write

SEPARATE_TABLES = "Scores of different protocol hashes cannot be compared, so each hash has a table of its own."


def compare(folders: Sequence[Path], out: Path) -> str:
    """Write OUT/comparison.md and, if a protocol scores single frames, OUT/comparison.png of several evaluations.

    A model is named by its folder, or by the source of its weights if two folders have the same name.

    Args:
        folders: of evaluations, each with scores.json and per_clip.npz.
        out: where the files go.

    Returns:
        The tables as text for the console.

    Raises:
        UserError: a folder has no scores, or they were not written by an evaluation; nothing is written then.
    """
    scores = [read_scores(folder) for folder in folders]
    clips = [read_per_clip(folder, result.settings) for folder, result in zip(folders, scores, strict=True)]
    models = [_EvaluatedModel(*model) for model in zip(_names(folders, scores), scores, clips, strict=True)]
    groups: dict[tuple[str, int], list[_EvaluatedModel]] = {}
    for model in models:
        groups.setdefault((model.scores.protocol_hash, model.scores.n), []).append(model)
    draw_curves(out / "comparison.png", [(_title(group), _lines(group)) for group in groups.values()])
    heading = [SEPARATE_TABLES] if len(groups) > 1 else []
    markdown = ["# Comparison", *heading]
    console = heading.copy()
    for group in groups.values():
        table = _table(group)
        remarks = [LEGEND, *comparison_notes([model.scores for model in group])]
        markdown += [f"## {_title(group)}", table.markdown().rstrip("\n"), *remarks]
        console.append("\n".join([_title(group), table.plain().rstrip("\n"), *remarks]))
    with atomic_write(out / "comparison.md") as temporary:
        temporary.write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    return "\n\n".join(console) + "\n"


@dataclass(frozen=True)
class _EvaluatedModel:
    name: str
    scores: Scores
    clips: PerClip


def _names(folders: Sequence[Path], scores: Sequence[Scores]) -> list[str]:
    """The shortest unique name of each model."""
    candidates = [
        [folder.resolve().name, result.weights.source, str(folder)]
        for folder, result in zip(folders, scores, strict=True)
    ]
    counts = Counter(name for names in candidates for name in set(names))  # folder "a" has the same name and path
    return [next((name for name in names if counts[name] == 1), names[-1]) for names in candidates]


def _title(group: Sequence[_EvaluatedModel]) -> str:
    scores = group[0].scores
    return f"{scores.protocol}, hash {scores.protocol_hash[:12]}, {scores.n} clips"


def _table(group: Sequence[_EvaluatedModel]) -> Table:
    rows = [Row(model.name, model.scores.scores) for model in group]
    rows += _shared_row(group, "repeat_last", REPEAT_LAST) + _shared_row(group, "reconstruction", RECONSTRUCTION)
    published = dict.fromkeys(row for model in group for row in model.scores.settings.published)
    order = dict.fromkeys(metric for model in group for metric in model.scores.settings.metrics)
    return scores_table([*rows, *map(published_row, published)], list(order))


def _shared_row(group: Sequence[_EvaluatedModel], system: System, name: str) -> list[Row]:
    """One row for scores that print the same for all models; else a row each, as with different autoencoders."""
    rows: dict[tuple[str, ...], Row] = {}
    for model in group:
        if (scores := model.scores.for_system(system)) is not None:
            row = Row(f"{name}: {model.name}", scores)
            rows.setdefault(tuple(cell_text(row, metric) for metric in METRICS), row)
    return [replace(row, name=name) for row in rows.values()] if len(rows) == 1 else list(rows.values())


def _lines(group: Sequence[_EvaluatedModel]) -> list[Line]:
    lines = [
        Line(model.name, model.clips, "prediction", COLOURS[number % len(COLOURS)])
        for number, model in enumerate(group)
    ]
    repeated = next((model.clips for model in group if model.scores.repeat_last is not None), None)
    return lines if repeated is None else [*lines, Line(REPEAT_LAST, repeated, "repeat_last", *REPEAT_STYLE)]
