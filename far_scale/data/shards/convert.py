"""A shard set in the other format, tars (WebDataset) or MDS files (mosaicml-streaming), with the same bytes in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from far_scale.data.shards.index import ShardIndex
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.mds import check_fits, write_mds, write_streaming_index
from far_scale.data.shards.rejects import REJECTED_NAME
from far_scale.data.shards.sample import index_shard, members_of, to_members, walk
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.table import ShardTable
from far_scale.data.shards.typed import ShardFormat
from far_scale.data.shards.writer import finished_index, shard_entry, shard_name, write_tar
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, read_json, sha256, write_json

CONVERSION_NAME = "conversion.json"


def convert(source: ShardSet, out: Path, shard_format: ShardFormat) -> Manifest:
    """Write `source` to the folder `out` in the other format, or finish it where it was cut off.

    Shards keep their numbers, order and samples, and each sample the bytes of its two members, so converting back gives
    the same tars again. An adopted set becomes tars of our own. Statistics and sums are carried over. Every byte that
    is read is held against the manifest's checksums. The manifest comes last.

    Raises:
        UserError: the set is of that format already, or not whole; `out` holds something else; a shard is too large
            for an MDS file; the disk is full.
    """
    manifest, adopted = source.manifest, source.manifest.adopted is not None
    numbers = [_number(source.folder, shard.file) for shard in manifest.shards]
    if adopted and shard_format == "mds":
        raise UserError(
            f"{source.folder}: is adopted; convert it to tars of far_scale first (--format tar), then these"
        )
    if not adopted and manifest.shard_format == shard_format:
        raise UserError(f"{source.folder}: its format is {shard_format} already; copy the folder, or ask for the other")
    _claim(source, out, shard_format)
    entries = []
    for shard, number in enumerate(tqdm(numbers, desc="convert", unit="shard")):
        index = finished_index(out, number, shard_format)
        if index is None:
            index = _convert_shard(source, shard, out, shard_name(number, shard_format))
        entries.append(shard_entry(out, index))
    made = manifest.model_copy(update={"shards": ShardTable(entries), "adopted": None})
    if shard_format == "mds":
        write_streaming_index(out, made)
    if (rejected := Path(source.folder) / REJECTED_NAME).exists():
        with atomic_write(out / REJECTED_NAME) as beside:
            beside.write_bytes(rejected.read_bytes())
    made.write(out)
    return made


def _number(folder: str, file: str) -> int:
    """The number of a shard, which its name has in either format.

    Raises:
        UserError: a name with more zeros than ours; another shard might have the same number.
    """
    number = int("".join(filter(str.isdigit, file.rpartition(".")[0])))
    if file not in (shard_name(number), shard_name(number, "mds")):
        raise UserError(f"{folder}/{file}: not a name that far_scale gives a shard; encode the set again")
    return number


def _claim(source: ShardSet, out: Path, shard_format: ShardFormat) -> None:
    """Write down in `out` what is converted to it, or refuse where that is something else."""
    settings = {"format": shard_format, "from": source.manifest.fingerprint()}
    path = out / CONVERSION_NAME
    if path.exists():
        if read_json(path, "conversion's settings") != settings:
            raise UserError(f"{out}: another set was converted to this folder; choose another folder, or remove it")
    elif out.exists() and not all(file.name.startswith(".") for file in out.iterdir()):
        raise UserError(f"{out}: there are files here already; convert into a new folder")
    else:
        write_json(path, settings)


def _convert_shard(source: ShardSet, shard: int, out: Path, name: str) -> ShardIndex:
    """Write one shard and then its index."""
    for left_by_a_kill in out.glob(f".{Path(name).stem}.*part*"):
        left_by_a_kill.unlink(missing_ok=True)
    entry, before = source.manifest.shards[shard], source.index(shard)
    path = source.store.path(entry.place, entry.bytes, entry.sha256)
    if sha256(path) != entry.sha256:
        where = source.name_of(shard)
        raise UserError(f"{where}: its SHA-256 is not the manifest's; copy it again, or encode the set again")
    if isinstance(before, ShardIndex):
        if index_shard(path) != before.samples:
            raise UserError(f"{path}: its samples are not those of its index; encode the set again")
        if name.endswith(".mds"):
            check_fits(path, before.samples)
        members = _members(path)
    else:
        members = _members_of_samples(source, shard, entry.samples)
    with atomic_write(out / name) as beside:
        if name.endswith(".mds"):
            write_mds(beside, members, entry.samples)
        else:
            write_tar(beside, members)
        index = ShardIndex(
            file=name,
            bytes=os.path.getsize(beside),
            sha256=sha256(beside),
            fps=before.fps,
            sums=before.sums,
            samples=index_shard(beside),
        )
    index.write(out)
    return index


def _members_of_samples(source: ShardSet, shard: int, count: int) -> Iterator[tuple[str, bytes, bytes]]:
    """The samples of an adopted shard as ours have them: key, JSON, safetensors."""
    for number in range(count):
        member = to_members(source.read(shard, number))
        yield member["__key__"], member["json"], member["safetensors"]


def _members(path: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """The samples of a shard that was verified: key, JSON, safetensors."""
    with open(path, "rb") as file:
        for row, facts, tensors in walk(members_of(path.name, file), data=True):
            yield row.key, facts, tensors
