"""Tables of scores, for Markdown and for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from far_scale.evaluation.protocol import METRICS, Metric, Published
from far_scale.evaluation.results import Score, Scores

FEATURES = 400  # logits of FVD's network; N clips give a covariance of rank at most N - 1
REPEAT_LAST = "repeat the last given frame"
RECONSTRUCTION = "autoencoder's reconstruction (the ceiling)"
LABELS: dict[Metric, str] = {"lpips": "LPIPS", "ssim": "SSIM", "psnr": "PSNR", "fvd": "FVD"}
LEGEND = "[]: 95% interval over clips. ±: standard deviation over seeds."

_DIGITS: dict[Metric, int] = {"lpips": 3, "ssim": 3, "psnr": 2, "fvd": 1}
_HEADS: dict[Metric, str] = {"lpips": "LPIPS ↓", "ssim": "SSIM ↑", "psnr": "PSNR (dB) ↑", "fvd": "FVD ↓"}


@dataclass(frozen=True)
class Row:
    """The scores of one system; `published` if they come from a publication."""

    name: str
    scores: Mapping[Metric, Score]
    published: bool = False


@dataclass(frozen=True)
class Table:
    """Lines with the same number of cells; the first line is the header, a line's first cell its name."""

    lines: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [[cell.replace("|", "\\|") for cell in line] for line in self.lines]
        lines.insert(1, ["---"] * len(lines[0]))
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def plain(self) -> str:
        """The table as aligned columns of text."""
        widths = [max(map(len, column)) for column in zip(*self.lines, strict=True)]
        rows = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in self.lines)
        return "".join(f"{row}\n" for row in rows)


def scores_table(rows: Sequence[Row], order: Sequence[Metric]) -> Table:
    """A table with a column for each metric that a row has: LPIPS first, the others in `order`.

    FVD-infinity gets a column if a row has it.
    """
    metrics = [metric for metric in _lpips_first(order) if any(metric in row.scores for row in rows)]
    extrapolated = any(score.infinity is not None for row in rows for score in row.scores.values())
    lines = [["", *(_HEADS[metric] for metric in metrics), *(["FVD-infinity ↓"] if extrapolated else [])]]
    for row in rows:
        cells = [cell_text(row, metric) for metric in metrics]
        if extrapolated:
            infinity = row.scores["fvd"].infinity if "fvd" in row.scores else None
            cells.append("-" if infinity is None else format_score("fvd", infinity))
        lines.append([f"{row.name} (published)" if row.published else row.name, *cells])
    return Table(lines)


def cell_text(row: Row, metric: Metric) -> str:
    """A row's score as printed; `-` for none."""
    score = row.scores.get(metric)
    if score is None:
        return "-"
    if row.published:
        return f"{score.mean:g}"  # with the published digits
    text = format_score(metric, score.mean)
    if score.ci95 is not None:
        text += f" [{', '.join(format_score(metric, end) for end in score.ci95)}]"
    return text if score.std is None else f"{text} ± {format_score(metric, score.std)}"


def format_score(metric: Metric, value: float | None) -> str:
    """A score with the usual number of digits in papers; None if it is not finite."""
    return "not finite" if value is None else f"{value:.{_DIGITS[metric]}f}"


def score_rows(scores: Scores) -> list[Row]:
    """The rows of one evaluation: the model, the baselines, and scores published for the protocol."""
    rows = [Row("model", scores.scores)]
    if scores.repeat_last is not None:
        rows.append(Row(REPEAT_LAST, scores.repeat_last))
    if scores.reconstruction is not None:
        rows.append(Row(RECONSTRUCTION, scores.reconstruction))
    return rows + [published_row(published) for published in scores.settings.published]


def published_row(published: Published) -> Row:
    """Published scores as a row."""
    values = {metric: getattr(published, metric) for metric in METRICS}
    scores = {metric: Score(mean=value) for metric, value in values.items() if value is not None}
    return Row(published.model, scores, published=True)


def comparison_notes(group: Sequence[Scores]) -> list[str]:
    """Warnings about comparing scores, given for evaluations of one protocol hash and number of clips."""
    lines = ["Compare these scores only with others of the same protocol hash."]
    if any("fvd" in scores.scores for scores in group):
        clips = group[0].n
        lines.append("FVD of another number of clips or another protocol hash must not be compared with this one.")
        if clips <= FEATURES:
            lines.append(
                f"{clips} clips: below {FEATURES + 1} the covariance of FVD's {FEATURES} logits is singular, and "
                "FVD is strongly biased."
            )
    return lines


def _lpips_first(order: Sequence[Metric]) -> list[Metric]:
    return sorted(order, key=lambda metric: metric != "lpips")  # stable
