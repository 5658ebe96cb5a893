"""Reads the files of offline wandb runs: wandb itself has no reader of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")  # checksum, length, and: 1 whole, 2 first, 3 middle, 4 last part of a record


def last_step(run: Path, identity: str) -> int:
    """The highest step that the complete offline files of wandb run `identity` hold; 0 for none."""
    return max((step for file in offline_files(run, identity) for step in history_steps(file)), default=0)


def offline_files(run: Path, identity: str) -> list[Path]:
    """The files of one wandb run that `wandb sync` reads, one for each start, oldest first."""
    # Of two starts within a second, the folder of the later one ends with a number.
    return sorted((run / "wandb").glob(f"offline-run-*-{identity}*/run-{identity}.wandb"))


def history_steps(file: Path) -> list[int]:
    """The steps logged in one file, up to where a kill cut it short."""
    return [record.history.step.num for record in read_records(file) if record.HasField("history")]


def read_records(file: Path) -> list[Any]:
    """wandb's records in one file."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(data) for data in _log_records(file.read_bytes())]


def _log_records(content: bytes) -> Iterator[bytes]:
    """The whole records of a file in LevelDB's log format: 7 bytes of wandb's own, then blocks that no part crosses."""
    offset, record = 7, b""
    while offset + _HEADER.size <= len(content):
        room = _BLOCK - offset % _BLOCK
        if room < _HEADER.size:
            offset += room
            continue
        _, length, kind = _HEADER.unpack_from(content, offset)
        offset += _HEADER.size
        part = content[offset : offset + length]
        if kind == 0 or len(part) < length:  # cut short
            return
        offset += length
        record = part if kind in (1, 2) else record + part
        if kind in (1, 4):
            yield record
