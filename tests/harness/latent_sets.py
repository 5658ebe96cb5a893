"""Shard sets for the tests: every latent value tells which sample, frame and channel it belongs to."""

from __future__ import annotations

from pathlib import Path

import torch

from far_scale.data.shards.manifest import AutoencoderInfo, Manifest
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.writer import ShardSetSpec, ShardWriter

CHANNELS, SIDE = 4, 2
FACTS = ShardSetSpec(
    latent_shape=(CHANNELS, SIDE, SIDE),
    latent_dtype="bfloat16",
    autoencoder=AutoencoderInfo(name="some-autoencoder", weight_hash="0" * 64, scaling_factor=0.5),
    actions=4,
    labels=3,
)


def make_sample(number: int, frames: int) -> Sample:
    """A sample of values that bfloat16 holds exactly: frame f is f + channel / 8, and `number` at the first place."""
    latents = torch.arange(frames).view(-1, 1, 1, 1) + torch.arange(CHANNELS).view(1, -1, 1, 1) / 8
    latents = latents.repeat(1, 1, SIDE, SIDE)
    latents[:, :, 0, 0] = number
    actions = (torch.arange(frames) * 7 + number) % 4
    return Sample(f"clip_{number:03d}", latents.bfloat16(), actions, number % 3, 8.0, f"videos/clip {number}.mp4")


def write_set(folder: Path, frames: list[int], samples_per_shard: int, facts: ShardSetSpec = FACTS) -> Manifest:
    """A shard set of `make_sample(i, frames[i])`; what the facts do not want is dropped."""
    with ShardWriter(folder, facts, samples_per_shard) as writer:
        for number, count in enumerate(frames):
            sample = make_sample(number, count)
            actions, label = sample.actions if facts.actions else None, sample.label if facts.labels else None
            writer.write(Sample(sample.key, sample.latents, actions, label, sample.fps, sample.source))
    return Manifest.read(folder)


def read_all(folder: Path) -> list[Sample]:
    """Every sample of a set, in order."""
    shard_set = ShardSet.open(folder)
    return [shard_set.read(s, n) for s, count in enumerate(shard_set.samples_per_shard) for n in range(count)]
