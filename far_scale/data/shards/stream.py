"""Reading shards front to back, without manifest or index: all samples of files or URLs, and the index of one shard.

WebDataset opens the URLs; tars and MDS files are parsed by our own readers, which trust nothing in them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from far_scale.data.shards.errors import BadShardError, Mismatch, UnexpectedMemberError
from far_scale.data.shards.index import IndexRow
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.mds import MdsReader
from far_scale.data.shards.members import Member, MemberReader, TarReader
from far_scale.data.shards.records import MAX_JSON_BYTES, MAX_TENSORS_BYTES
from far_scale.data.shards.sample import Sample, from_members, header_size, parse_header, parse_metadata
from far_scale.utils.errors import UserError


def stream(source: str | Path | Sequence[str]) -> Iterator[Sample]:
    """All samples in order, of a shard set's folder or of shards by path or URL (as WebDataset's `gopen` takes them).

    Raises:
        UserError: no shard set in the folder, or a shard that is missing, cut off or not one of ours.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        manifest = Manifest.read(folder)
        if manifest.adopted is not None:
            raise UserError(f"{folder}: is adopted; read it by its indexes, or convert it (tools/convert_shards.py)")
        source = [str(folder / shard.file) for shard in manifest.shards]
    for url in source:
        try:
            with _user_errors(url):
                yield from _stream_shard(url)
        except FileNotFoundError:
            raise UserError(f"{url}: this shard is missing; copy it again, or encode the set again") from None
        except (OSError, ValueError) as problem:  # a command or server that fails; a URL that `gopen` does not know
            reason = " ".join(str(problem).split())
            raise UserError(f"{url}: cannot be read ({reason}); check the URL and whether it is reachable") from None


def _stream_shard(url: str) -> Iterator[Sample]:
    from webdataset import gopen

    with gopen(url) as file:
        for row, metadata, tensors in read_samples(member_reader(url, file), with_data=True):
            yield from_members(row.key, tensors, metadata)


def index_shard(path: Path, name: str | None = None) -> list[IndexRow]:
    """The index rows of a tar or MDS file, from its headers; the tensors' data is not read.

    Args:
        path: of the file.
        name: of the shard, if the file is named otherwise, as in a cache.

    Raises:
        UserError: it is not such a file, is cut off, or its members are not our samples.
    """
    with open(path, "rb") as file, _user_errors(path):
        members = member_reader(name or path.name, file)
        rows = [row for row, _, _ in read_samples(members, with_data=False)]
        if rows[-1].tensors_offset + rows[-1].tensors_bytes > os.fstat(file.fileno()).st_size:
            raise members.truncated("its last member is not all there")
        return rows


@contextlib.contextmanager
def _user_errors(name: str | Path) -> Iterator[None]:
    """Raise what is wrong with the bytes of shard `name` as a UserError."""
    try:
        yield
    except (Mismatch, UnexpectedMemberError) as problem:
        raise UserError(f"{name}: not a shard of far_scale ({problem}); encode the videos again") from None
    except BadShardError as problem:
        raise UserError(f"{name}: not {problem.format}, or cut off ({problem}); copy it again") from None


def member_reader(name: str, file: BinaryIO) -> MemberReader:
    """A reader of the open shard, by the format in its name."""
    return MdsReader(file) if name.endswith(".mds") else TarReader(file)


def read_samples(members: MemberReader, with_data: bool) -> Iterator[tuple[IndexRow, bytes, bytes]]:
    """The samples of a shard in order: index row, JSON, and tensors (without data, only their header).

    Raises:
        Mismatch: there is no sample; or a sample has a member that is missing, duplicate, too large, or not ours.
        BadShardError, UnexpectedMemberError: as by MemberReader.
    """
    seen: set[str] = set()
    pending: dict[str, tuple[Member, bytes]] = {}  # members of the current sample, by kind
    for member in members:
        if pending and member.key not in {other.key for other, _ in pending.values()}:
            raise Mismatch(f"sample {next(iter(pending.values()))[0].key!r} lacks its JSON or its safetensors member")
        if member.key in seen or member.kind in pending:
            raise Mismatch(f"member '{member.key}.{member.kind}' is there twice, or not beside its other half")
        try:
            pending[member.kind] = member, _read_member(members, member, with_data)
            if len(pending) == 2:
                (json_member, metadata), (tensors_member, tensors) = pending["json"], pending["safetensors"]
                header_bytes = header_size(tensors[:8], tensors_member.size)
                frames = parse_header(tensors[:header_bytes], tensors_member.size)["latent"].shape[0]
                parse_metadata(metadata, frames)
                json_range = json_member.offset, json_member.size
                row = IndexRow(
                    member.key, frames, *json_range, tensors_member.offset, header_bytes, tensors_member.size
                )
                yield row, metadata, tensors
                seen.add(member.key)
                pending = {}
        except Mismatch as problem:
            raise Mismatch(f"sample {member.key!r}: {problem}") from None
    if pending:
        raise Mismatch("its last sample lacks its JSON or its safetensors member")
    if not seen:
        raise Mismatch("there is no sample in it")


def _read_member(members: MemberReader, member: Member, with_data: bool) -> bytes:
    if member.kind == "json":
        if member.size > MAX_JSON_BYTES:
            raise Mismatch(f"its JSON has {member.size} bytes, more than the {MAX_JSON_BYTES} of any of ours")
        return members.read(member.size)
    if member.size > MAX_TENSORS_BYTES:
        raise Mismatch(f"its tensors have {member.size} bytes, more than the {MAX_TENSORS_BYTES} allowed")
    start = members.read(8)
    header = start + members.read(header_size(start, member.size) - 8)
    parse_header(header, member.size)  # a bad header is refused before the data is read
    return header + members.read(member.size - len(header)) if with_data else header
