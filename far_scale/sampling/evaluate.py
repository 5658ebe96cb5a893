"""From a model directory and recorded episodes to samples, pictures and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import far_scale.autoencoder
from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelCard, load_model_dir
from far_scale.data.shards import ShardSet
from far_scale.errors import UserError
from far_scale.files import atomic_write, write_json
from far_scale.model import FAR
from far_scale.sampling.episodes import Episodes, decode, shard_episodes, video_episodes
from far_scale.sampling.metrics import compare
from far_scale.sampling.pictures import Pixels, sample_sheet, sample_video
from far_scale.sampling.sampler import roll_out

EPISODES_AT_ONCE = 8
EPISODES_SHOWN = 8  # in the pictures; all count in the figures


def load_for_sampling(folder: str | Path) -> tuple[FAR, ModelCard]:
    """The model of a model directory on the GPU in bfloat16 (its attention kernels take no float32), or on the CPU in
    float32 where there is no GPU."""
    if torch.cuda.is_available():
        return load_model_dir(folder, "cuda", dtype=torch.bfloat16)
    return load_model_dir(folder, "cpu", dtype=torch.float32)


def evaluate(
    model: FAR,
    card: ModelCard,
    shards_or_videos: ShardSet | str | Path,
    given: int,
    frames: int,
    steps: int,
    guidance: float,
    seed: int,
    episodes: int,
    out: str | Path,
) -> dict[str, Any]:
    """Sample `frames` frames after the first `given` ones of some episodes; write what came out.

    Into `out` go samples.safetensors (`latents` `[B, F, C, H, W]`, as the model sees them, float32), samples.png,
    samples.mp4 and, where the frames that really followed are known and one was given, metrics.json. Each file is
    written atomically; files of these names are replaced, and without figures an older metrics.json is removed.

    Args:
        model: of `load_model_dir`; its device and dtype are used. The autoencoder is loaded by the card's name.
        shards_or_videos: an opened shard set, or a path of video files (mp4, npz, ..., or a folder of them).
        given: frames given of each episode, from its start.
        frames: frames to predict of each.
        steps: Euler steps a frame.
        guidance: see `roll_out`.
        seed: of the noise; episode i is clip i.
        episodes: how many to take from the start of the set, at most.

    Returns:
        The settings, the episodes' keys, what the truth is ("recorded pixels", "decoded latents" or None) and, with
        a truth, `prediction` and `repeat_last` (see `compare`). metrics.json holds the same.

    Raises:
        UserError: episodes that do not fit the model, or another autoencoder than the model was trained on.
    """
    if given < 0 or frames < 1 or episodes < 1:
        raise UserError(f"given={given}, frames={frames}, episodes={episodes}: at least 0, 1 and 1 are needed")
    device = next(model.parameters()).device
    autoencoder = load_autoencoder(card, device)
    if isinstance(shards_or_videos, ShardSet):
        data = shard_episodes(shards_or_videos, model.config, card, autoencoder, given, frames, episodes)
    else:
        data = video_episodes(Path(shards_or_videos), model.config, card, autoencoder, given, frames, episodes)

    predicted = _roll_out_all(model, data, frames, steps, guidance, seed)
    latents = torch.cat([data.context, predicted], dim=1)
    pixels = decode(autoencoder, card.scaling.restore(latents))
    truth = data.truth(frames) if given else None
    report: dict[str, Any] = {
        "episodes": data.keys,
        "given": given,
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "model": card.training.model_dump(),
        "truth": None if truth is None else data.pixels_are,
    }
    if truth is not None:
        report |= compare(pixels[:, given:], truth, last_given=data.pixels[:, given - 1])
    _write(Path(out), report, predicted, pixels, data, truth is not None)
    return report


def load_autoencoder(card: ModelCard, device: torch.device) -> Autoencoder:
    """The autoencoder that the model was trained on.

    Raises:
        UserError: there is none of this name, or its weights are others.
    """
    autoencoder = far_scale.autoencoder.load(card.autoencoder.name, device=str(device))
    if autoencoder.weight_hash != card.autoencoder.weight_hash:
        raise UserError(
            f"autoencoder {card.autoencoder.name}: its weights ({autoencoder.weight_hash[:12]}) are not those that the "
            f"model was trained on ({card.autoencoder.weight_hash[:12]}); install the version of far_scale that "
            "exported the model, or train it on latents of this autoencoder"
        )
    return autoencoder


def _roll_out_all(model: FAR, data: Episodes, frames: int, steps: int, guidance: float, seed: int) -> Tensor:
    """All episodes' new frames `[B, F, C, H, W]` on the CPU, a few episodes at a time for the memory's sake."""
    predicted = []
    for first in range(0, len(data.keys), EPISODES_AT_ONCE):
        some = slice(first, min(first + EPISODES_AT_ONCE, len(data.keys)))
        predicted.append(
            roll_out(
                model,
                data.context[some],
                frames,
                steps,
                guidance,
                actions=None if data.actions is None else data.actions[some],
                labels=None if data.labels is None else data.labels[some],
                seed=seed,
                clip_ids=range(some.start, some.stop),
                progress=True,
            ).cpu()
        )
    return torch.cat(predicted)


def _write(
    out: Path, report: dict[str, Any], predicted: Tensor, pixels: Tensor, data: Episodes, truth_is_known: bool
) -> None:
    with atomic_write(out / "samples.safetensors") as beside:
        save_file({"latents": predicted.contiguous()}, beside, metadata={"episodes": json.dumps(data.keys)})
    truth = to_uint8(data.pixels[:EPISODES_SHOWN]) if truth_is_known else None
    shown, given = to_uint8(pixels[:EPISODES_SHOWN]), report["given"]
    sample_sheet(out / "samples.png", truth, shown, given)
    sample_video(out / "samples.mp4", truth, shown, given, data.fps)
    if truth_is_known:
        write_json(out / "metrics.json", report)
    else:
        (out / "metrics.json").unlink(missing_ok=True)  # of an earlier run, it would be taken for this one's


def to_uint8(pixels: Tensor) -> Pixels:
    """`[B, F, 3, h, w]` in 0..1 to uint8 `[B, F, h, w, 3]`."""
    return (pixels * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().numpy()
