"""From a model directory and recorded episodes to samples, pictures and figures."""

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
from far_scale.sampling.sampler import check_context_noise, check_guidance, check_steps
from far_scale.utils.errors import UserError
from far_scale.utils.io import write_json
from far_scale.utils.rng import MAX_SEED


def load_for_sampling(folder: str | Path) -> tuple[FAR, ModelMetadata]:
    """The model of a model directory on the GPU in bfloat16 (its attention kernels take no float32), or on the CPU in
    float32 where there is no GPU."""
    if torch.cuda.is_available():
        return load_model_dir(folder, "cuda", dtype=torch.bfloat16)
    return load_model_dir(folder, "cpu", dtype=torch.float32)


def load_autoencoder(card: ModelMetadata, device: torch.device, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder that the model was trained on, which then computes in `dtype`.

    Raises:
        UserError: there is none of this name, or its weights are others.
    """
    autoencoder = far_scale.autoencoder.load(card.autoencoder.name, device=str(device), dtype=dtype)
    if autoencoder.weight_hash != card.autoencoder.weight_hash:
        raise UserError(
            f"autoencoder {card.autoencoder.name}: its weights ({autoencoder.weight_hash[:12]}) are not those that the "
            f"model was trained on ({card.autoencoder.weight_hash[:12]}); install the version of far_scale that "
            "exported the model, or train it on latents of this autoencoder"
        )
    return autoencoder


def prepare_rollout(
    model: FAR,
    card: ModelMetadata,
    source: ShardSet | str | Path,
    given: int | None,
    frames: int,
    steps: int,
    guidance: float,
    seed: int,
    episodes: int,
    context_noise: float = 0.0,
) -> Rollout:
    """Read and encode all that sampling needs.

    Args:
        model: of `load_model_dir`; its device and dtype are used. The autoencoder is loaded by the card's name.
        source: a shard set, opened or the path of its folder; or a video file, or a folder of them.
        given: frames given of each episode, from its start; None for the model's window, or for what `frames` leaves
            of a shorter episode (at least 1).
        frames: frames to predict of each.
        steps: Euler steps a frame.
        guidance: see `predict_frames`; at -1, actions and labels are not read.
        seed: of the noise; episode i is clip i.
        episodes: how many to take from the start of the source, at most.
        context_noise: see `predict_frames`.

    Raises:
        UserError: episodes that do not fit the model, or another autoencoder than the model was trained on.
    """
    if (given is not None and given < 0) or frames < 1 or episodes < 1:
        raise UserError(f"given={given}, frames={frames}, episodes={episodes}: at least 0, 1 and 1 are needed")
    check_steps(steps)
    check_guidance(model.config, guidance)
    check_context_noise(model.config, context_noise)
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed: {seed} is not from 0 to 2^64 - 1; give one that is")
    autoencoder = load_autoencoder(card, next(model.parameters()).device)
    wanted = EpisodeSelection(given, frames, episodes, conditioned=guidance != -1)
    data = load_episodes(source, model.config, card, autoencoder, wanted)
    return Rollout(model, card, autoencoder, data, frames, steps, guidance, seed, context_noise)


def evaluate_rollout(
    model: FAR,
    card: ModelMetadata,
    source: ShardSet | str | Path,
    given: int | None,
    frames: int,
    steps: int,
    guidance: float,
    seed: int,
    episodes: int,
    out: str | Path,
    context_noise: float = 0.0,
) -> dict[str, Any]:
    """Sample as `prepare_rollout` is told to, into a folder.

    Into `out` go samples.safetensors (`latents` `[B, F, C, H, W]`, as the model sees them, float32), samples.png,
    samples.mp4 and, where frames that really followed are known and one was given, metrics.json. Each file is
    written atomically; files of these names are replaced, and without figures an older metrics.json is removed.

    Returns:
        See `RollOut.run`. metrics.json holds the same.

    Raises:
        UserError: as `prepare_rollout`; nothing is written then.
    """
    out = Path(out)
    roll_out = prepare_rollout(model, card, source, given, frames, steps, guidance, seed, episodes, context_noise)
    report = roll_out.run(out / "samples.mp4", out / "samples.png", out / "samples.safetensors")
    if report["truth"] is None:
        (out / "metrics.json").unlink(missing_ok=True)  # of an earlier run, it would be taken for this one's
    else:
        write_json(out / "metrics.json", report)
    return report


def write_rollout(roll_out: Rollout, video: Path) -> dict[str, Any]:
    """Run `roll_out` into VIDEO.mp4, its sheet VIDEO.png and its report VIDEO.json, which is what is returned."""
    report = roll_out.run(video, video.with_suffix(".png"))
    write_json(video.with_suffix(".json"), report)
    return report
