"""The undisturbed run that every drill is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.drill import DRILL
from harness.launch import small_recipe
from harness.processes import start_training


@pytest.fixture(scope="session")
def undisturbed(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start_training(2, small_recipe(recorded_shards, run, *DRILL), run.parent / "out").wait() == [0, 0]
    return run
