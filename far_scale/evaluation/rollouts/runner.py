"""Samples recorded episodes with a model directory's model, and writes samples, pictures and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import far_scale.autoencoder
from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelMetadata, load_model_dir
from far_scale.data.shards.shard_set import ShardSet
from far_scale.evaluation.rollouts.episodes import EpisodeSelection, load_episodes
from far_scale.evaluation.rollouts.rollout import Rollout
from far_scale.model import FAR
from far_scale.model.hub import find_model
from far_scale.sampling.config import SamplingConfig
from far_scale.utils.errors import UserError
from far_scale.utils.io import write_json


def load_for_sampling(source: str | Path) -> tuple[FAR, ModelMetadata]:
    """Load a model on the GPU in bfloat16 (its attention kernels take no float32), or without a GPU on the CPU in
    float32, in whatever type its weights are stored.

    Args:
        source: a model directory, or a repository of the hub (`find_model`).

    Raises:
        UserError: as `find_model` and `load_model_dir`.
    """
    folder = find_model(source)
    if torch.cuda.is_available():
        return load_model_dir(folder, "cuda", dtype=torch.bfloat16)
    return load_model_dir(folder, "cpu", dtype=torch.float32)


def load_autoencoder(metadata: ModelMetadata, device: torch.device, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder that the model was trained on, computing in `dtype`.

    Raises:
        UserError: there is none of this name, or its weights are others.
    """
    expected = metadata.autoencoder
    autoencoder = far_scale.autoencoder.load(expected.name, device=str(device), dtype=dtype)
    if autoencoder.weight_hash != expected.weight_hash:
        raise UserError(
            f"autoencoder {expected.name}: its weights ({autoencoder.weight_hash[:12]}) are not those that the "
            f"model was trained on ({expected.weight_hash[:12]}); install the version of far_scale that "
            "exported the model, or train it on latents of this autoencoder"
        )
    return autoencoder


def prepare_rollout(
    model: FAR,
    metadata: ModelMetadata,
    source: ShardSet | str | Path,
    sampling: SamplingConfig,
    given: int | None,
    episodes: int,
) -> Rollout:
    """Check the settings, read the episodes and encode the given frames.

    Args:
        model: from `load_model_dir`; its device and dtype are used. Its autoencoder is loaded by name.
        source: a shard set, opened or its folder; or a video file, or a folder of them.
        sampling: the settings; at guidance -1, actions and labels are not read. Episode i is clip i.
        given: frames given of each episode, from its start; None for the model's window, or for what the predicted
            frames leave of a shorter episode (at least 1).
        episodes: how many to take from the start of the source, at most.

    Raises:
        UserError: settings or episodes that do not fit the model, or another autoencoder than the model's.
    """
    if (given is not None and given < 0) or sampling.frames < 1 or episodes < 1:
        raise UserError(f"given={given}, frames={sampling.frames}, episodes={episodes}: at least 0, 1 and 1 are needed")
    sampling.check(model.config)
    autoencoder = load_autoencoder(metadata, next(model.parameters()).device)
    selection = EpisodeSelection(given, sampling.frames, episodes, sampling.conditioned)
    loaded = load_episodes(source, model.config, metadata, autoencoder, selection)
    return Rollout(model, metadata, autoencoder, loaded, sampling)


def evaluate_rollout(
    model: FAR,
    metadata: ModelMetadata,
    source: ShardSet | str | Path,
    sampling: SamplingConfig,
    given: int | None,
    episodes: int,
    out: str | Path,
) -> dict[str, Any]:
    """Prepare and run a rollout, and write its results into a folder.

    `out` gets samples.safetensors (`latents` `[B, F, C, H, W]`, scaled, float32), samples.png, samples.mp4 and, where
    frames are given and their continuation is known, metrics.json. Each file is written atomically and replaces an
    older one; without metrics an older metrics.json is removed.

    Returns:
        See `Rollout.run`. metrics.json holds the same.

    Raises:
        UserError: as `prepare_rollout`; nothing is written then.
    """
    out = Path(out)
    rollout = prepare_rollout(model, metadata, source, sampling, given, episodes)
    report = rollout.run(out / "samples.mp4", out / "samples.png", out / "samples.safetensors")
    if report["truth"] is None:
        (out / "metrics.json").unlink(missing_ok=True)  # an earlier rollout's would be taken for this one's
    else:
        write_json(out / "metrics.json", report)
    return report


def write_rollout(rollout: Rollout, video: Path) -> dict[str, Any]:
    """Run a rollout into VIDEO.mp4, its contact sheet VIDEO.png and its report VIDEO.json, which is returned."""
    report = rollout.run(video, video.with_suffix(".png"))
    write_json(video.with_suffix(".json"), report)
    return report
