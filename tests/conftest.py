"""Marks, the order of the files, and what several of them share: recorded episodes and a shard set of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from far_scale.data.demo.episodes import record_episodes
from far_scale.data.encode.plan import encode_videos
from far_scale.data.video.find import find_videos

EPISODE_SEED = 10_900  # held-out seeds, which the autoencoder was not trained on


LONGEST_FIRST = (
    "test_slurm.py",
    "test_drill_kills.py",
    "test_drill_guard.py",
    "test_drill_stops.py",
    "test_training.py",
    "test_restarts.py",
    "test_site.py",
    "test_benchmarks.py",
    "test_sharding.py",
)
"""Files that take longest. With several workers they begin first, or else one of them would end last and alone."""


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
    folder = tmp_path_factory.mktemp("recorded")
    record_episodes(folder, range(EPISODE_SEED, EPISODE_SEED + 8), 24, workers=2)
    return folder


@pytest.fixture(scope="session")
def recorded_shards(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those episodes as a shard set of four shards."""
    out = tmp_path_factory.mktemp("recorded_shards") / "set"
    encode_videos(
        find_videos(recorded),
        out,
        "compact-vizdoom-f8c32",
        dtype="bfloat16",
        samples_per_shard=2,
        actions=4,
        labels=0,
        min_frames=16,
        workers=2,
    )
    return out
