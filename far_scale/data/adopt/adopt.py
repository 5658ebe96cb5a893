"""Adopting shards: every sample is read once, an index is written for each shard and a manifest for all.

    OUT/adoption.json          what is adopted and how; other settings are refused
    OUT/sources.jsonl          a line for each shard that is done: its size and time, and its rejects
    OUT/shard-000000.index.json, rejected.jsonl, manifest.json

The shards themselves are only read. What is done after a kill is not done again, unless its file has changed.
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
from far_scale.data.adopt.local_copy import LocalCopy, lies_as, local_copy
from far_scale.data.adopt.parts import Chosen, Wishes, choose
from far_scale.data.adopt.sources import FoundShard
from far_scale.data.encode.pool import begin_worker
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
_UNUSUAL = 2.0  # times the usual std, or a part of it


@dataclass(frozen=True)
class _Job:
    """What the processes that read shards know."""

    out: Path
    reader: SampleReader
    rejects_allowed: bool


def adopt(
    shards: Sequence[FoundShard],
    out: Path,
    autoencoder_name: str,
    wishes: Wishes,
    classes: tuple[str, ...] | None = None,
    max_rejected: float = 0.0,
    jobs: int = 1,
) -> Manifest:
    """Make the shard set `out` of shards that lie elsewhere, or finish it where it was cut off.

    Args:
        shards: see `find_shards`.
        autoencoder_name: what made the latents: a name or path that `far_scale.autoencoder.load` knows.
        wishes: what is known of the samples.
        classes: the names of the labels' classes, where they are known.
        max_rejected: the largest share of samples that may be broken; with 0 the first is an error.
        jobs: processes that read shards.

    Raises:
        UserError: a shard that is missing, no tar or cut off; a sample that is broken, or too many; parts that are not
            found; other settings than the folder was begun with.
    """
    if classes is not None and len(classes) > wishes.labels:
        raise UserError(f"--classes: names {len(classes)} classes, and --labels is {wishes.labels}; make them the same")
    if wishes.name_in is not None and not shards[0].is_mds:
        raise UserError(f"--name-in {wishes.name_in}: a tar's samples have the names of their members; leave it out")
    autoencoder = autoencoders.load(autoencoder_name)
    info = AutoencoderInfo(
        name=autoencoder.name, weight_hash=autoencoder.weight_hash, scaling_factor=autoencoder.scaling_factor
    )
    given = _given(shards, info, wishes, classes)
    if not (out / SETTINGS_NAME).exists():
        _start(shards, out, given, autoencoder.latent_channels, wishes, classes, max_rejected > 0)
    chosen = _kept(out, given)
    done = _done(shards, out)
    job = _Job(out, _reader(chosen, wishes, classes), max_rejected > 0)
    _read_shards(job, shards, done, jobs)
    rejects = [Reject(**each) for number in range(len(shards)) for each in done[number]["rejects"]]
    entries, sums, rates = [], [], set()
    for number, shard in enumerate(shards):
        if (index := _index(out, _file(number, shard))) is not None:
            entries.append(shard_entry(out, index, shard.place))
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
        latent_shape=chosen.latent_shape,
        latent_dtype=chosen.latent_dtype,
        mean=mean,
        std=std,
        autoencoder=info,
        actions=wishes.actions,
        labels=wishes.labels,
        classes=classes if wishes.labels else None,
        fps=rates.pop() if len(rates) == 1 else None,
        adopted=chosen.adoption,
        shards=ShardTable(entries),
    )
    manifest.write(out)
    _warn_of_scale(out, manifest)
    return manifest


def _reader(chosen: Chosen, wishes: Wishes, classes: tuple[str, ...] | None) -> SampleReader:
    return SampleReader(*chosen, wishes.actions, wishes.labels, classes if wishes.labels else None)


def _warn_of_scale(out: Path, manifest: Manifest) -> None:
    """Say where the latents are far from the scale at which their autoencoder gives them."""
    mean, std = np.array(manifest.mean), np.array(manifest.std)
    over_all = math.sqrt(max(0.0, float((std**2 + mean**2).mean() - mean.mean() ** 2)))
    usual = 1 / manifest.autoencoder.scaling_factor
    if not usual / _UNUSUAL < over_all < usual * _UNUSUAL:
        print_warning(
            f"{out}: the latents' std is {over_all:.3g}, and {usual:.3g} is usual of {manifest.autoencoder.name}; if "
            "they were scaled before they were stored, adopt them with that --scale-factor"
        )


def _given(
    shards: Sequence[FoundShard], info: AutoencoderInfo, wishes: Wishes, classes: tuple[str, ...] | None
) -> dict[str, Any]:
    """What an adoption is begun with, for the settings in its folder."""
    names = hashlib.sha256(json.dumps([shard.place for shard in shards]).encode()).hexdigest()[:16]
    return {
        "shards": f"{len(shards)} with fingerprint {names}",
        "autoencoder": f"{info.name} {info.weight_hash}",
        "classes": None if classes is None else list(classes),
        **asdict(wishes),
    }


def _start(
    shards: Sequence[FoundShard],
    out: Path,
    given: dict[str, Any],
    channels: int,
    wishes: Wishes,
    classes: tuple[str, ...] | None,
    rejects_allowed: bool,
) -> None:
    """Begin the folder: find how samples are read, and read the first shard, which is then at hand."""
    if out.exists() and not all(file.name.startswith(".") for file in out.iterdir()):
        raise UserError(f"{out}: there are files here already; adopt into a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with local_copy(shards[0], out, 0) as copy:
        chosen = choose(copy.path, redact_url(shards[0].place), _file(0, shards[0]), channels, wishes)
        job = _Job(out, _reader(chosen, wishes, classes), rejects_allowed)
        scanned = _scan(job, 0, shards[0], copy)
        # Nothing is kept before this: after an error the command may be run again with other options.
        found = [chosen.adoption.model_dump(mode="json"), chosen.latent_shape, chosen.latent_dtype]
        write_json(out / SETTINGS_NAME, {"given": given, "found": found})
        JsonlWriter(out / PROGRESS_NAME).append(_write(job, 0, shards[0], copy, scanned))


def _kept(out: Path, given: dict[str, Any]) -> Chosen:
    """How samples are read, as it was found when the folder was begun."""
    path = out / SETTINGS_NAME
    kept = read_json(path, "adoption's settings")
    try:
        before, (adoption, shape, dtype) = dict(kept["given"]), kept["found"]
        # As JSON, in which a list stands for a tuple.
        chosen = Chosen(Adoption.model_validate_json(json.dumps(adoption)), tuple(shape), dtype)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not the settings of an adoption; adopt into another folder") from None
    for name, value in given.items():
        if before.get(name) != value:
            was, now = ("none" if each is None else each for each in (before.get(name), value))
            raise UserError(
                f"{out}: was adopted with {name} {was}, not {now}; adopt into another folder, or remove this"
            )
    return chosen


def _done(shards: Sequence[FoundShard], out: Path) -> dict[int, dict[str, Any]]:
    """The lines of progress of the shards that are done and unchanged, by number."""
    path, done = out / PROGRESS_NAME, {}
    for line in read_json_lines(path) if path.exists() else []:
        if line is not None and line.get("number") in range(len(shards)):
            done[line["number"]] = line
    return {number: line for number, line in done.items() if _is_done(out, shards[number], line)}


def _is_done(out: Path, shard: FoundShard, line: dict[str, Any]) -> bool:
    """Whether a line of progress holds for a shard: it is the same, and so is its index."""
    if line["source"] != shard.place or line["lies"] != lies_as(shard):
        return False
    index = _index(out, _file(line["number"], shard))
    return bool(line["rejects"]) if index is None else index.sha256 == line["sha256"]


def _file(number: int, shard: FoundShard) -> str:
    """What the manifest calls a shard."""
    return shard_name(number, "mds" if shard.is_mds else "tar")


def _index(out: Path, file: str) -> AdoptedIndex | None:
    """The index of a shard; None where it is missing, as where all samples are rejected, or broken."""
    path = AdoptedIndex.path_of(out, file)
    try:
        return parse_index(path.read_bytes(), path, AdoptedIndex)
    except (FileNotFoundError, UserError):
        return None


def _read_shards(job: _Job, shards: Sequence[FoundShard], done: dict[int, dict[str, Any]], jobs: int) -> None:
    """Read the shards that are not done; each is noted in `done` and on the disk when it is."""
    progress = JsonlWriter(job.out / PROGRESS_NAME)
    missing = [number for number in range(len(shards)) if number not in done]
    with tqdm(total=len(missing), desc="adopt", unit="shard") as bar:
        for line in _each(job, shards, missing, jobs):
            progress.append(line)
            done[line["number"]] = line
            bar.update()


def _each(job: _Job, shards: Sequence[FoundShard], missing: list[int], jobs: int) -> Iterator[dict[str, Any]]:
    if min(jobs, len(missing)) <= 1:
        for number in missing:
            yield _adopt_one(job, number, shards[number])
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads
    pool = ProcessPoolExecutor(min(jobs, len(missing)), spawn, initializer=begin_worker)
    try:
        for future in as_completed([pool.submit(_adopt_one, job, number, shards[number]) for number in missing]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(f"{job.out}: a process died, maybe for want of memory; run again with fewer --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _adopt_one(job: _Job, number: int, shard: FoundShard) -> dict[str, Any]:
    with local_copy(shard, job.out, number) as copy:
        return _write(job, number, shard, copy, _scan(job, number, shard, copy))


def _scan(job: _Job, number: int, shard: FoundShard, copy: LocalCopy) -> Scanned:
    """Read all samples of one shard.

    Raises:
        UserError: a sample is broken where none may be, or the shard changes meanwhile.
    """
    name = redact_url(shard.place)
    found = job.reader.scan(copy.path, name, _file(number, shard))
    if found.rejects and not job.rejects_allowed:
        sample, reason = found.rejects[0]
        more = f" ({len(found.rejects)} of its samples are broken)" if len(found.rejects) > 1 else ""
        raise UserError(
            f"{name}: sample {sample!r}: {reason}{more}; write the shard again, or allow a share of broken "
            "samples by --max-rejected"
        )
    if copy.lies != lies_as(shard):
        raise UserError(f"{name}: changed while it was read; adopt it when it is written")
    return found


def _write(job: _Job, number: int, shard: FoundShard, copy: LocalCopy, found: Scanned) -> dict[str, Any]:
    """Write the index of one shard, and give its line of progress."""
    file = _file(number, shard)
    AdoptedIndex.path_of(job.out, file).unlink(missing_ok=True)
    if found.sums is not None:
        AdoptedIndex(
            file=file, bytes=copy.bytes, sha256=copy.sha256, fps=found.fps, sums=found.sums, samples=found.rows
        ).write(job.out)
    rejects = [Reject(redact_url(shard.place), sample, reason)._asdict() for sample, reason in found.rejects]
    line = {"number": number, "source": shard.place, "lies": copy.lies, "sha256": copy.sha256}
    return {**line, "rejects": rejects}
