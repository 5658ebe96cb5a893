"""Inspecting a shard set: a summary, a full check, repairing the manifest, and a contact sheet of decoded frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from far_scale import autoencoder as autoencoders
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards.errors import NotReadableError
from far_scale.data.shards.index import ChannelSums, statistics
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.shards.mds import STREAMING_INDEX_NAME, has_streaming_index, write_streaming_index
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.table import ShardTable
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write

_MAX_CLASS_NAMES = 10  # in the summary


def describe(shard_set: ShardSet) -> str:
    """Summary in a few lines: counts, sizes, conditions, autoencoder, statistics of the latents."""
    manifest = shard_set.manifest
    shards, frames, size = len(manifest.shards), manifest.frames, sum(shard.bytes for shard in manifest.shards)
    info, shape = manifest.autoencoder, " x ".join(map(str, manifest.latent_shape))
    files = {"tar": "tars, for WebDataset", "mds": "MDS, for mosaicml-streaming"}[manifest.shard_format]
    if manifest.adopted is not None:
        first = shard_set.name_of(0)
        files += (
            f", adopted where they lie (the first: {first}), {manifest.adopted.latents} as {manifest.adopted.layout}"
        )
    rate = "of several frame rates" if manifest.fps is None else f"at {manifest.fps:g} frames/s"
    return "\n".join(
        [
            f"{shard_set.folder}: {shards} shards, {manifest.samples} samples, {frames} frames, {size / 1e6:.1f} MB",
            f"files:       {files}",
            f"samples:     {frames / manifest.samples:.1f} frames on average, {manifest.min_frames} at least, {rate}",
            f"latents:     {shape} (C x H x W) {manifest.latent_dtype}",
            f"conditions:  {manifest.actions or 'no'} actions, {manifest.labels or 'no'} labels{_classes(manifest)}",
            f"autoencoder: {info.name}, scaling factor {info.scaling_factor:g}, weights {info.weight_hash[:16]}",
            f"channels:    mean {min(manifest.mean):.3f} to {max(manifest.mean):.3f}, "
            f"std {min(manifest.std):.3f} to {max(manifest.std):.3f}",
        ]
    )


def _classes(manifest: Manifest) -> str:
    if manifest.classes is None:
        return ""
    more = ", ..." if len(manifest.classes) > _MAX_CLASS_NAMES else ""
    return f": {', '.join(f'{name!r:.80}' for name in manifest.classes[:_MAX_CLASS_NAMES])}{more}"


@dataclass(frozen=True)
class Findings:
    """Result of reading every byte of a shard set.

    Attributes:
        broken: what is wrong with a broken shard, by shard number.
        sums: of the latents of each intact shard, by shard number.
        rates: frame rates of the intact shards; None for a shard with several.
    """

    broken: dict[int, str]
    sums: dict[int, ChannelSums]
    rates: set[float | None]


def examine(shard_set: ShardSet) -> Findings:
    """Read every byte of every shard and compare it with its index and the manifest.

    Raises:
        UserError: the shards cannot be read with these options, such as without a cache.
    """
    findings = Findings({}, {}, set())
    for number in tqdm(range(len(shard_set.manifest.shards)), desc="verify", unit="shard"):
        try:
            index = shard_set.verify_shard(number)
        except NotReadableError:
            raise
        except UserError as problem:
            findings.broken[number] = str(problem)
        else:
            findings.sums[number] = index.sums
            findings.rates.add(index.fps)
    return findings


def verify(shard_set: ShardSet) -> None:
    """Check every byte, count and statistic against the manifest.

    Raises:
        UserError: names the first broken shard and counts them all.
    """
    findings, manifest = examine(shard_set), shard_set.manifest
    if findings.broken:
        first, count = next(iter(findings.broken.values())), len(findings.broken)
        more = f" ({count} shards are broken: `tools/inspect_shards.py {shard_set.folder} --fix` drops them)"
        raise UserError(first + more)
    if not np.allclose(statistics(list(findings.sums.values())), (manifest.mean, manifest.std), rtol=1e-6, atol=1e-9):
        raise UserError(
            f"{shard_set.folder}: the manifest's mean and std are not those of its latents; "
            f"`tools/inspect_shards.py {shard_set.folder} --fix` recomputes them"
        )
    if _needs_streaming_index(manifest) and not has_streaming_index(Path(shard_set.folder), manifest):
        raise UserError(
            f"{shard_set.folder}/{STREAMING_INDEX_NAME}: not what the manifest says of the MDS files; "
            f"`tools/inspect_shards.py {shard_set.folder} --fix` rewrites it"
        )


def fix(folder: Path, cache: NodeCache | None = None) -> str:
    """Drop broken and missing shards from the manifest, and recompute its statistics.

    The shards are not touched. A copy of the old manifest is kept beside the new one.

    Args:
        folder: of the set.
        cache: for the remote and compressed shards of an adopted set.

    Returns:
        A report: what was dropped and why, and what is left.

    Raises:
        UserError: there is no valid manifest, or no intact shard; nothing is changed.
    """
    manifest = Manifest.read(folder)
    findings = examine(ShardSet(folder, manifest, cache))
    if not findings.sums:
        first = next(iter(findings.broken.values()))
        raise UserError(
            f"{folder}: none of its {len(findings.broken)} shards is intact, nothing is changed; first: {first}"
        )
    mean, std = statistics(list(findings.sums.values()))
    intact = ShardTable(entry for number, entry in enumerate(manifest.shards) if number in findings.sums)
    fps = next(iter(findings.rates)) if len(findings.rates) == 1 else None
    fixed = manifest.model_copy(update={"shards": intact, "mean": mean, "std": std, "fps": fps})
    index_lines = []
    if _needs_streaming_index(fixed) and not has_streaming_index(folder, fixed):
        write_streaming_index(folder, fixed)
        index_lines = [f"rewritten:   {folder / STREAMING_INDEX_NAME}"]
    if fixed == manifest:
        return "\n".join(index_lines) or f"nothing to fix: all {len(intact)} shards are intact"
    backup = _back_up(folder / MANIFEST_NAME)
    fixed.write(folder)
    lines = [f"dropped:     {problem}" for problem in findings.broken.values()]
    dropped = manifest.samples - fixed.samples
    lines.append(f"left:        {fixed.samples} samples in {len(intact)} shards; {dropped} samples are dropped")
    lines.append("statistics:  recomputed from the remaining shards")
    return "\n".join([*lines, *index_lines, f"before:      {backup}"])


def _needs_streaming_index(manifest: Manifest) -> bool:
    """Whether mosaicml-streaming's index is part of the set."""
    return manifest.shard_format == "mds" and manifest.adopted is None


def _back_up(path: Path) -> Path:
    """Copy the manifest to the first unused name: manifest.json.before-fix, .before-fix-2, ..."""
    backup, number = path.with_name(f"{path.name}.before-fix"), 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.before-fix-{number}")
    with atomic_write(backup) as temporary:
        temporary.write_bytes(path.read_bytes())
    return backup


def contact_sheet(shard_set: ShardSet, samples: int = 8, frames: int = 8) -> Image.Image:
    """An image of decoded frames, evenly spaced: one row a sample.

    Raises:
        UserError: the autoencoder that made the latents is not available.
    """
    autoencoder = matching_autoencoder(shard_set.manifest)
    ends = np.cumsum(shard_set.samples_per_shard)
    rows = []
    for number in np.linspace(0, ends[-1] - 1, min(samples, int(ends[-1]))).round().astype(int):
        shard = int(np.searchsorted(ends, number, side="right"))
        latents = shard_set.read(shard, int(number - ends[shard] + shard_set.samples_per_shard[shard])).latents
        frame_indices = torch.from_numpy(np.linspace(0, len(latents) - 1, frames).round().astype(int))
        with torch.inference_mode():
            pixels = autoencoder.decode(latents[frame_indices].float())  # [F, 3, H, W] in [-1, 1]
        row = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        rows.append(np.concatenate(list(np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)))), axis=1))
    return Image.fromarray(np.concatenate(rows, axis=0))


def matching_autoencoder(manifest: Manifest) -> autoencoders.Autoencoder:
    """The autoencoder that made the latents of a set.

    Raises:
        UserError: it cannot be loaded by its name, or has other weights.
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
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
