"""The command line of `far-scale play`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from far_scale.convert.model_dir import save_model_dir
from far_scale.play.access import Access
from far_scale.play.headless import parse_actions
from far_scale.play.server import STATIC_TYPES, PlayServer, serve
from harness import processes
from harness.launch import ROOT
from harness.play import SETTINGS, metadata_of, random_state, small_config, small_world
from harness.refusal import refused
from harness.tools import tool


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("play") / "model"
    config = small_config(actions=4)
    save_model_dir(folder, config, random_state(config), metadata_of(side=4))
    return folder


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The command pins torch's threads in this process; other tests have their own number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_actions_have_names_numbers_and_counts() -> None:
    inputs = ["wait", "left", "right", "forward"]
    assert parse_actions("forward:3,left, 0,2:2", inputs) == [3, 3, 3, 1, 0, 2, 2]
    for text, word in (("jump", "'jump'"), ("4", "'4'"), ("left:", "count"), ("1:0", "count"), ("", "''")):
        refused(lambda text=text: parse_actions(text, inputs), "--headless", word)
    refused(lambda: parse_actions("1:5000,1", inputs), "5000")


@pytest.mark.slow
def test_headless_walks_and_replays(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "new" / "walk.mp4", tmp_path / "again.mp4"
    arguments = ["--headless", "1:3,2", "--steps", 2, "--guidance", 1.5, "--seed", 9, "--out", out]
    tool(monkeypatch, "play.py", model_dir, *arguments)
    recording = json.loads(out.with_suffix(".json").read_text())
    assert (recording["actions"], recording["seed"], recording["start"]) == ([1, 1, 1, 2], 9, "nothing")
    assert recording["settings"] == [{"first": 0, "steps": 2, "guidance": 1.5}]
    weights = json.loads((model_dir / "config.json").read_text())["files"]["model.safetensors"]["sha256"]
    as_in_scores = hashlib.sha256(f'{{"model.safetensors": "{weights}"}}'.encode()).hexdigest()
    assert recording["weights"] == as_in_scores
    tool(monkeypatch, "play.py", model_dir, "--replay", out.with_suffix(".json"), "--out", again)
    assert "4 frames, bit for bit as they were recorded" in capsys.readouterr().out
    assert again.read_bytes() == out.read_bytes()
    recording["frames_sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(recording))
    tool(monkeypatch, "play.py", model_dir, "--replay", tmp_path / "other.json", "--out", again)
    assert "not bit for bit" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_model_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vizdoom")
    tool(monkeypatch, "play.py", "--headless", "forward:2,left", "--out", tmp_path / "walk.mp4")
    recording = json.loads((tmp_path / "walk.json").read_text())
    assert (recording["start"], recording["given"], recording["actions"]) == ("maze", 33, [3, 3, 1])
    monkeypatch.setattr("far_scale.cli.play.DEMO_MODEL", tmp_path / "missing")
    with pytest.raises(SystemExit):
        tool(monkeypatch, "play.py", "--headless", "forward", "--out", tmp_path / "walk.mp4")
    assert "error: MODEL: name a model directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--host", "0.0.0.0"], ["--host 0.0.0.0", "--token"]),
        (["--headless", "1"], ["--out"]),
        (["--out", "x.mp4"], ["--out", "--headless"]),
        (["--headless", "1", "--out", "x.avi"], ["x.avi", ".mp4"]),
        (["--headless", "1", "--replay", "x.json", "--out", "x.mp4"], ["only one"]),
        (["--guidance", "0.5"], ["guidance"]),
        (["--seed", str(2**64)], ["--seed"]),
    ],
)
def test_refusals(
    arguments: list[str],
    words: list[str],
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        tool(monkeypatch, "play.py", model_dir, *arguments, "--no-browser")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.slow
def test_the_server_starts_serves_and_ends(model_dir: Path, tmp_path: Path) -> None:
    log, errors = tmp_path / "log", tmp_path / "errors"
    process = processes.start(
        ROOT / "tools/play.py", model_dir, "--no-browser", "--port", "0", output=log, errors=errors
    )
    try:
        for _ in range(1200):
            address = re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text() if log.exists() else "")
            if address is not None:
                break
            assert process.poll() is None, errors.read_text()
            time.sleep(0.05)
        assert address is not None and "from nothing" in log.read_text()
        for name in ("", *(f"static/{name}" for name in STATIC_TYPES)):
            with urllib.request.urlopen(address[0] + name, timeout=20) as reply:
                assert reply.status == 200 and len(reply.read()) > 1000
        server = PlayServer(small_world(), SETTINGS, Access("127.0.0.1", None), 1)
        taken = serve(server, "127.0.0.1", int(address[1]), announce=print)
        refused(lambda: asyncio.run(taken), f"--port {address[1]}", "name another --port")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and log.read_text().endswith("ended\n") and errors.read_text() == ""
    finally:
        process.kill()


def test_the_page_is_in_the_wheel() -> None:
    assert '"far_scale.play": ["static/*"]' in (ROOT / "setup.py").read_text()
    names = {path.name for path in (ROOT / "far_scale" / "play" / "static").iterdir()}
    assert names == {"index.html", *STATIC_TYPES}
