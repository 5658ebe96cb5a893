"""Converting a shard set between tars (WebDataset) and MDS files (mosaicml-streaming), with the same members."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from far_scale.data.shards.index import ShardIndex
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.mds import check_fits, write_mds, write_streaming_index
from far_scale.data.shards.records import ShardFormat
from far_scale.data.shards.rejects import REJECTED_NAME
from far_scale.data.shards.sample import to_members
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.stream import index_shard, member_reader, read_samples
from far_scale.data.shards.table import ShardTable
from far_scale.data.shards.writer import finished_index, shard_entry, shard_name, write_tar
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, read_json, sha256, write_json

CONVERSION_NAME = "conversion.json"


def convert(source: ShardSet, out: Path, shard_format: ShardFormat) -> Manifest:
    """Write `source` to the folder `out` in the other format, or finish an interrupted conversion.

    Shards keep their numbers, order and samples, and samples the bytes of their two members, so converting back gives
    the same tars again. An adopted set becomes tars of our own. Statistics and sums are carried over, and every shard's
    checksum is verified. The manifest is written last.

    Raises:
        UserError: the set is of that format already, or damaged; `out` holds something else; a shard is too large for
            an MDS file; the disk is full.
    """
    manifest, is_adopted = source.manifest, source.manifest.adopted is not None
    numbers = [_parse_number(source.folder, shard.file) for shard in manifest.shards]
    if is_adopted and shard_format == "mds":
        raise UserError(
            f"{source.folder}: is adopted; convert it to tars of far_scale first (--format tar), then these"
        )
    if not is_adopted and manifest.shard_format == shard_format:
        raise UserError(f"{source.folder}: its format is {shard_format} already; copy the folder, or ask for the other")
    _prepare_folder(source, out, shard_format)
    entries = []
    for shard, number in enumerate(tqdm(numbers, desc="convert", unit="shard")):
        index = finished_index(out, number, shard_format)
        if index is None:
            index = _convert_shard(source, shard, out, shard_name(number, shard_format))
        entries.append(shard_entry(out, index))
    converted = manifest.model_copy(update={"shards": ShardTable(entries), "adopted": None})
    if shard_format == "mds":
        write_streaming_index(out, converted)
    if (rejected := Path(source.folder) / REJECTED_NAME).exists():
        with atomic_write(out / REJECTED_NAME) as temporary:
            temporary.write_bytes(rejected.read_bytes())
    converted.write(out)
    return converted


def _parse_number(folder: str, file: str) -> int:
    """The number in a shard's name.

    Raises:
        UserError: a name with more zeros than ours, so that two shards could have one number.
    """
    number = int("".join(filter(str.isdigit, file.rpartition(".")[0])))
    if file not in (shard_name(number), shard_name(number, "mds")):
        raise UserError(f"{folder}/{file}: not a name that far_scale gives a shard; encode the set again")
    return number


def _prepare_folder(source: ShardSet, out: Path, shard_format: ShardFormat) -> None:
    """Record the conversion in `out`, or refuse a folder with other content."""
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
    for leftover in out.glob(f".{Path(name).stem}.*part*"):  # of a killed process
        leftover.unlink(missing_ok=True)
    entry, source_index = source.manifest.shards[shard], source.index(shard)
    path = source.store.path(entry.location, entry.bytes, entry.sha256)
    if sha256(path) != entry.sha256:
        raise UserError(
            f"{source.name_of(shard)}: its SHA-256 is not the manifest's; copy it again, or encode the set again"
        )
    if isinstance(source_index, ShardIndex):
        if index_shard(path) != source_index.samples:
            raise UserError(f"{path}: its samples are not those of its index; encode the set again")
        if name.endswith(".mds"):
            check_fits(path, source_index.samples)
        members = _read_members(path)
    else:
        members = _encode_samples(source, shard, entry.samples)
    with atomic_write(out / name) as temporary:
        if name.endswith(".mds"):
            write_mds(temporary, members, entry.samples)
        else:
            write_tar(temporary, members)
        index = ShardIndex(
            file=name,
            bytes=os.path.getsize(temporary),
            sha256=sha256(temporary),
            fps=source_index.fps,
            sums=source_index.sums,
            samples=index_shard(temporary),
        )
    index.write(out)
    return index


def _encode_samples(source: ShardSet, shard: int, count: int) -> Iterator[tuple[str, bytes, bytes]]:
    """The samples of an adopted shard as members of our format: key, JSON, safetensors."""
    for number in range(count):
        member = to_members(source.read(shard, number))
        yield member["__key__"], member["json"], member["safetensors"]


def _read_members(path: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """The samples of a verified shard: key, JSON, safetensors."""
    with open(path, "rb") as file:
        for row, metadata, tensors in read_samples(member_reader(path.name, file), with_data=True):
            yield row.key, metadata, tensors
