"""The undisturbed run that every drill is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.drill import DRILL
from harness.launch import small_recipe
from harness.once import make_once
from harness.processes import start_training


@pytest.fixture(scope="session")
def undisturbed(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing happened to."""

    def train(folder: Path) -> None:
        arguments = small_recipe(recorded_shards, folder / "run", *DRILL)
        assert start_training(2, arguments, folder / "out").wait() == [0, 0]

    return make_once(tmp_path_factory, "undisturbed", train) / "run"
