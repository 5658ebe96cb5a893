"""Adopts shards: reads every sample once, and writes an index per shard and a manifest for all.

    OUT/adoption.json          the shards, options and detected format; other options are refused
    OUT/sources.jsonl          a line per finished shard: size and modification time of its file, and its rejects
    OUT/shard-000000.index.json, rejected.jsonl, manifest.json

The shards themselves are only read. After a kill, finished shards are not read again unless their files have changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from far_scale import autoencoder as autoencoders
from far_scale.data.adopt.detect import FormatOptions, SampleFormat, detect_format
from far_scale.data.adopt.local_copy import LocalCopy, file_stamp, local_copy
from far_scale.data.adopt.sources import SourceShard
from far_scale.data.encode.plan import describe_autoencoder
from far_scale.data.encode.pool import init_worker
from far_scale.data.shards.adopted import Adoption
from far_scale.data.shards.adopted_samples import SampleReader, Scanned
from far_scale.data.shards.index import AdoptedIndex, parse_index, statistics
from far_scale.data.shards.manifest import AutoencoderInfo, Manifest
from far_scale.data.shards.rejects import REJECTED_NAME, Reject, write_rejects
from far_scale.data.shards.table import ShardTable
from far_scale.data.shards.writer import shard_entry, shard_name
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import JsonlWriter, read_json, read_json_lines, write_json
from far_scale.utils.urls import redact_url

SETTINGS_NAME = "adoption.json"
PROGRESS_NAME = "sources.jsonl"
_UNUSUAL_FACTOR = 2.0  # between the latents' std and the usual one, in either direction


@dataclass(frozen=True)
class _AdoptionJob:
    """What the processes that index shards need."""

    out: Path
    reader: SampleReader
    allow_rejects: bool


def adopt(
    shards: Sequence[SourceShard],
    out: Path,
    autoencoder_name: str,
    options: FormatOptions,
    classes: tuple[str, ...] | None = None,
    max_rejected: float = 0.0,
    jobs: int = 1,
) -> Manifest:
    """Make the shard set `out` from existing shards, or resume where it was interrupted.

    Args:
        shards: see `find_shards`.
        autoencoder_name: the autoencoder of the latents: a name or path for `far_scale.autoencoder.load`.
        options: the user's options for the samples' format.
        classes: names of the label classes, if they are known.
        max_rejected: largest fraction of samples that may be broken; with 0 the first one is an error.
        jobs: processes that read shards.

    Raises:
        UserError: a shard that is missing, no tar or truncated; a sample that is broken, or too many; parts that are
            not found; other settings than those of the existing folder.
    """
    if classes is not None and len(classes) > options.labels:
        raise UserError(
            f"--classes: names {len(classes)} classes, and --labels is {options.labels}; make them the same"
        )
    if options.name_in is not None and not shards[0].is_mds:
        raise UserError(f"--name-in {options.name_in}: a tar's samples have the names of their members; leave it out")
    autoencoder = autoencoders.load(autoencoder_name)
    info = describe_autoencoder(autoencoder)
    settings = _settings_of(shards, info, options, classes)
    if not (out / SETTINGS_NAME).exists():
        _start(shards, out, settings, autoencoder.latent_channels, options, classes, max_rejected > 0)
    sample_format = _read_settings(out, settings)
    finished = _finished_shards(shards, out)
    job = _AdoptionJob(out, _make_reader(sample_format, options, classes), max_rejected > 0)
    _index_missing_shards(job, shards, finished, jobs)
    rejects = [Reject(**reject) for number in range(len(shards)) for reject in finished[number]["rejects"]]
    entries, sums, rates = [], [], set()
    for number, shard in enumerate(shards):
        if (index := _read_index(out, _file_name(number, shard))) is not None:
            entries.append(shard_entry(out, index, shard.location))
            sums.append(index.sums)
            rates.add(index.fps)
    samples = sum(entry.samples for entry in entries)
    write_rejects(out / REJECTED_NAME, rejects)
    if len(rejects) > max_rejected * (samples + len(rejects)) or not entries:
        raise UserError(
            f"{out}: {len(rejects)} of {samples + len(rejects)} samples are broken, more than --max-rejected "
            f"{max_rejected:g} allows, first {rejects[0].source}: sample {rejects[0].key!r}: {rejects[0].reason}; all "
            f"are in {out / REJECTED_NAME}"
        )
    mean, std = statistics(sums)
    manifest = Manifest(
        latent_shape=sample_format.latent_shape,
        latent_dtype=sample_format.latent_dtype,
        mean=mean,
        std=std,
        autoencoder=info,
        actions=options.actions,
        labels=options.labels,
        classes=classes if options.labels else None,
        fps=rates.pop() if len(rates) == 1 else None,
        adopted=sample_format.adoption,
        shards=ShardTable(entries),
    )
    manifest.write(out)
    _warn_of_unusual_scale(out, manifest)
    return manifest


def _make_reader(sample_format: SampleFormat, options: FormatOptions, classes: tuple[str, ...] | None) -> SampleReader:
    return SampleReader(*sample_format, options.actions, options.labels, classes if options.labels else None)


def _warn_of_unusual_scale(out: Path, manifest: Manifest) -> None:
    """Warn if the latents' std is far from 1 / scaling_factor of their autoencoder."""
    mean, std = np.array(manifest.mean), np.array(manifest.std)
    overall_std = math.sqrt(max(0.0, float((std**2 + mean**2).mean() - mean.mean() ** 2)))
    usual = 1 / manifest.autoencoder.scaling_factor
    if not usual / _UNUSUAL_FACTOR < overall_std < usual * _UNUSUAL_FACTOR:
        print_warning(
            f"{out}: the latents' std is {overall_std:.3g}, and {usual:.3g} is usual of {manifest.autoencoder.name}; "
            "if they were scaled before they were stored, adopt them with that --scale-factor"
        )


def _settings_of(
    shards: Sequence[SourceShard], info: AutoencoderInfo, options: FormatOptions, classes: tuple[str, ...] | None
) -> dict[str, Any]:
    """The settings of an adoption, as stored in its folder."""
    locations = hashlib.sha256(json.dumps([shard.location for shard in shards]).encode()).hexdigest()[:16]
    return {
        "shards": f"{len(shards)} with fingerprint {locations}",
        "autoencoder": f"{info.name} {info.weight_hash}",
        "classes": None if classes is None else list(classes),
        **asdict(options),
    }


def _start(
    shards: Sequence[SourceShard],
    out: Path,
    settings: dict[str, Any],
    channels: int,
    options: FormatOptions,
    classes: tuple[str, ...] | None,
    allow_rejects: bool,
) -> None:
    """Create the folder: detect the format, and index the first shard, which is already fetched for that."""
    if out.exists() and not all(file.name.startswith(".") for file in out.iterdir()):
        raise UserError(f"{out}: there are files here already; adopt into a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with local_copy(shards[0], out, 0) as copy:
        name, file = redact_url(shards[0].location), _file_name(0, shards[0])
        sample_format = detect_format(copy.path, name, file, channels, options)
        job = _AdoptionJob(out, _make_reader(sample_format, options, classes), allow_rejects)
        scanned = _scan(job, 0, shards[0], copy)
        # Nothing is written before this, so that the command may be repeated with other options after an error.
        detected = [
            sample_format.adoption.model_dump(mode="json"),
            sample_format.latent_shape,
            sample_format.latent_dtype,
        ]
        write_json(out / SETTINGS_NAME, {"given": settings, "found": detected})
        JsonlWriter(out / PROGRESS_NAME).append(_write_index(job, 0, shards[0], copy, scanned))


def _read_settings(out: Path, settings: dict[str, Any]) -> SampleFormat:
    """Compare the settings with those of the folder, and return the format that was detected then."""
    path = out / SETTINGS_NAME
    stored = read_json(path, "adoption's settings")
    try:
        stored_settings, (adoption, shape, dtype) = dict(stored["given"]), stored["found"]
        # from JSON, which has lists for tuples
        sample_format = SampleFormat(Adoption.model_validate_json(json.dumps(adoption)), tuple(shape), dtype)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not the settings of an adoption; adopt into another folder") from None
    for name, value in settings.items():
        if stored_settings.get(name) != value:
            old, new = ("none" if setting is None else setting for setting in (stored_settings.get(name), value))
            raise UserError(
                f"{out}: was adopted with {name} {old}, not {new}; adopt into another folder, or remove this"
            )
    return sample_format


def _finished_shards(shards: Sequence[SourceShard], out: Path) -> dict[int, dict[str, Any]]:
    """The lines of progress of the finished and unchanged shards, by shard number."""
    path, lines = out / PROGRESS_NAME, {}
    for line in read_json_lines(path) if path.exists() else []:
        if line is not None and line.get("number") in range(len(shards)):
            lines[line["number"]] = line
    return {number: line for number, line in lines.items() if _is_finished(out, shards[number], line)}


def _is_finished(out: Path, shard: SourceShard, line: dict[str, Any]) -> bool:
    """Whether neither the shard nor its index has changed since its line of progress."""
    if line["source"] != shard.location or line["lies"] != file_stamp(shard):
        return False
    index = _read_index(out, _file_name(line["number"], shard))
    return bool(line["rejects"]) if index is None else index.sha256 == line["sha256"]


def _file_name(number: int, shard: SourceShard) -> str:
    """Name of a shard in the manifest."""
    return shard_name(number, "mds" if shard.is_mds else "tar")


def _read_index(out: Path, file: str) -> AdoptedIndex | None:
    """The index of a shard; None if it is damaged or missing, as where all samples are rejected."""
    path = AdoptedIndex.path_of(out, file)
    try:
        return parse_index(path.read_bytes(), path, AdoptedIndex)
    except (FileNotFoundError, UserError):
        return None


def _index_missing_shards(
    job: _AdoptionJob, shards: Sequence[SourceShard], finished: dict[int, dict[str, Any]], jobs: int
) -> None:
    """Index the shards that are not finished; adds their lines to `finished` and to the progress file."""
    progress = JsonlWriter(job.out / PROGRESS_NAME)
    missing = [number for number in range(len(shards)) if number not in finished]
    with tqdm(total=len(missing), desc="adopt", unit="shard") as bar:
        for line in _index_shards(job, shards, missing, jobs):
            progress.append(line)
            finished[line["number"]] = line
            bar.update()


def _index_shards(
    job: _AdoptionJob, shards: Sequence[SourceShard], numbers: list[int], jobs: int
) -> Iterator[dict[str, Any]]:
    """Index shards in `jobs` processes; yields their lines of progress as they finish."""
    if min(jobs, len(numbers)) <= 1:
        for number in numbers:
            yield _index_shard(job, number, shards[number])
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads
    pool = ProcessPoolExecutor(min(jobs, len(numbers)), spawn, initializer=init_worker)
    try:
        for future in as_completed([pool.submit(_index_shard, job, number, shards[number]) for number in numbers]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(f"{job.out}: a process died, maybe out of memory; run again with fewer --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _index_shard(job: _AdoptionJob, number: int, shard: SourceShard) -> dict[str, Any]:
    with local_copy(shard, job.out, number) as copy:
        return _write_index(job, number, shard, copy, _scan(job, number, shard, copy))


def _scan(job: _AdoptionJob, number: int, shard: SourceShard, copy: LocalCopy) -> Scanned:
    """Read all samples of a shard.

    Raises:
        UserError: a sample is broken where none may be, or the shard has changed meanwhile.
    """
    name = redact_url(shard.location)
    scanned = job.reader.scan(copy.path, name, _file_name(number, shard))
    if scanned.rejects and not job.allow_rejects:
        sample, reason = scanned.rejects[0]
        more = f" ({len(scanned.rejects)} of its samples are broken)" if len(scanned.rejects) > 1 else ""
        raise UserError(
            f"{name}: sample {sample!r}: {reason}{more}; write the shard again, or allow a fraction of broken "
            "samples by --max-rejected"
        )
    if copy.stamp != file_stamp(shard):
        raise UserError(f"{name}: changed while it was read; adopt it when it is written")
    return scanned


def _write_index(
    job: _AdoptionJob, number: int, shard: SourceShard, copy: LocalCopy, scanned: Scanned
) -> dict[str, Any]:
    """Write the index of a shard, and return its line of progress."""
    file = _file_name(number, shard)
    AdoptedIndex.path_of(job.out, file).unlink(missing_ok=True)
    if scanned.sums is not None:
        AdoptedIndex(
            file=file, bytes=copy.bytes, sha256=copy.sha256, fps=scanned.fps, sums=scanned.sums, samples=scanned.rows
        ).write(job.out)
    rejects = [Reject(redact_url(shard.location), sample, reason)._asdict() for sample, reason in scanned.rejects]
    line = {"number": number, "source": shard.location, "lies": copy.stamp, "sha256": copy.sha256}
    return {**line, "rejects": rejects}
