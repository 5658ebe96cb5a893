"""`--profile`: a trace of the chosen steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from far_scale.distributed.process_group import Processes
from far_scale.train.profiler import Profiler, parse_steps
from far_scale.utils.errors import UserError
from harness.launch import small_recipe
from harness.processes import launch


def test_steps_are_one_or_a_first_and_a_last() -> None:
    assert parse_steps("20") == range(20, 21)
    assert parse_steps("20:22") == range(20, 23)
    for wrong in ("", "0", "5:4", "x", "1:2:3"):
        with pytest.raises(UserError, match="first and the last as in 20:22"):
            parse_steps(wrong)
    assert parse_steps("1:2", 2) == range(1, 3)
    for late in ("3", "2:3", "5:6"):
        with pytest.raises(UserError, match=f"--profile {late}: the run ends with step 2"):
            parse_steps(late, 2)


def test_steps_that_were_done_before_are_not_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = Processes(0, 1, torch.device("cpu"))
    profiler = Profiler(range(2, 5), tmp_path, alone, done=3)
    assert "resumes from step 3, so steps 2 to 4 are not traced" in capsys.readouterr().err
    with profiler.trace(4):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trace_of_the_chosen_steps(recorded_shards: Path, tmp_path: Path) -> None:
    recipe = small_recipe(recorded_shards, tmp_path / "run", "train.steps=4", "optimizer.warmup_steps=1")
    finished = launch(1, "-m", "far_scale.train", *recipe, "--profile", "2:3")
    assert finished.returncode == 0, finished.stderr[-2000:]
    with gzip.open(tmp_path / "run/profile/steps-2-3.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    layers, lanes_of_this_rank, steps = 2, 2, 2
    assert names.count("far_scale::frame_attention") >= layers * lanes_of_this_rank * steps
    assert "attention: cpu" in finished.stdout + finished.stderr
