"""Trains the compact autoencoder on episodes of the demo world that it records itself."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor
from tqdm import tqdm

from far_scale.autoencoder import Autoencoder, load
from far_scale.autoencoder.compact import CompactAutoencoder, CompactConfig
from far_scale.data.demo import record_episodes
from far_scale.data.videos import read_video
from far_scale.errors import UserError
from far_scale.files import atomic_write, write_json
from far_scale.randomness import generator
from far_scale.recipe_report import explain
from far_scale.recipe_sections import Count, Section
from far_scale.recipe_yaml import read_document
from far_scale.tensor_files import save_tensors

_FRAMES_FOR_START = 1024  # whose patches the principal components are of
_ABSOLUTE_SHARE = 0.05  # of the absolute beside the squared error, which keeps edges crisp
_FINAL_FACTOR = 0.01  # of the learning rate, at the end of the cosine

Seeds = Annotated[tuple[int, int], Field(strict=False)]


class ModelSection(Section):
    """The network's sizes, see `CompactConfig`."""

    channels: Count = 32
    """Latent channels."""
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Features at a quarter of the resolution."""
    encoder_depth: Count = 1
    """Residual blocks at each of the encoder's two resolutions."""
    decoder_depth: Count = 2
    """Residual blocks at each of the decoder's two resolutions."""


class DataSection(Section):
    """The episodes that are recorded, from the first seed to before the second one."""

    frames: Count
    """Frames of an episode."""
    train_seeds: Seeds
    """Seeds of the episodes to train on."""
    heldout_seeds: Seeds
    """Seeds of the episodes that the PSNR is measured on."""


class TrainSection(Section):
    """The optimisation: AdamW without decay, linear warm-up, then a cosine."""

    steps: Count
    """Optimizer steps."""
    batch: Count
    """Frames of a step."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    latent_noise: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the latents in training, in units of each channel's deviation; the decoder learns to bear it."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the convolutions in training (autocast); weights are float32."""


class AutoencoderRecipe(Section):
    """All that the training of an autoencoder is told."""

    name: str
    """What recipes and manifests will call the autoencoder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, batches and noise."""
    model: ModelSection = ModelSection()
    data: DataSection
    train: TrainSection


def load_autoencoder_recipe(path: str | Path) -> AutoencoderRecipe:
    """Read an autoencoder's recipe.

    Raises:
        UserError: not there, unknown keys, wrong types, no seeds, or seeds that are in both lists.
    """
    document = read_document(path)
    try:
        recipe = AutoencoderRecipe.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, document, AutoencoderRecipe) from None
    train, heldout = range(*recipe.data.train_seeds), range(*recipe.data.heldout_seeds)
    for key, seeds in (("train_seeds", train), ("heldout_seeds", heldout)):
        if not seeds or seeds[0] < 0:
            where = f"{document.place(('data', key))}: data.{key}"
            raise UserError(f"{where}: no seeds from {seeds.start} to before {seeds.stop}; write [first, end]")
    if set(train) & set(heldout):
        where = f"{document.place(('data', 'heldout_seeds'))}: data.heldout_seeds"
        raise UserError(f"{where}: some are in data.train_seeds too; held-out episodes must be others")
    return recipe


def train_autoencoder(recipe: AutoencoderRecipe, out: Path, episodes: Path, workers: int, command: str) -> Path:
    """Record the episodes, train, and write `out`/NAME.safetensors (float16) and its card NAME.json; returns the first.

    The card holds `command`, seeds, steps, date, the PSNR of the float16 weights on the held-out episodes, and the
    latents' mean and deviation per channel and over all. Episodes already in `episodes` are not recorded again.

    Args:
        recipe: what to train.
        out: folder for the weights and the card.
        episodes: folder for the recorded episodes.
        workers: processes that record.
        command: the command line that the card tells.

    Raises:
        UserError: vizdoom is missing, or the disk is full.
    """
    train, heldout = (
        read_frames(record_episodes(episodes, range(*seeds), recipe.data.frames, workers))
        for seeds in (recipe.data.train_seeds, recipe.data.heldout_seeds)
    )
    network = fit(recipe, train)
    path = out / f"{recipe.name}.safetensors"
    with atomic_write(path) as beside:
        save_tensors({key: tensor.half().contiguous() for key, tensor in network.state_dict().items()}, beside)
    # The first card only makes the file loadable: the true one is measured on the very weights that were written.
    card: dict[str, Any] = {"name": recipe.name, "config": asdict(network.config), "scaling_factor": 1.0}
    write_json(path.with_suffix(".json"), card)
    autoencoder = load(path)
    latents = torch.cat([autoencoder.encode(to_pixels(part)) for part in train[::4].split(256)])
    card |= {
        "scaling_factor": 1 / latents.std().item(),
        "psnr_db": round(psnr(autoencoder, heldout), 2),
        "latent_std": latents.std().item(),
        "channel_mean": latents.mean((0, 2, 3)).tolist(),
        "channel_std": latents.std((0, 2, 3)).tolist(),
        "command": command,
        "recipe": recipe.model_dump(mode="json"),
        "weights_dtype": "float16",
        "weights_sha256": autoencoder.weight_hash,
        "date": datetime.date.today().isoformat(),
    }
    write_json(path.with_suffix(".json"), card)
    return path


def fit(recipe: AutoencoderRecipe, frames: Tensor) -> CompactAutoencoder:
    """Train a network on `frames` uint8 [N, 3, H, W]."""
    settings = recipe.train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = CompactAutoencoder(CompactConfig(**recipe.model.model_dump()))
    chosen = generator(recipe.seed, "patches").permutation(len(frames))[:_FRAMES_FOR_START]
    network.start_from_patches(to_pixels(frames[torch.from_numpy(chosen)]))
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    progress = tqdm(range(settings.steps), desc="train", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        random = generator(recipe.seed, "batch", step)
        pixels = to_pixels(frames[torch.from_numpy(random.integers(0, len(frames), settings.batch))])
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            latents = network.encode(pixels)
            if settings.latent_noise > 0:
                deviation = latents.detach().float().std((0, 2, 3), keepdim=True)
                noise = torch.from_numpy(random.standard_normal(latents.shape, np.float32)).to(device)
                latents = latents + settings.latent_noise * deviation * noise
            error = network.decode(latents).float() - pixels
        squared = error.square().mean()
        loss = squared + _ABSOLUTE_SHARE * error.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix_str(f"{10 * math.log10(4 / squared.item()):.2f} dB with noise")
    return network.eval()


def psnr(autoencoder: Autoencoder, frames: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the reconstructions of `frames` uint8 [N, 3, H, W], the mean over frames.

    Per frame 10 log10(255^2 / mean squared error), of the reconstruction rounded to the 256 values of a picture.
    """
    ratios = []
    for part in frames.split(64):
        seen = ((autoencoder.decode(autoencoder.encode(to_pixels(part))) + 1) * 127.5).round().cpu()
        error = (seen - part.float()).square().mean((1, 2, 3))
        ratios.append(10 * torch.log10(255**2 / error.clamp_min(1e-6)))
    return torch.cat(ratios).mean().item()


def read_frames(paths: Sequence[Path]) -> Tensor:
    """All frames of the videos of one size at `paths`, uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.concatenate([read_video(path).frames for path in paths])).permute(0, 3, 1, 2)


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1


def _schedule(step: int, settings: TrainSection) -> float:
    """The learning rate at `step`, as a share of its peak."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return warm * (_FINAL_FACTOR + (1 - _FINAL_FACTOR) * cosine)
