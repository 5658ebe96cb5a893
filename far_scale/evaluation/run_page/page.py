"""Writes report.html of a run: state, curves, events, samples, scores, recipe and versions, in one file."""

from __future__ import annotations

import base64
import datetime
import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.evaluation.run_page.charts import (
    Mark,
    Series,
    format_number,
    line_chart,
    raw_and_smoothed,
)
from far_scale.evaluation.run_page.event_section import event_section, format_duration
from far_scale.evaluation.run_page.history import (
    Event,
    Session,
    State,
    TrainingLog,
    events_of,
    inside,
    read_log,
    sessions_of,
    state_of,
)
from far_scale.evaluation.run_page.markup import Markup, join, table, tag
from far_scale.evaluation.run_page.recipe_changes import recipe_levels
from far_scale.evaluation.run_page.samples import Samples, samples_section, validation_samples
from far_scale.evaluation.run_page.score_section import score_section
from far_scale.evaluation.run_page.style import SCRIPT, STYLE
from far_scale.train import environment
from far_scale.train.run_dir import existing_steps
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, check_writable, read_json

PAGE = "report.html"
_RUN_FILES = ("recipe.yaml", "log.jsonl", "events.jsonl")
_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "triton", "flash-attn", "xformers")


@dataclass(frozen=True)
class _Course:
    """What the page shows of a run's course."""

    recipe: Recipe | None
    problem: str | None  # with the recipe
    log: TrainingLog
    events: list[Event]
    state: State
    sessions: list[Session]

    @property
    def steps(self) -> int | None:
        return None if self.recipe is None else self.recipe.train.steps

    @property
    def done(self) -> int:
        """The last step that is in the log or in the events."""
        steps = [int(self.log.steps[-1])] if len(self.log.steps) else []
        return max([*steps, *(event.step or 0 for event in self.events[-1:])], default=0)


def write_page(run: str | Path, out: str | Path | None = None) -> Path:
    """Write RUN/report.html from the files of the run directory, whether the run still goes, is over or has died.

    Args:
        run: the run directory.
        out: a further folder with samples.png, samples.mp4 and evaluation/ of the run's exported model.

    Returns:
        The file.

    Raises:
        UserError: there is no run in `run`, or the file cannot be written.
    """
    run, roots = Path(run), [Path(run), *([] if out is None else [Path(out)])]
    if not any((run / name).is_file() for name in _RUN_FILES):
        raise UserError(f"{run}: there is no run here; give a run directory, which has a recipe.yaml and a log.jsonl")
    path = run / PAGE
    check_writable(path)
    course = _read_course(run)
    samples = [Samples(Path(out), "Exported model, held-out episodes")] if out is not None else []
    title = course.recipe.name if course.recipe is not None else run.resolve().name
    sections = [
        ("Training", _curves(course)),
        ("Events", event_section(course.events, course.sessions)),
        ("Samples", join(samples_section([*samples, *validation_samples(run)]), _sample_scores(course.log))),
        ("Scores", score_section(roots)),
        ("Recipe", _recipe(course)),
        ("Versions", _versions(run)),
    ]
    body = [_summary(run, title, course)]
    body += [tag("section", tag("h2", name), content) for name, content in sections if content]
    with atomic_write(path) as temporary:
        temporary.write_text(_document(title, join(*body)), encoding="utf-8")
    return path


def _read_course(run: Path) -> _Course:
    recipe, problem = None, None
    try:
        recipe = load_recipe(run / "recipe.yaml")
    except UserError as error:
        problem = str(error)
    events, log = events_of(run), read_log(run / "log.jsonl")
    state = state_of(run, events, None if recipe is None else recipe.train.steps)
    return _Course(recipe, problem, log, events, state, sessions_of(events, state, log, time.time()))


def _document(title: str, body: Markup) -> str:
    # Only the script of this page runs, and nothing is loaded: not even by text that would get past the escaping.
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{script_hash}'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title}: report of a run"),
        tag("style", Markup(STYLE)),
    )
    content = tag("body", body, tag("script", Markup(SCRIPT)))
    return f"<!DOCTYPE html>\n{tag('html', head, content, lang='en')}\n"


def _summary(run: Path, title: str, course: _Course) -> Markup:
    log, state, done, steps = course.log, course.state, course.done, course.steps
    written = datetime.datetime.now(datetime.timezone.utc)
    parts = [
        tag("header", tag("h1", title), tag("span", state.kind, class_=f"badge {state.kind}")),
        tag("p", state.text),
        tag("p", f"{run}, as of {written:%Y-%m-%d %H:%M} UTC", class_="note"),
    ]
    if log.is_torn or log.unreadable:
        last = "the last line of log.jsonl is cut short, as by a kill, and is left out; " if log.is_torn else ""
        others = f"{log.unreadable} lines of log.jsonl cannot be read and are left out; " if log.unreadable else ""
        parts.append(tag("p", f"{last}{others}".rstrip("; "), class_="note"))
    if steps:
        share = min(1.0, done / steps)
        parts.append(tag("div", tag("i", style=f"width:{share:.1%}"), class_="progress"))
    tiles = [_tile(name, value) for name, value in _figures(run, course) if value is not None]
    return join(*parts, tag("div", *tiles, class_="tiles"))


def _figures(run: Path, course: _Course) -> list[tuple[str, str | None]]:
    """Names and values of the summary; None for what is not known."""
    log, done, steps, sessions = course.log, course.done, course.steps, course.sessions
    pace, rest = log.seconds_per_step(), None
    if course.state.kind == "running" and steps and pace is not None:
        rest = f"about {format_duration((steps - done) * pace)}"
    held_out = {name: log.validation_curve(key, "loss")[1] for key, name in (("weights", "weights"), ("ema", "EMA"))}
    restarts, saved = max(0, len(sessions) - 1), existing_steps(run)
    skipped, damaged = log.last("skipped"), log.last("damaged")
    return [
        ("steps", f"{done:,} of {steps:,}" if steps else f"{done:,}"),
        ("loss", _number(log.last("loss_mean") if log.last("loss_mean") is not None else log.last("loss"))),
        *((f"held-out loss, {name}", _number(curve[-1])) for name, curve in held_out.items() if len(curve)),
        ("left", rest),
        ("trained for", format_duration(sum(s.stop - s.start for s in sessions)) if sessions else None),
        ("seconds a step", None if pace is None else format_number(pace)),
        ("clips/s", _number(log.last("clips_per_second"))),
        ("tokens/s", _number(log.last("tokens_per_second"))),
        ("MFU", _number(log.last("mfu"), percent=True)),
        ("wait for data", _number(log.last("data_wait"), percent=True)),
        ("peak memory, GB", _number(log.last("memory_gb"))),
        ("restarts", str(restarts) if sessions else None),
        ("skipped steps", f"{skipped:.0f}" if skipped else None),
        ("damaged clips", f"{damaged:.0f}" if damaged else None),
        ("last checkpoint", f"step {saved[0]:,}" if saved else None),
    ]


def _tile(name: str, value: str) -> Markup:
    return tag("div", tag("b", value), tag("span", name), class_="tile")


def _number(value: float | None, percent: bool = False) -> str | None:
    return None if value is None else format_number(float(value), percent)


def _curves(course: _Course) -> Markup:
    log = course.log
    marks = [Mark(float(step), f"stage {name}, from step {step:,}", "stage") for step, name in log.stages.items()]
    marks += [
        Mark(float(one.first_step), f"restart after step {one.first_step:,}", "restart") for one in course.sessions[1:]
    ]
    x, columns = log.steps.astype(np.float64), log.columns
    loss = np.where(np.isfinite(columns["loss_mean"]), columns["loss_mean"], columns["loss"])
    held_out = [
        Series(name, *log.validation_curve(key, "loss"), colour, "dots")
        for key, name, colour in (("weights", "held-out", 2), ("ema", "held-out, EMA", 3))
    ]
    charts = [
        line_chart("Loss", [*raw_and_smoothed("loss", x, loss), *held_out], is_log=True, marks=marks, is_wide=True),
        line_chart("Learning rate", [Series("learning rate", x, columns["learning_rate"])], from_zero=True),
        line_chart(
            "Gradient norm, before clipping",
            raw_and_smoothed("gradient norm", x, columns["grad_norm"]),
            is_log=True,
            marks=marks,
        ),
        line_chart("Clips per second", raw_and_smoothed("clips/s", x, columns["clips_per_second"]), from_zero=True),
        line_chart("Tokens per second", raw_and_smoothed("tokens/s", x, columns["tokens_per_second"]), from_zero=True),
        line_chart("MFU", raw_and_smoothed("MFU", x, columns["mfu"]), from_zero=True, percent=True),
        line_chart(
            "Waits, share of the time",
            [Series("data", x, columns["data_wait"], 1), Series("save", x, columns["save_wait"], 2)],
            from_zero=True,
            percent=True,
        ),
        line_chart("Peak memory of a process, GB", [Series("memory", x, columns["memory_gb"])], from_zero=True),
        _bands_chart(log),
    ]
    if not any(charts):
        return tag("p", "No step is in the log yet.", class_="note")
    return tag("div", *charts, class_="charts")


def _bands_chart(log: TrainingLog) -> Markup:
    """The held-out loss of the EMA, or else of the weights, by band of timesteps."""
    for key, name in (("ema", "EMA"), ("weights", "weights")):
        bands = [inside(values, key, "timesteps") for values in log.validations.values()]
        names = list(dict.fromkeys(band for one in bands if isinstance(one, dict) for band in one))[:5]
        series = [
            Series(band, *log.validation_curve(key, "timesteps", band), colour, "dots")
            for colour, band in enumerate(names, 1)
        ]
        if chart := line_chart(f"Held-out loss by timestep, {name}", series, is_log=True):
            return chart
    return Markup()


def _sample_scores(log: TrainingLog) -> Markup:
    """PSNR, SSIM and LPIPS of the sampled videos, over the step."""
    charts = []
    for metric, name in (("psnr", "PSNR in dB"), ("ssim", "SSIM"), ("lpips", "LPIPS")):
        series = [
            Series(title, *log.validation_curve("samples", source, metric), colour, style)
            for source, title, colour, style in (
                ("prediction", "EMA", 1, "dots"),
                ("repeat_last", "repeat last", 2, "dashed"),
            )
        ]
        charts.append(line_chart(f"{name} of the validation's videos", series))
    return tag("div", *charts, class_="charts") if any(charts) else Markup()


def _recipe(course: _Course) -> Markup:
    if course.recipe is None:
        return tag("p", course.problem or "", class_="note")
    parts = []
    for index, level in enumerate(recipe_levels(course.recipe)):
        rows = [[change.key, change.before or "-", change.now or "-"] for change in level.changes]
        content = table(["key", "before", "now"], rows) if rows else tag("p", "no difference", class_="note")
        parts.append(
            tag("details", tag("summary", f"{level.title} ({len(rows)})"), content, open="" if not index else None)
        )
    note = f"Hash of what changes the result: {course.recipe.hash()[:12]}. Recipe files are read as they are now."
    return join(*parts, tag("p", note, class_="note"))


def _versions(run: Path) -> Markup:
    """The content of environment.json."""
    if not (run / environment.NAME).is_file():
        return Markup()
    try:
        values = read_json(run / environment.NAME, "environment")
    except UserError as error:
        return tag("p", str(error), class_="note")
    packages, nodes = inside(values, "packages"), inside(values, "nodes")
    packages = packages if isinstance(packages, dict) else {}
    hosts = nodes.values() if isinstance(nodes, dict) else []
    devices = Counter(str(device) for host in hosts for device in inside(host, "devices") or [])
    drivers = sorted({str(inside(host, "driver")) for host in hosts if inside(host, "driver")})
    commit, diff = inside(values, "code", "commit"), inside(values, "code", "diff")
    changed = f", with {len(diff.splitlines())} lines of uncommitted changes" if isinstance(diff, str) and diff else ""
    rows: list[tuple[str, Any]] = [
        ("recorded", inside(values, "time")),
        ("ranks", inside(values, "ranks")),
        ("nodes", len(hosts) or None),
        ("devices", ", ".join(f"{count} x {name}" for name, count in sorted(devices.items())) or None),
        ("driver", ", ".join(drivers) or None),
        ("far_scale", inside(values, "code", "far_scale")),
        ("commit", f"{commit}{changed}" if commit else None),
        ("Python", inside(values, "python")),
        *((name, packages.get(name)) for name in _PACKAGES),
        ("CUDA", inside(values, "cuda")),
        ("cuDNN", inside(values, "cudnn")),
        ("NCCL", inside(values, "nccl")),
    ]
    parts = [table(["", ""], [[name, str(value)] for name, value in rows if value is not None])]
    for name in ("packages", "variables"):
        listed = inside(values, name)
        if isinstance(listed, dict) and listed:
            lines = [[str(key), str(value)] for key, value in listed.items()]
            parts.append(tag("details", tag("summary", f"All {name} ({len(lines)})"), table(["", ""], lines)))
    return join(*parts)
