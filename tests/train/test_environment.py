"""environment.json: what a run was started with, and what of it has changed since the start before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.distributed.process_group import Processes
from far_scale.slurm.snapshot import make_snapshot
from far_scale.train import environment
from far_scale.train.environment import Node, differences_of, record_environment
from far_scale.utils import code_version
from far_scale.utils.code_version import CodeVersion, read_checkout
from far_scale.utils.event_log import EventLog, read_events
from far_scale.utils.io import read_json, read_json_lines

ALONE = Processes(0, 1, torch.device("cpu"))


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=somebody", "-c", "user.email=s@b"]
    done = subprocess.run(["git", *author, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "far_scale").mkdir(parents=True)
    (folder / "far_scale/__init__.py").write_text("one\ntwo\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_code_of_a_checkout(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert read_checkout(checkout) == CodeVersion(head)
    (checkout / "far_scale/__init__.py").write_text("one\nthree\nfour\n")
    found = read_checkout(checkout)
    assert found.commit == head and "+three\n" in found.diff and found.diff_lines == 3 and not found.diff_cut
    (checkout / "far_scale/__init__.py").write_text("many\n" * 300_000)
    found = read_checkout(checkout)
    assert len(found.diff) == code_version.MAX_DIFF_BYTES and found.diff_cut
    installed = checkout / ".venv/site-packages"  # in a checkout, and none of its files
    (installed / "far_scale").mkdir(parents=True)
    (installed / "far_scale/__init__.py").write_text("")
    assert read_checkout(installed) == CodeVersion() == read_checkout(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_checkout(checkout) == CodeVersion()


def test_a_snapshot_knows_the_code_that_it_is_a_copy_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = CodeVersion("a" * 40, "+line\n", True)
    monkeypatch.setattr(code_version, "read_checkout", lambda _: recorded)
    snapshot = make_snapshot(load_recipe("demo_cpu", [f"run_dir={tmp_path / 'run'}"]), ["demo_cpu"], "1")
    ask = "from far_scale.utils.code_version import running_code; print(running_code())"
    path = {**os.environ, "PYTHONPATH": str(snapshot)}
    done = subprocess.run([sys.executable, "-c", ask], env=path, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(recorded), done.stderr


def test_no_secret_and_no_other_variable_is_kept() -> None:
    kept = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"}
    left = [
        "WANDB_API_KEY",
        "SLURM_JWT",
        "HF_TOKEN",
        "HOME",
        "NCCL_AUTH_TOKEN",
        "MY_NCCL_DEBUG",
        "AWS_SECRET_ACCESS_KEY",
    ]
    assert environment.variables({**dict.fromkeys(left, "secret"), **kept}) == dict(sorted(kept.items()))
    address = {"TORCH_HOME": "https://somebody:secret@host/at@home"}
    assert environment.variables(address) == {"TORCH_HOME": "https://host/at@home"}


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("nothing of it", None),
    ],
)
def test_the_driver(tmp_path: Path, line: str, version: str | None) -> None:
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 11.4.0 (Ubuntu)\n")
    assert environment._driver(tmp_path / "version") == version
    assert environment._driver(tmp_path / "none") is None


def changed(change: Callable[[dict[str, Any]], object]) -> list[str]:
    nodes = [Node(host, "550.54.15", "NVIDIA H100 80GB HBM3") for host in ("n0", "n0", "n1", "n1")]
    before = environment.environment(nodes, 0)
    before["variables"] = {"NCCL_DEBUG": "WARN", "SLURM_JOB_ID": "1"}
    before["packages"] = {"torch": "2.12.0", "pyyaml": "6.0"}
    before["code"] = {"far_scale": "0.1.0", "commit": "a" * 40, "diff": "", "diff_cut": False}
    now = json.loads(json.dumps(before))
    change(now)
    return differences_of(before, now)


@pytest.mark.slow
def test_differences() -> None:
    assert changed(lambda now: now.update(time="later", step=7)) == []
    assert changed(lambda now: now["variables"].update(SLURM_JOB_ID="2")) == []
    assert changed(lambda now: now["nodes"].update(n2=now["nodes"].pop("n1"))) == [], "as after any requeue"
    assert changed(lambda now: now["packages"].update(torch="2.13.0", new="1")) == [
        "torch 2.12.0 -> 2.13.0",
        "new None -> 1",
    ]
    assert changed(lambda now: now["variables"].clear()) == ["NCCL_DEBUG WARN -> None"]
    assert changed(lambda now: now.update(cuda="12.9")) == [f"CUDA {torch.version.cuda} -> 12.9"]
    assert changed(lambda now: now["nodes"]["n1"].update(driver="570.86.15", devices=["NVIDIA H200"])) == [
        "driver 550.54.15 -> 550.54.15, 570.86.15",
        "devices 4 x NVIDIA H100 80GB HBM3 -> 2 x NVIDIA H100 80GB HBM3, 1 x NVIDIA H200",
    ]
    diff = "--- a/x\n+++ b/x\n+one\n-two\n"
    assert changed(lambda now: now["code"].update(commit="b" * 40, diff=diff)) == [
        "code commit aaaaaaaaaaaa -> commit bbbbbbbbbbbb (with 2 changed lines)"
    ]
    assert changed(lambda now: now["code"].update(commit=None)) == ["code commit aaaaaaaaaaaa -> unknown"]


def test_each_start_leaves_one_and_lists_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(step: int) -> dict[str, Any]:
        record_environment(tmp_path, ALONE, EventLog(tmp_path, is_main_process=True), step)
        return read_json(tmp_path / "environment.json", "environment")

    first = start(0)
    assert first["packages"]["torch"] == torch.__version__ and first["python"] in sys.version and first["ranks"] == 1
    assert start(3)["step"] == 3 and not read_events(tmp_path)
    assert not (tmp_path / "environments.jsonl").exists()
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr(environment, "packages", lambda: {f"p{number}": "2" for number in range(20)})
    start(5)
    (event,) = read_events(tmp_path)
    assert event["event"] == "environment" and event["step"] == 5 and "NCCL_DEBUG None -> INFO" in event["changes"]
    assert event["text"].startswith("changed since the last start: p0 None -> 2; ") and " more" in event["text"]
    (earlier,) = read_json_lines(tmp_path / "environments.jsonl")
    assert earlier is not None and earlier["step"] == 3
    (tmp_path / "environment.json").write_text('{"packages": 3}')  # of nobody's making
    assert start(8)["step"] == 8 and len(read_events(tmp_path)) == 1
    other = read_json(tmp_path / "environment.json", "environment")
    other["code"]["later"] = 1  # of a version that knows more
    (tmp_path / "environment.json").write_text(json.dumps(other))
    assert start(8)["code"].keys() == other["code"].keys() - {"later"} and len(read_events(tmp_path)) == 1
    (tmp_path / "environment.json").unlink()
    (tmp_path / "environment.json").mkdir()
    record_environment(tmp_path, ALONE, EventLog(tmp_path, is_main_process=True), 9)
    assert "environment.json: not written (" in capfd.readouterr().err
