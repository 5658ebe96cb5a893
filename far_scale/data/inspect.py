"""Looking at a shard set: its facts in words, its latents' statistics, and a picture of its decoded frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from far_scale import autoencoder as autoencoders
from far_scale.data.manifest import Manifest
from far_scale.data.shards import ShardSet
from far_scale.data.stream import stream
from far_scale.errors import UserError
from far_scale.files import atomic_write


def describe(shard_set: ShardSet) -> str:
    """A shard set in a few lines: counts, sizes, conditions, autoencoder, statistics of the latents."""
    manifest = shard_set.manifest
    shards, frames, size = len(manifest.shards), manifest.frames, sum(shard.bytes for shard in manifest.shards)
    info, shape = manifest.autoencoder, " x ".join(map(str, manifest.latent_shape))
    rate = "of several frame rates" if manifest.fps is None else f"at {manifest.fps:g} frames/s"
    return "\n".join(
        [
            f"{shard_set.folder}: {shards} shards, {manifest.samples} samples, {frames} frames, {size / 1e6:.1f} MB",
            f"samples:     {frames / manifest.samples:.1f} frames on average, {manifest.min_frames} at least, {rate}",
            f"latents:     {shape} (C x H x W) {manifest.latent_dtype}",
            f"conditions:  {manifest.actions or 'no'} actions, {manifest.labels or 'no'} labels",
            f"autoencoder: {info.name}, scaling factor {info.scaling_factor:g}, weights {info.weight_hash[:16]}",
            f"channels:    mean {min(manifest.mean):.3f} to {max(manifest.mean):.3f}, "
            f"deviation {min(manifest.std):.3f} to {max(manifest.std):.3f}",
        ]
    )


def measure(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population deviation per channel, float64, of all latents as a WebDataset reader finds them."""
    channels = Manifest.read(folder).latent_shape[0]
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for sample in stream(folder):
        latents = sample.latents.double()
        count += latents[:, 0].numel()
        total += latents.sum(dim=(0, 2, 3)).numpy()
        squares += latents.square().sum(dim=(0, 2, 3)).numpy()
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0))


def verify(shard_set: ShardSet) -> None:
    """Check every byte, count and statistic against the manifest.

    Raises:
        UserError: the first thing that is wrong.
    """
    shard_set.verify()
    manifest = shard_set.manifest
    mean, std = measure(shard_set.folder)
    # Sums in another order differ by rounding alone, which is far below a thousandth of the deviation.
    tolerance = 1e-3 * max(manifest.std) + 1e-12
    if max(np.abs(mean - manifest.mean).max(), np.abs(std - manifest.std).max()) > tolerance:
        raise UserError(
            f"{shard_set.folder}: the manifest's mean and std are not those of its latents; encode the set again"
        )


def contact_sheet(shard_set: ShardSet, samples: int = 8, frames: int = 8) -> Image.Image:
    """Decoded frames on a sheet: a row each for samples from all over the set, frames from all over the sample.

    Raises:
        UserError: the autoencoder that made the latents is not at hand.
    """
    autoencoder = matching_autoencoder(shard_set.manifest)
    ends = np.cumsum(shard_set.samples_per_shard)
    rows = []
    for number in np.linspace(0, ends[-1] - 1, min(samples, int(ends[-1]))).round().astype(int):
        shard = int(np.searchsorted(ends, number, side="right"))
        latents = shard_set.read(shard, int(number - ends[shard] + shard_set.samples_per_shard[shard])).latents
        chosen = torch.from_numpy(np.linspace(0, len(latents) - 1, frames).round().astype(int))
        with torch.inference_mode():
            pixels = autoencoder.decode(latents[chosen].float())  # [F, 3, H, W] in [-1, 1]
        row = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        rows.append(np.concatenate(list(np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)))), axis=1))
    return Image.fromarray(np.concatenate(rows, axis=0))


def matching_autoencoder(manifest: Manifest) -> autoencoders.Autoencoder:
    """The autoencoder that made the latents of a set.

    Raises:
        UserError: it cannot be loaded by its name, or its weights are others now.
    """
    autoencoder = autoencoders.load(manifest.autoencoder.name)
    if autoencoder.weight_hash != manifest.autoencoder.weight_hash:
        raise UserError(
            f"autoencoder {autoencoder.name}: its weights are {autoencoder.weight_hash[:16]}, but the shard set was "
            f"encoded with {manifest.autoencoder.weight_hash[:16]}; encode the videos again"
        )
    return autoencoder


def save_contact_sheet(shard_set: ShardSet, path: str | Path) -> None:
    """Write the contact sheet as a PNG, atomically."""
    sheet = contact_sheet(shard_set)
    with atomic_write(path) as beside:
        sheet.save(beside, format="PNG")
