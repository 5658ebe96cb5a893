"""What the files of a run say of its course: the numbers of log.jsonl, the events, and whether it still goes."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from far_scale.train.lease import active_holder
from far_scale.train.run_dir import existing_steps
from far_scale.utils.event_log import read_events

COLUMNS = (
    "loss",
    "loss_mean",
    "learning_rate",
    "grad_norm",
    "clips_per_second",
    "tokens_per_second",
    "mfu",
    "data_wait",
    "save_wait",
    "memory_gb",
    "seconds_per_step",
    "skipped",
    "damaged",
)
"""The numbers of a line of training."""

_LARGEST = 1e30  # larger numbers are damage, and would overflow in the charts
_LARGEST_STEP = 10**15


@dataclass(frozen=True)
class TrainingLog:
    """The content of log.jsonl; of a step that is in it twice the last line counts.

    Attributes:
        steps: `[N]`, ascending, of the lines of training.
        columns: `[N]` by name, of `COLUMNS`; NaN where a line has no finite number.
        stages: the name of each stage of a curriculum by the first step logged in it.
        validations: the values of each validation by its step, ascending.
        unreadable: lines that are no JSON objects with a step, without the last one.
        is_torn: whether the last line is such a line.
    """

    steps: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    stages: dict[int, str]
    validations: dict[int, dict[str, Any]]
    unreadable: int
    is_torn: bool

    def last(self, name: str) -> float | None:
        """The last finite number of a column."""
        finite = self.columns[name][np.isfinite(self.columns[name])]
        return float(finite[-1]) if len(finite) else None

    def seconds_per_step(self) -> float | None:
        """The median over the last lines."""
        recent = self.columns["seconds_per_step"][-20:]
        recent = recent[np.isfinite(recent)]
        return float(np.median(recent)) if len(recent) else None

    def validation_curve(self, *path: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of a number in the validations, such as `("ema", "loss")`."""
        pairs = [(step, number(inside(values, *path))) for step, values in self.validations.items()]
        known = [(float(step), value) for step, value in pairs if value is not None]
        return np.array([step for step, _ in known]), np.array([value for _, value in known])


def read_log(path: Path) -> TrainingLog:
    """Read log.jsonl, line by line, since a long run's has many; without the file there are no lines."""
    rows: dict[int, list[float]] = {}
    stage_of: dict[int, str] = {}
    validations: dict[int, dict[str, Any]] = {}
    unreadable, is_torn = 0, False
    for line in _objects(path):
        unreadable += is_torn
        step = None if line is None else line.get("step")
        is_torn = line is None or type(step) is not int or not 0 <= step <= _LARGEST_STEP
        if line is None or type(step) is not int or is_torn:
            continue
        if isinstance(line.get("validation"), dict):
            validations[step] = line["validation"]
            continue
        values = (number(line.get(name)) for name in COLUMNS)
        rows[step] = [math.nan if value is None else value for value in values]
        if isinstance(line.get("stage_name"), str):
            stage_of[step] = line["stage_name"]
    steps = np.array(sorted(rows), dtype=np.int64)
    numbers = np.array([rows[step] for step in steps.tolist()]).reshape(len(steps), len(COLUMNS))
    stages: dict[int, str] = {}
    for step in sorted(stage_of):
        if not stages or list(stages.values())[-1] != stage_of[step]:
            stages[step] = stage_of[step]
    columns = {name: numbers[:, index] for index, name in enumerate(COLUMNS)}
    return TrainingLog(steps, columns, stages, dict(sorted(validations.items())), unreadable, is_torn)


def _objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a file of JSON lines; None for other lines that are not empty."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else None


def number(value: Any) -> float | None:
    """A number of a JSON file; None for anything else, and where it is not finite or unreasonably large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= _LARGEST else None  # False for NaN, and for integers beyond all floats


def inside(values: Any, *path: str) -> Any:
    """The value at `path` in nested dicts; None where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


class Event(NamedTuple):
    """A line of events.jsonl; `time` is None where it has no readable one."""

    time: datetime.datetime | None
    kind: str
    step: int | None
    text: str


def events_of(run: Path) -> list[Event]:
    """The events of a run in the order of the file."""
    return [
        Event(
            _time(line.get("time")),
            str(line.get("event", "unknown")),
            line["step"] if type(line.get("step")) is int else None,
            str(line.get("text", "")),
        )
        for line in read_events(run)
    ]


def _time(text: Any) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
        return time.astimezone(datetime.timezone.utc) if time.year < 9999 else None
    except (AttributeError, ValueError, OverflowError):
        return None


class State(NamedTuple):
    """Whether a run still goes, and a sentence about it."""

    kind: Literal["running", "done", "stopped", "died", "not started"]
    text: str


class Session(NamedTuple):
    """The time from one start to its end, in seconds since 1970; `end` names how it ended."""

    start: float
    stop: float
    end: Literal["running", "done", "stopped", "died"]
    first_step: int


_STARTS = ("began", "resumed")
_ENDS: dict[str, Literal["done", "stopped"]] = {"finished": "done", "stopped": "stopped"}


def state_of(run: Path, events: Sequence[Event], steps: int | None) -> State:
    """Whether a run still goes, by its lease, its events, and whether there is a checkpoint of all its `steps`."""
    if (holder := active_holder(run)) is not None:
        return State("running", f"trained by {holder}")
    last = next((event for event in reversed(events) if event.kind in (*_STARTS, *_ENDS)), None)
    if last is None:
        text = "nothing was trained yet" if not events else "a start ended before its first step"
        return State("not started", text)
    if last.kind in _ENDS:
        return State(_ENDS[last.kind], last.text)
    if steps is not None and max(existing_steps(run), default=0) >= steps:
        return State("done", f"all {steps} steps are done; the last start was killed after its last checkpoint")
    return State("died", "the last start has neither finished nor stopped, and no job holds the run directory")


def sessions_of(events: Sequence[Event], state: State, log: TrainingLog, now: float) -> list[Session]:
    """The times of training, oldest first; `now` is in seconds since 1970.

    A start that died ends with its last event, or, if it is the last one, after the steps that the log has beyond it.
    The time of the file would be another one in a copy.
    """
    sessions: list[Session] = []
    start: Event | None = None
    latest = 0.0
    for event in events:
        if event.time is None:
            continue
        time = event.time.timestamp()
        if event.kind in _STARTS:
            if start is not None and start.time is not None:
                sessions.append(Session(start.time.timestamp(), latest, "died", start.step or 0))
            start = event
        elif event.kind in _ENDS and start is not None and start.time is not None:
            sessions.append(Session(start.time.timestamp(), time, _ENDS[event.kind], start.step or 0))
            start = None
        latest = time
    if start is not None and start.time is not None:
        begin = start.time.timestamp()
        is_running = state.kind == "running"
        beyond = (int(log.steps[-1]) if len(log.steps) else 0) - (events[-1].step or 0)
        end = max(begin, now if is_running else latest + max(0, beyond) * (log.seconds_per_step() or 0.0))
        sessions.append(Session(begin, end, "running" if is_running else "died", start.step or 0))
    return sessions
