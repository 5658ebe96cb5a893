"""Marks, the order of the files, the start of xdist's processes, and recorded episodes with a shard set of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from far_scale.data.demo.episodes import record_episodes
from far_scale.data.encode.plan import encode_videos
from far_scale.data.video.find import find_videos
from harness.once import make_once
from harness.processes import forked_python, start_fork_server

EPISODE_SEED = 10_900  # held-out seeds, which the autoencoder was not trained on


LONGEST_FIRST = (
    "test_slurm.py",
    "test_drill_kills.py",
    "test_site.py",
    "test_operators.py",
    "test_drill_stops.py",
    "test_drill_guard.py",
    "test_training.py",
    "test_benchmarks.py",
    "test_restarts.py",
    "test_sharding.py",
    "test_train_autoencoder.py",
    "test_step_guard.py",
    "test_sequence_parallel.py",
    "test_ledger.py",
    "test_validation.py",
)
"""Files that take longest. With several workers they begin first, or else one of them would end last and alone."""


def pytest_configure(config: pytest.Config) -> None:
    """With several processes, start the fork server, which they share, and fork them from it, too."""
    if config.getoption("numprocesses", None) and not torch.cuda.is_available():
        start_fork_server()
        config.option.tx = [f"popen//python={forked_python()}"] * len(config.option.tx)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; skip tests marked `gpu`, with the reason, where there is no GPU."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))  # stable, so each file keeps its order
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recorded VizDoom episodes of 24 frames, as .npz files."""

    def record(folder: Path) -> None:
        record_episodes(folder, range(EPISODE_SEED, EPISODE_SEED + 8), 24, workers=2)

    return make_once(tmp_path_factory, "recorded", record)


@pytest.fixture(scope="session")
def recorded_shards(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those episodes as a shard set of four shards."""

    def encode(folder: Path) -> None:
        encode_videos(
            find_videos(recorded),
            folder / "set",
            "compact-vizdoom-f8c32",
            dtype="bfloat16",
            samples_per_shard=2,
            actions=4,
            labels=0,
            min_frames=16,
            workers=2,
        )

    return make_once(tmp_path_factory, "recorded_shards", encode) / "set"
