"""Small files of JSON, and where files can be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from far_scale.data.demo import episodes
from far_scale.data.demo.explorer import GOALS_ONLY
from far_scale.evaluation.rollouts.loss_curve import draw_loss_curve
from far_scale.utils.event_log import lines_up_to, read_events
from far_scale.utils.io import JsonlWriter, check_writable, read_json_lines, text_lines, write_json
from harness.refusal import refused

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def strict(text: str) -> object:
    """JSON as other readers have it, without Python's NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_holds_no_number_that_is_not_finite(tmp_path: Path) -> None:
    value = {"a": NOT_FINITE, "b": {"c": (1.5, NOT_FINITE[0])}, "d": 2}
    plain = {"a": [None] * 3, "b": {"c": [1.5, None]}, "d": 2}
    write_json(tmp_path / "one.json", value)
    JsonlWriter(tmp_path / "lines.jsonl").append(value)
    assert strict((tmp_path / "one.json").read_text()) == strict((tmp_path / "lines.jsonl").read_text()) == plain


LINES = [
    '{"step": 1, "loss": 1.0, "learning_rate": 0.1}',
    '{"step": 2, "loss": 0.9, "learning_rate": 0.1, "note": "a\u2028b\x85c"}',  # no end of a line of JSON
    '{"step": 3, "loss": null, "learning_rate": 0.1}',
    '{"step": 4, "loss": NaN, "learning_rate": 0.1}',
]
BAD = ["5", "[1]", '"text"', "null", "[" * 100_000, '{"step": 7, "lo', "\ufffd"]


def test_a_log_with_lines_that_are_none(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    assert len(read_json_lines(log)) == 4
    assert [line["step"] for line in lines_up_to(log, 3)] == [1, 2, 3]
    draw_loss_curve(tmp_path / "loss.png", log)
    for bad in BAD:
        log.write_text(
            "\n".join([*LINES, bad, '{"loss": 1, "learning_rate": 1, "step": "6"}']) + "\n", encoding="utf-8"
        )
        assert read_json_lines(log)[4] is None
        assert [line["step"] for line in lines_up_to(log, 9)] == [1, 2, 3, 4]
        refused(lambda: draw_loss_curve(tmp_path / "other.png", log), "log.jsonl: line 5 is no entry", "remove it")
    log.write_bytes(b'{"step": 1}\n\xff\xfe\n')
    assert read_json_lines(log) == [{"step": 1}, None]
    log.write_text("")
    assert read_json_lines(log) == [] and not (tmp_path / "other.png").exists()


def test_events_with_lines_that_are_none(tmp_path: Path) -> None:
    text = '{"event": "began", "text": "a\u2028b"}\n3\n{"event": "sav'
    (tmp_path / "events.jsonl").write_text(text, encoding="utf-8")
    assert [event["event"] for event in read_events(tmp_path)] == ["began"]


def test_lists_of_videos_end_lines_only_at_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\u2028b.mp4\r\n\nc\x85d.mp4", encoding="utf-8", newline="")
    assert list(text_lines(tmp_path / "list.txt", "list")) == [(1, "a\u2028b.mp4"), (3, "c\x85d.mp4")]


def test_where_nothing_can_be_written_is_refused_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    refused(lambda: check_writable(tmp_path / "file" / "a.mp4"), str(tmp_path / "file"), "cannot be written")
    refused(lambda: check_writable(tmp_path / "folder.mp4"), "is a folder")
    refused(lambda: check_writable(Path("/proc/none/a.mp4")), "/proc/none/a.mp4", "cannot be written")
    check_writable(tmp_path / "new" / "deep" / "a.mp4")
    check_writable(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_an_episode_of_another_seed_is_recorded_again(recorded: Path, tmp_path: Path) -> None:
    first, second = sorted(recorded.glob("*.npz"))[:2]
    seeds = [int(path.stem.removeprefix("episode-")) for path in (first, second)]
    assert episodes._is_complete(first, seeds[0], 24, GOALS_ONLY)
    (tmp_path / second.name).write_bytes(first.read_bytes())
    assert not episodes._is_complete(tmp_path / second.name, seeds[1], 24, GOALS_ONLY)
