"""report.html of a run: the right numbers and state, for every condition of a run directory, and nothing but text."""

from __future__ import annotations

import datetime
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from far_scale.config.recipe import load_recipe
from far_scale.distributed.process_group import Processes
from far_scale.evaluation.protocol import load_protocol
from far_scale.evaluation.run_page import samples
from far_scale.evaluation.run_page.charts import downsample, format_number, linear_ticks, log_ticks, smooth
from far_scale.evaluation.run_page.event_section import format_duration
from far_scale.evaluation.run_page.history import events_of, read_log, sessions_of, state_of
from far_scale.evaluation.run_page.page import PAGE, write_page
from far_scale.evaluation.run_page.recipe_changes import Change, recipe_levels
from far_scale.evaluation.run_page.style import SCRIPT
from far_scale.train.lease import NAME as LEASE
from far_scale.train.lease import Lease
from far_scale.utils.errors import UserError
from harness.tools import tool

ALONE = Processes(0, 1, torch.device("cpu"))
START = datetime.datetime(2026, 11, 1, 12, tzinfo=datetime.timezone.utc)
HOSTILE = "</script></style><xss onload=alert(1)>\"'\x00\u202e\ud800"


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        self._open = name

    def handle_endtag(self, name: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style" and data.strip():
            self.texts.append(data)

    @property
    def curves(self) -> dict[str, list[list[float]]]:
        """The points of every curve by its name, of the charts in their order; the first of a name counts."""
        curves: dict[str, list[list[float]]] = {}
        for _, attributes in self.elements:
            for name, points in json.loads(attributes.get("data-chart") or '{"series": []}')["series"]:
                curves.setdefault(name, points)
        return curves

    @property
    def badge(self) -> str:
        (kind,) = [
            (a["class"] or "").partition(" ")[2] for _, a in self.elements if (a.get("class") or "").startswith("badge")
        ]
        return kind

    def value(self, name: str) -> str:
        """The text before `name`: of a tile, its value."""
        return self.texts[self.texts.index(name) - 1]

    def after(self, name: str, count: int = 1) -> list[str]:
        """The texts after `name`: of a table, the other cells of its row."""
        index = self.texts.index(name)
        return self.texts[index + 1 : index + 1 + count]


def line(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": loss, "loss_mean": loss, "learning_rate": step * 1e-5, "grad_norm": 0.5, "skipped": 0,
        "damaged": 0, "clips_per_second": 8.0, "tokens_per_second": 2048.0, "mfu": 0.25, "data_wait": 0.01,
        "save_wait": 0.0, "memory_gb": 1.5, "seconds_per_step": 2.0, **more,
    }  # fmt: skip


def event(seconds: float, kind: str, step: int, text: str = "") -> dict[str, Any]:
    return {
        "time": (START + datetime.timedelta(seconds=seconds)).isoformat(),
        "event": kind,
        "step": step,
        "text": text or f"{kind} at {step}",
    }


def write_run(run: Path, lines: list[dict[str, Any]], events: list[dict[str, Any]], *overrides: str) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    load_recipe("demo_cpu", ["train.steps=40", "optimizer.warmup_steps=2", *overrides]).save(run / "recipe.yaml")
    (run / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    return run


def page_of(run: Path, out: Path | None = None) -> Page:
    return Page(write_page(run, out).read_text())


def test_the_page_of_a_finished_run_has_its_numbers(tmp_path: Path) -> None:
    losses = {"loss": 0.75, "timesteps": {"1-200": 0.25, "801-1000": 1.5}}
    validation = {"weights": losses, "ema": {**losses, "loss": 0.625}, "seconds": 1.0}
    lines = [line(1, 2.0), line(20, None), {"step": 20, "validation": validation}, line(40, 0.5, skipped=1)]
    events = [event(0, "began", 0), event(80, "saved", 40, "step 40: saved"), event(90, "finished", 40)]
    run = write_run(tmp_path / "run", lines, events, "data.lanes=8")
    environment = {
        "ranks": 2, "python": "3.11.7", "nodes": {"n1": {"driver": "570", "devices": ["H100", "H100"]}},
        "code": {"far_scale": "0.1.0", "commit": "abc123", "diff": "+a\n-b\n"}, "packages": {"torch": "2.13.0"},
        "variables": {"OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    (run / "environment.json").write_text(json.dumps(environment))
    page = page_of(run)
    assert page.badge == "done" and "finished at 40" in page.texts
    values = {
        "steps": "40 of 40", "loss": "0.5", "held-out loss, weights": "0.75", "held-out loss, EMA": "0.625",
        "trained for": "1 min 30 s", "seconds a step": "2", "clips/s": "8", "tokens/s": "2048", "MFU": "25 %",
        "wait for data": "1 %", "peak memory, GB": "1.5", "restarts": "0", "skipped steps": "1",
    }  # fmt: skip
    assert {name: page.value(name) for name in values} == values and "damaged clips" not in page.texts
    curves = page.curves
    assert curves["loss"] == [[1, 2.0], [40, 0.5]], "a loss that is not finite leaves a gap"
    assert curves["learning rate"] == [[1, 1e-5], [20, 2e-4], [40, 4e-4]]
    assert (curves["held-out"], curves["held-out, EMA"]) == ([[20, 0.75]], [[20, 0.625]])
    assert curves["801-1000"] == [[20, 1.5]] and curves["MFU"][0] == [1, 0.25]
    assert page.after("train.steps", 2) == ["1500", "40"] and page.after("data.lanes", 2)[1] == "8"
    assert page.after("devices") == ["2 x H100"] and page.after("torch") == ["2.13.0"]
    assert page.after("commit") == ["abc123, with 2 lines of uncommitted changes"]
    titles = [attributes["title"] for _, attributes in page.elements if "title" in attributes]
    assert "2026-11-01 12:01:20  step 40: saved" in titles and "done after 1 min 30 s" in titles


def test_the_state_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], [])

    def state(*events: dict[str, Any]) -> str:
        write_run(run, [line(1, 1.0)], list(events))
        return page_of(run).badge

    began = event(0, "began", 0)
    assert state() == "not started"
    assert state(event(0, "nodes", 0)) == "not started"
    assert state(began) == "died" and state(began, event(9, "saved", 3)) == "died"
    assert state(began, event(9, "stopped", 4)) == "stopped"
    assert state(began, event(9, "stopped", 4), event(20, "resumed", 4)) == "died"
    assert state(began, event(9, "finished", 40), event(10, "validation-failed", 40)) == "done"
    with Lease(run, ALONE):
        assert state(began) == "running"
        assert any("lease renewed" in text for text in page_of(run).texts)
        assert page_of(run).value("left") == "about 1 min 18 s", "39 steps of 2 s"
        held = json.loads((run / LEASE).read_text())
    (run / LEASE).write_text(json.dumps({**held, "pid": 2**22 + 1}))
    assert state(began) == "died", "the process that holds the lease is dead"
    (run / LEASE).write_text(json.dumps({**held, "directory": {"path": "/elsewhere", "inode": 1}}))
    assert state(began) == "died", "the lease was copied with the directory"
    assert not list(run.glob(".lease*"))
    (run / "checkpoints" / "step-00000040").mkdir(parents=True)
    assert state(began) == "done", "killed between its last checkpoint and its last event"


def test_the_times_of_training(tmp_path: Path) -> None:
    """Of a stop, a death in between, and a death at the end, three steps after the last event."""
    events = [
        event(0, "began", 0), event(10, "stopped", 4), event(100, "resumed", 4), event(130, "saved", 6),
        event(200, "resumed", 6), event(220, "saved", 10),
    ]  # fmt: skip
    run = write_run(tmp_path, [line(step, 1.0) for step in range(1, 14)], events)
    read, log = events_of(run), read_log(run / "log.jsonl")
    found = sessions_of(read, state_of(run, read, 40), log, START.timestamp() + 1e6)
    times = [(one.start - START.timestamp(), one.stop - START.timestamp(), one.end, one.first_step) for one in found]
    assert times == [(0, 10, "stopped", 0), (100, 130, "died", 4), (200, 226, "died", 6)]
    assert page_of(run).value("restarts") == "2"


def test_a_torn_line_is_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, [line(step, 1.0 / step) for step in (1, 2)], [event(0, "began", 0)])
    whole = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(whole + b'{"step": 3, "loss": 0.\xff')
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": "2026')
    page = page_of(run)
    assert page.curves["loss"] == [[1, 1.0], [2, 0.5]]
    assert any(text.startswith("the last line of log.jsonl is cut short") for text in page.texts)
    (run / "log.jsonl").write_bytes(b'[1]\n{"loss": 1}\n\n{"step": 1e9}\n{"step": true}\n' + whole)
    page = page_of(run)
    assert page.curves["loss"] == [[1, 1.0], [2, 0.5]]
    assert "4 lines of log.jsonl cannot be read and are left out" in page.texts


def test_runs_with_little_or_strange_in_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run here; give a run directory"):
        write_page(tmp_path)
    only_events = tmp_path / "events"
    only_events.mkdir()
    (only_events / "events.jsonl").write_text('{"event": "began", "time": "yesterday", "step": "one"}\n{}\n')
    page = page_of(only_events)
    assert page.badge == "died" and "No step is in the log yet." in page.texts
    assert any("recipe.yaml" in text and "no such recipe" in text for text in page.texts)
    strange = [line(1, 1e300), line(2, 3.0, grad_norm=10**400, mfu="fast", data_wait=[1]), line(2, 4.0), line(3, -1.0)]
    page = page_of(write_run(tmp_path / "strange", strange, [event(0, "began", 0, "1")] * 3, "train.steps=2"))
    assert page.curves["loss"] == [[2, 4.0], [3, -1.0]], "the last line of a step counts; 1e300 is damage"
    assert page.value("steps") == "3 of 2"
    (tmp_path / "strange" / "environment.json").write_text('{"nodes": [], "code": 1, "packages": null}')
    assert page_of(tmp_path / "strange").badge == "died"


def test_all_text_is_escaped(tmp_path: Path) -> None:
    names = {"timesteps": {HOSTILE: 0.5}, "loss": 0.5}
    lines = [line(1, 1.0, stage_name="a"), line(2, 1.0, stage_name=HOSTILE), line(3, 1.0, stage_name="b")]
    lines.append({"step": 3, "validation": {"ema": names, "weights": HOSTILE, "samples": HOSTILE}})
    events = [event(0, "began", 0, HOSTILE), event(1, HOSTILE, 1, HOSTILE)]
    shown = HOSTILE.translate({0: "\ufffd", 0x202E: "\ufffd", 0xD800: "\ufffd"})
    run = write_run(tmp_path / "a<b>&", lines, events, f"name={json.dumps(shown)}", f"data.shards={json.dumps(shown)}")
    environment = {"code": {"commit": HOSTILE}, "packages": {HOSTILE: HOSTILE}, "nodes": {"n": {"devices": [HOSTILE]}}}
    (run / "environment.json").write_text(json.dumps(environment))
    page = page_of(run)
    assert "xss" not in [name for name, _ in page.elements]
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert page.scripts == [SCRIPT]
    assert page.texts.count(shown) >= 8, "it is shown as it is: name, events, packages, recipe, legend"
    (policy,) = [a["content"] or "" for name, a in page.elements if name == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[\w+/]+=*'$", policy)
    text = (run / PAGE).read_text()
    assert not re.search(r"https?://|\bsrc=\"(?!data:)|\bhref=", text), "nothing is loaded"


def test_downsampling_keeps_the_extremes() -> None:
    draw = np.random.default_rng(0)
    y = draw.normal(size=123_457)
    y[[777, 99_999]] = 50.0, -60.0
    y[5] = np.nan
    kept = downsample(y, 1000)
    assert len(kept) <= 1000 and (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == len(y) - 1
    assert {777, 99_999} <= set(kept.tolist()) and 5 not in kept
    for part in np.array_split(np.arange(len(y)), 100):  # coarser parts than those of the drawing
        inside = kept[(kept >= part[0]) & (kept <= part[-1])]
        assert np.nanmax(y[inside]) >= np.nanquantile(y[part], 0.999)
    assert downsample(np.array([1.0, np.nan, 2.0]), 1000).tolist() == [0, 2]
    assert smooth(np.array([1.0, np.nan, 3.0, 5.0])).tolist() == [1.0, 2.0, 4.0, 4.0]


@pytest.mark.slow
def test_a_long_run_makes_a_small_page_with_its_spikes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lines = [line(step, float(loss)) for step, loss in enumerate(draw.uniform(0.4, 0.6, 100_000), 1)]
    lines[54_320].update(loss=9.0, loss_mean=9.0, grad_norm=70.0)
    events = [event(second, kind, 1) for second, kind in enumerate(["began", *["saved", "spike"] * 5000])]
    run = write_run(tmp_path / "run", lines, events)
    page = page_of(run)
    assert (run / PAGE).stat().st_size < 1_500_000
    assert [54_321, 9.0] in page.curves["loss"] and [54_321, 70.0] in page.curves["gradient norm"]
    top = min(float(y) for path in re.findall(r'd="M([^"]*)" class="pale c1"', (run / PAGE).read_text())[:1]
              for y in re.findall(r" ([\d.]+)", path))  # fmt: skip
    assert top < 60, "the spike of the loss reaches the top of its chart"
    assert "The last 200 of 10,001 events" in page.texts


def test_samples_are_inside_the_page_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [line(1, 1.0)], [event(0, "began", 0)])
    noise = np.random.default_rng(0).integers(0, 255, (700, 2000, 3), dtype=np.uint8)
    for step in range(10, 100, 10):
        folder = run / "validation" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        Image.fromarray(noise if step == 90 else noise[:10, :10]).save(folder / "samples.png")
        (folder / "samples.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (run / "validation" / "step-00000010" / "samples.png").write_bytes(b"\x89PNG damaged")
    page = page_of(run)
    sources = [str(attributes["src"])[:22] for name, attributes in page.elements if name in ("img", "video")]
    assert sources == ["data:image/jpeg;base64,"[:22], "data:video/mp4;base64,", *["data:image/png;base64,"] * 2]
    titles = [text for text in page.texts if text.startswith("Validation after step")]
    assert titles == [f"Validation after step {step}, sampled with the EMA" for step in (90, 60, 40, 10)]
    assert "samples.png: unreadable or too large for this page" in page.texts
    assert (run / PAGE).stat().st_size < 1.4 * samples.MEDIA_BYTES
    monkeypatch.setattr(samples, "MEDIA_BYTES", 100)
    assert [name for name, _ in page_of(run).elements if name in ("img", "video")] == ["video"]
    out = tmp_path / "out"
    out.mkdir()
    Image.fromarray(noise[:2, :2]).save(out / "samples.png")
    assert "Exported model, held-out episodes" in page_of(run, out).texts


def test_scores_stand_with_their_protocol(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [line(1, 1.0)], [event(0, "began", 0)])
    protocol = load_protocol("vizdoom-8to8").with_clips(count=5)
    scores: dict[str, Any] = {
        "protocol": protocol.name, "protocol_hash": protocol.hash(), "n": 5,
        "weights": {"source": "model", "kind": "ema", "step": 1500, "sha256": "ab" * 32}, "guidance": 1.5,
        "scores": {"lpips": {"mean": 0.42, "ci95": [0.4, 0.4444]}, "psnr": {"mean": 15.8}},
        "repeat_last": {"lpips": {"mean": 0.384}}, "reconstruction": None, "settings": protocol.model_dump(mode="json"),
    }  # fmt: skip
    steps = [{"step": step, "scores": {"lpips": {"mean": 1 / step}}} for step in (10, 20)]
    by_step = {**{key: scores[key] for key in ("protocol", "protocol_hash", "n", "repeat_last", "reconstruction")}}
    for folder, name, values in (
        (run / "evaluation" / "once", "scores.json", scores),
        (run / "evaluation" / "followed", "scores_by_step.json", {**by_step, "steps": steps}),
        (run / "evaluation" / "damaged", "scores.json", {"protocol": 1}),
        (tmp_path / "out" / "evaluation", "scores.json", {**scores, "protocol": "of the quickstart"}),
    ):
        folder.mkdir(parents=True)
        (folder / name).write_text(json.dumps(values))
    page = page_of(run, tmp_path / "out")
    assert page.after("vizdoom-8to8: ema of step 1,500", 5)[2:] == ["model", "0.420 [0.400, 0.444]", "15.80"]
    settings = [text for text in page.texts if text.startswith("N: 5 clips")]
    assert len(settings) == 3 and all(protocol.hash()[:12] in text for text in settings)
    assert sum("frames: 8 given -> 8 predicted, 64 px; sampling: " in text for text in settings) == 2
    assert page.curves["model"] == [[10, 0.1], [20, 0.05]] and page.curves["repeat last"] == [[10, 0.384], [20, 0.384]]
    assert page.after("step 20") == ["0.050"]
    assert any("damaged/scores.json: not the scores of an evaluation" in text for text in page.texts)
    assert "of the quickstart: ema of step 1,500" in page.texts


def test_the_recipe_is_compared_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("extends: demo_cpu\noptimizer: {learning_rate: 2e-3}\n")
    monkeypatch.chdir(tmp_path)
    levels = recipe_levels(load_recipe("mine", ["seed=7", "run_dir=elsewhere"]))
    assert [level.title for level in levels[:2]] == ["This run, from mine.yaml", "mine.yaml, from demo_cpu.yaml"]
    assert levels[0].changes == [Change("seed", "0", "7"), Change("run_dir", "runs/quickstart/train", "elsewhere")]
    assert [(change.key, change.now) for change in levels[1].changes] == [("optimizer.learning_rate", "0.002")]
    assert levels[-1].title.endswith(", from the defaults")
    with_its_name = load_recipe("mine")
    (tmp_path / "recipes" / "mine.yaml").write_text("extends: mine\n")
    assert [level.title for level in recipe_levels(with_its_name)] == ["This run, from the defaults"]
    (level,) = recipe_levels(load_recipe("demo_cpu", ["name=unknown", "faults.spikes=skip"]))
    changes = {change.key: change for change in level.changes}
    assert level.title == "This run, from the defaults" and changes["faults.spikes"].before == "warn"
    assert "faults.watchdog_seconds" not in changes and changes["train.steps"].now == "1500"


def test_the_tool_writes_the_page_and_refuses_half_of_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [line(1, 1.0)], [event(0, "began", 0)])
    tool(monkeypatch, "report_run.py", run)
    assert capsys.readouterr().out == f"page of the run: {run / PAGE}\n" and (run / PAGE).is_file()
    (run / PAGE).unlink()
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 2')
    with pytest.raises(SystemExit):
        tool(monkeypatch, "report_run.py", run, "--model", tmp_path, "--videos", run, "--out", tmp_path / "out")
    assert (run / PAGE).is_file(), "also where nothing can be sampled"
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool(monkeypatch, "report_run.py", run, "--model", tmp_path)
    assert ended.value.code == 2
    assert "error: --videos, --out: missing; give --model, --videos and --out together" in capsys.readouterr().err


def test_ticks_and_numbers_are_round() -> None:
    assert linear_ticks(0, 1500) == [0, 500, 1000, 1500] and linear_ticks(0.12, 0.18) == [0.12, 0.14, 0.16, 0.18]
    assert log_ticks(0.08, 4) == [0.1, 0.3, 1, 3] and log_ticks(0.9, 1.1) == [0.9, 0.95, 1.0, 1.05, 1.1]
    assert [format_number(x) for x in (0.12345, 12345, 1.5e6, 2e9, 0)] == ["0.1235", "12.35k", "1.5M", "2G", "0"]
    assert format_number(0.4321, percent=True) == "43.2 %"
    durations = {12: "12 s", 70: "1 min 10 s", 3600: "1 h", 93784: "1 d 2 h", 0: "0 s"}
    assert {seconds: format_duration(seconds) for seconds in durations} == durations
    assert math.isnan(smooth(np.array([np.nan, np.nan, np.nan]))[1])
