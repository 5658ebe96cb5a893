"""The events of a run on the page: a time line, and a list of the last ones."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

from far_scale.evaluation.run_page.charts import Bar, Row, time_line
from far_scale.evaluation.run_page.history import Event, Session
from far_scale.evaluation.run_page.markup import Markup, join, table, tag

_GOOD = ("began", "resumed", "saved", "finished", "nodes", "started-from", "staged", "collectives", "forecast")
_BAD = ("damaged", "damaged-shard", "rolled-back", "save-failed", "watchdog", "no-progress", "validation-failed")
_SESSION_KINDS = {"running": "run", "done": "good", "stopped": "warn", "died": "bad"}
_MAX_KINDS = 24
_MAX_LISTED = 200
_MAX_TEXT = 600
_PLACES = 300  # along the time line; events of one kind in one place share a dot


def event_section(events: Sequence[Event], sessions: Sequence[Session]) -> Markup:
    """A time line of the starts and of each kind of event, and the last events; empty without events."""
    if not events:
        return Markup()
    listed = [
        [_format_time(event.time), "" if event.step is None else f"{event.step:,}", event.kind, event.text[:_MAX_TEXT]]
        for event in reversed(events[-_MAX_LISTED:])
    ]
    name = f"The last {len(listed)} of {len(events):,} events" if len(events) > len(listed) else "All events"
    details = tag("details", tag("summary", name), table(["time (UTC)", "step", "event", "text"], listed, "events"))
    return join(_time_line(events, sessions), details)


def _time_line(events: Sequence[Event], sessions: Sequence[Session]) -> Markup:
    seconds = [event.time.timestamp() for event in events if event.time is not None]
    seconds += [time for session in sessions for time in (session.start, session.stop)]
    if not seconds:
        return Markup()
    first, last = min(seconds), max(seconds)
    kinds = list(dict.fromkeys(event.kind for event in events))
    shown, others = kinds[:_MAX_KINDS], set(kinds[_MAX_KINDS:])
    rows = [
        Row(
            "training",
            [
                Bar(
                    one.start,
                    one.stop,
                    f"{one.end} after {format_duration(one.stop - one.start)}",
                    _SESSION_KINDS[one.end],
                )
                for one in sessions
            ],
        )
    ]
    rows += [Row(kind, _dots([event for event in events if event.kind == kind], first, last)) for kind in shown]
    if others:
        rows.append(Row("others", _dots([event for event in events if event.kind in others], first, last)))
    return time_line(rows, first, last, _time_ticks(first, last))


def _dots(events: Sequence[Event], first: float, last: float) -> list[Bar]:
    """A dot for each place with events."""
    places: dict[int, list[Event]] = {}
    for event in events:
        if event.time is not None:
            place = round((event.time.timestamp() - first) / max(last - first, 1e-3) * _PLACES)
            places.setdefault(place, []).append(event)
    dots = []
    for found in places.values():
        event = found[-1]
        assert event.time is not None
        more = "" if len(found) == 1 else f"{len(found)} events, the last one: "
        kind = "good" if event.kind in _GOOD else "bad" if event.kind in _BAD else "warn"
        at = event.time.timestamp()
        dots.append(Bar(at, at, f"{_format_time(event.time)}  {more}{event.text[:_MAX_TEXT]}", kind))
    return dots


def _time_ticks(first: float, last: float) -> list[tuple[float, str]]:
    """Round times between two, in UTC: with the date where they are more than a day apart."""
    steps = (1, 5, 15, 30, 60, 300, 900, 1800, 3600, 10800, 21600, 43200, 86400)
    span = last - first
    step = next((step for step in steps if span / step <= 4), 86400 * math.ceil(span / 86400 / 4))
    layout = "%b %d" if step >= 86400 else "%b %d, %H:%M" if span > 86400 else "%H:%M" if step >= 60 else "%H:%M:%S"
    times = range(int(-(-first // step)) * step, int(last) + 1, step)
    return [(float(t), f"{datetime.datetime.fromtimestamp(t, datetime.timezone.utc):{layout}}") for t in times]


def _format_time(time: datetime.datetime | None) -> str:
    return "" if time is None else f"{time:%Y-%m-%d %H:%M:%S}"


def format_duration(seconds: float) -> str:
    """Such as `2 d 3 h`, `1 h 20 min`, `5 min 10 s` or `12 s`."""
    whole = max(0, round(seconds))
    units = (("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60), ("s", whole % 60))
    first = next((index for index, (_, count) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for unit, count in units[first : first + 2] if count or unit == units[first][0])
