"""Random access to a shard set: any sample by its number, any frames of it by offset."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from far_scale.data.frame_counts import min_frames
from far_scale.data.remote.cache import NodeCache, is_evicted, touch
from far_scale.data.shards.adopted import AdoptedRow
from far_scale.data.shards.adopted_samples import SampleReader
from far_scale.data.shards.errors import DamagedError, Mismatch
from far_scale.data.shards.index import AdoptedIndex, ChannelSums, IndexRow, LatentSums, ShardIndex, parse_index
from far_scale.data.shards.manifest import DTYPES, MANIFEST_NAME, Manifest
from far_scale.data.shards.sample import (
    Sample,
    TensorInfo,
    byte_count,
    parse_header,
    parse_metadata,
    read_at,
    view_tensor,
)
from far_scale.data.shards.store import (
    AdoptedStore,
    StagedStore,
    Store,
    display_name,
    missing_file,
    open_store,
    read_manifest_bytes,
)
from far_scale.data.shards.stream import index_shard
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256
from far_scale.utils.urls import is_remote, redact_url

T = TypeVar("T")
_MAX_OPEN_SHARDS = 128  # of a rank: each lane's shuffle window may cover several
_MAX_LOADED_INDEXES = 256


class _LRUCache(Generic[T]):
    """The most recently used values, made on demand. An evicted file closes when its last user drops it.

    Damaged entries are remembered and not tried again: with a remote set each try may take minutes.
    """

    def __init__(self, size: int, make: Callable[[int], T]) -> None:
        self._size, self._make, self._lock = size, make, threading.Lock()
        self._values: OrderedDict[int, T] = OrderedDict()
        self._damaged: dict[int, DamagedError] = {}

    def __getitem__(self, key: int) -> T:
        with self._lock:
            if (damage := self._damaged.get(key)) is not None:
                raise DamagedError(damage.file, damage.problem)
            if key not in self._values:
                try:
                    self._values[key] = self._make(key)
                except DamagedError as problem:
                    self._damaged[key] = problem
                    raise
                if len(self._values) > self._size:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]

    def drop(self, condition: Callable[[T], bool], keep: int) -> None:
        """Drop all values that meet the condition, except that of key `keep`."""
        with self._lock:
            for key in [key for key, value in self._values.items() if key != keep and condition(value)]:
                del self._values[key]


class _ShardFile:
    """An open shard. It closes with its last reference, so no reader in another thread loses its descriptor.

    Args:
        name: for messages.
        descriptor: file descriptor; owned by this object.
        size: size in the manifest, in bytes.
        rebuild_hint: how to make the shard again, for messages.
    """

    def __init__(self, name: str, descriptor: int, size: int, rebuild_hint: str) -> None:
        self.descriptor, self.name, self.size, self._rebuild_hint = descriptor, name, size, rebuild_hint
        check_file_size(name, os.fstat(descriptor).st_size, size, rebuild_hint)

    def read(self, offset: int, size: int) -> bytearray:
        """`size` bytes from `offset`; a range beyond the end is refused before anything is allocated."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise Mismatch(f"it should have {size} bytes at {offset}, beyond the end of the file")
        try:
            data = read_at(self.descriptor, offset, size)
        except OSError as error:  # of a disk or a file server
            raise Mismatch(f"reading fails: {error.strerror}") from None
        if len(data) < size:  # it was cut off after it was opened
            check_file_size(self.name, os.fstat(self.descriptor).st_size, self.size, self._rebuild_hint)
            raise Mismatch("the file ends early")
        return data

    def __del__(self) -> None:
        os.close(self.descriptor)


class _WrongSetError(Mismatch):
    """An intact sample that does not belong in this set."""


def check_file_size(name: str, size: int, expected: int, rebuild_hint: str) -> None:
    """Refuse a shard with another size than the manifest's."""
    if size != expected:
        state = "truncated" if size < expected else "not the shard that the manifest describes"
        raise DamagedError(
            name, f"{state} ({size} bytes, the manifest says {expected}); copy it again, or {rebuild_hint}"
        )


def _sums_match(first: ChannelSums, second: ChannelSums) -> bool:
    """Whether two sums may be of the same latents, added up in another order."""
    # The rounding error is far below a millionth of the sum of absolute values.
    total, squares = (np.abs(np.subtract(getattr(first, name), getattr(second, name))) for name in ("total", "squares"))
    expected_squares = np.asarray(second.squares)
    rounding = 1e-6 * np.sqrt(second.values * expected_squares) + 1e-12
    return first.values == second.values and bool(
        (total <= rounding).all() and (squares <= 1e-6 * expected_squares).all()
    )


class ShardSet:
    """Shards and their manifest, local or remote; safe to read from several threads at once.

    Attributes:
        folder: folder or URL, for messages.
        manifest: of the set.
        store: gives the set's files.
        needs_cache: whether the shards are remote or compressed, so that they need the node's cache.
        uses_cache: whether the shards are read through the node's cache.
        staged: the store of a local set that is copied through the node's cache, with its counters; else None.
    """

    def __init__(self, location: str | Path, manifest: Manifest, cache: NodeCache | None = None) -> None:
        """`cache` is the node's: a remote set is read through it, and a local one if it is given.

        Raises:
            UserError: the set is remote, and there is no cache, or one smaller than its largest shard.
        """
        self.folder = redact_url(str(location)) if is_remote(location) else str(location)
        self.manifest, self.uses_cache = manifest, cache is not None
        is_adopted = manifest.adopted is not None
        self._rebuild_hint = "adopt the shards again" if is_adopted else "encode the set again"
        self.needs_cache = bool(manifest.shards.needs_cache) if is_adopted else is_remote(location)
        # The indexes of a local set with remote or compressed shards are read in place.
        manifest_cache = None if self.needs_cache and not is_remote(location) else cache
        manifest_store = open_store(location, manifest_cache, self._rebuild_hint)
        self.staged = manifest_store if isinstance(manifest_store, StagedStore) else None
        self.store: Store = AdoptedStore(manifest_store, cache, self._rebuild_hint) if is_adopted else manifest_store
        self._adopted_reader = SampleReader.of(manifest) if is_adopted else None
        largest = int(manifest.shards.bytes.max())
        if self.needs_cache and cache is not None and cache.max_bytes < largest:
            raise UserError(
                f"data.cache_gb={cache.max_bytes / 1e9:g} is too small for a shard of {self.folder}, which has up to "
                f"{largest / 1e9:g} GB; raise it to hold all shards that are read at the same time"
            )
        self._files = _LRUCache(_MAX_OPEN_SHARDS, self._open_file)
        self._indexes = _LRUCache(_MAX_LOADED_INDEXES, self._load_index)

    @staticmethod
    def open(location: str | Path, cache: NodeCache | None = None) -> ShardSet:
        """Open a shard set, check its manifest and, of a local set, that each shard exists in its full size.

        Raises:
            UserError: the manifest is missing or invalid; a shard is missing or has another size.
        """
        open_store(location, cache)  # a remote set without a cache is refused before anything is fetched
        shard_set = ShardSet.from_manifest(location, read_manifest_bytes(location), cache)
        for _, problem in shard_set.missing_shards():
            raise problem
        return shard_set

    @staticmethod
    def from_manifest(location: str | Path, text: bytes, cache: NodeCache | None = None) -> ShardSet:
        """The shard set of a manifest that was read already; shards are not checked.

        Raises:
            UserError: the manifest is invalid.
        """
        return ShardSet(location, Manifest.parse(text, display_name(location, MANIFEST_NAME)), cache)

    def missing_shards(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, DamagedError]]:
        """Number and problem of each shard that is missing or has another size, of shards part, part + parts, ...

        Shards that need the cache are not checked: that happens when they are fetched.
        """
        if self.needs_cache:
            return
        for number in range(part, len(self.manifest.shards), parts):
            entry = self.manifest.shards[number]
            name = self.store.display_name(entry.location)
            try:
                check_file_size(name, os.stat(name).st_size, entry.bytes, self._rebuild_hint)
            except FileNotFoundError:
                yield number, missing_file(name, "shard", self._rebuild_hint)
            except DamagedError as problem:
                yield number, problem

    @property
    def samples_per_shard(self) -> list[int]:
        counts: list[int] = self.manifest.shards.samples.tolist()
        return counts

    def index(self, shard: int) -> ShardIndex | AdoptedIndex:
        """The index of a shard.

        Raises:
            UserError: it is missing, or not the one of the manifest.
        """
        return self._indexes[shard]

    def name_of(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""
        return self.store.display_name(self.manifest.shards[shard].location)

    def fetch_ahead(self, shard: int) -> None:
        """Fetch the index and the shard into the node's cache before they are needed, unless there is no room.

        Files that cannot be fetched are left to `read`, which raises the error.

        Raises:
            UserError: the cache cannot store them.
        """
        entry = self.manifest.shards[shard]
        self.store.fetch_ahead(ShardIndex.path_of("", entry.file).name, entry.index_sha256, None)
        self.store.fetch_ahead(entry.location, entry.sha256, entry.bytes)

    def frames_of(self, shard: int, sample: int) -> int:
        """Frame count of a sample.

        Raises:
            UserError: as by `index`.
        """
        return self.index(shard).samples[sample].frames

    def read(self, shard: int, sample: int, start: int = 0, frames: int | None = None, stride: int = 1) -> Sample:
        """Read a sample, or only `frames` of its frames: `start`, `start + stride`, ...

        The latents are a view of the bytes read, without a copy.

        Raises:
            DamagedError: the sample or its shard is damaged, or cannot be fetched.
            UserError: the sample is intact, but does not fit the manifest.
            ValueError: the sample does not have these frames.
        """
        row = self.index(shard).samples[sample]
        count = row.frames if frames is None else frames
        last = start + (count - 1) * stride
        if start < 0 or count < 1 or stride < 1 or last >= row.frames:
            raise ValueError(f"frames {start} to {last} of {row.key}, which has {row.frames}")
        try:
            return self._read(self._file(shard), row, start, last + 1, stride)
        except Mismatch as problem:
            name = self.name_of(shard)
            text = f"sample {row.key!r} is not what the index describes ({problem}); {self._rebuild_hint}"
            if isinstance(problem, _WrongSetError):
                raise UserError(f"{name}: {text}") from None
            raise DamagedError(name, text, row.key) from None
        except DamagedError as problem:
            raise DamagedError(problem.file, problem.problem, row.key) from None

    def _file(self, shard: int) -> _ShardFile:
        """An open shard, marked as used now."""
        file = self._files[shard]
        if self.needs_cache:
            touch(file.descriptor)
        if self.uses_cache:
            # An evicted file takes up disk space until it is closed. The current one is read to its end.
            self._files.drop(lambda other: is_evicted(other.descriptor), keep=shard)
        return file

    def _read(self, file: _ShardFile, row: IndexRow | AdoptedRow, start: int, stop: int, stride: int) -> Sample:
        manifest = self.manifest
        if isinstance(row, AdoptedRow):
            assert self._adopted_reader is not None
            return self._adopted_reader.read(file.read, row, start, stop, stride)
        infos = parse_header(bytes(file.read(row.tensors_offset, row.header_bytes)), row.tensors_bytes)
        latent, action = infos["latent"], infos.get("action")
        if latent.shape != (row.frames, *manifest.latent_shape) or latent.dtype != DTYPES[manifest.latent_dtype]:
            raise _WrongSetError(f"its latents are {list(latent.shape)} {latent.dtype}")
        if (action is not None) != (manifest.actions > 0):
            raise _WrongSetError("it has actions and the set has none, or vice versa")
        data_offset = row.tensors_offset + row.header_bytes
        metadata = parse_metadata(bytes(file.read(row.json_offset, row.json_bytes)), row.frames)
        label = metadata["label"]
        if not (0 <= label < manifest.labels if label is not None else manifest.labels == 0):
            raise _WrongSetError(f"its label is {label}, and the set has {manifest.labels} labels")
        latents = _read_frames(file, data_offset, latent, start, stop)[::stride]
        actions = None if action is None else _read_frames(file, data_offset, action, start, stop)[::stride]
        # Checked here: on a GPU, a class beyond the embedding's size ends the process without a clear error.
        if actions is not None and not 0 <= int(actions.min()) <= int(actions.max()) < manifest.actions:
            raise _WrongSetError(f"it has an action beyond the set's {manifest.actions}")
        return Sample(
            key=row.key,
            latents=latents,
            actions=actions,
            label=label,
            fps=metadata["fps"],
            source=metadata["source"],
        )

    def verify_shard(self, number: int) -> ShardIndex | AdoptedIndex:
        """Read every byte of a shard and compare checksums, members, samples and sums with its index.

        Returns:
            The index.

        Raises:
            UserError: the first problem.
        """
        entry = self.manifest.shards[number]
        index = self.index(number)
        self._open_file(number)  # missing, or of another size
        path = self.store.path(entry.location, entry.bytes, entry.sha256)
        if sha256(path) != entry.sha256:
            raise UserError(f"{path}: its SHA-256 is not the manifest's; copy it again, or {self._rebuild_hint}")
        if self._adopted_reader is None:
            rows: list[IndexRow] | list[AdoptedRow] = index_shard(path, entry.file)
        else:
            rows = self._adopted_reader.scan(path, self.name_of(number), entry.file).rows
        if rows != index.samples:
            raise UserError(f"{path}: its samples are not those of its index; {self._rebuild_hint}")
        sums = LatentSums(len(index.sums.total))
        for sample in range(len(index.samples)):
            sums.add(self.read(number, sample).latents)
        if not _sums_match(index.sums, sums.result()):
            raise UserError(f"{path}: the sums in its index are not those of its latents; {self._rebuild_hint}")
        return index

    def check(self, data: Any, model: Any) -> None:
        """Refuse recipe sections that this set cannot serve.

        Args:
            data, model: the recipe's sections of these names.

        Raises:
            UserError: names the recipe's key and value, the manifest's value, and the fix.
        """
        manifest = self.manifest

        def refuse(key: str, value: object, fact: str, fix: str) -> None:
            raise UserError(f"recipe {key}={value} does not fit the shard set {self.folder}, {fact}; {fix}")

        name = manifest.autoencoder.name
        if data.autoencoder != name:
            fix = f"set data.autoencoder={name}, or encode the videos with {data.autoencoder}"
            refuse("data.autoencoder", data.autoencoder, f"which has latents by {name}", fix)
        shape = list(manifest.latent_shape)
        if list(data.latent_shape) != shape:
            fix = f"set data.latent_shape={shape}, or encode the videos at the other size"
            refuse("data.latent_shape", list(data.latent_shape), f"where frame latents are {shape}", fix)
        if model.condition != "none":
            classes = {"label": manifest.labels, "action": manifest.actions}[model.condition]
            if not classes:
                fix = f"set model.condition=none, or encode the videos with their {model.condition}s"
                refuse("model.condition", model.condition, f"which has no {model.condition}s", fix)
            if model.classes != classes:
                fact = f"which has {classes} {model.condition} classes"
                refuse("model.classes", model.classes, fact, f"set model.classes={classes}")
        span = (min_frames(data.frames) - 1) * data.frame_stride + 1
        if span > manifest.min_frames:
            fact = f"where the shortest sample has {manifest.min_frames} frames and {span} are needed"
            fix = "lower data.frames or data.frame_stride, or encode with --min-frames"
            refuse("data.frames", f"{min_frames(data.frames)} with data.frame_stride={data.frame_stride}", fact, fix)

    def _open_file(self, shard: int) -> _ShardFile:
        entry = self.manifest.shards[shard]
        descriptor = self.store.open(entry.location, entry.bytes, entry.sha256)
        return _ShardFile(self.name_of(shard), descriptor, entry.bytes, self._rebuild_hint)

    def _load_index(self, shard: int) -> ShardIndex | AdoptedIndex:
        entry = self.manifest.shards[shard]
        file = ShardIndex.path_of("", entry.file).name
        path, text = self.store.display_name(file), self.store.read_index(file, entry.index_sha256)
        if hashlib.sha256(text).hexdigest() != entry.index_sha256:
            raise DamagedError(path, f"its SHA-256 is not the manifest's; copy it again, or {self._rebuild_hint}")
        is_adopted = self._adopted_reader is not None
        index = parse_index(text, path, AdoptedIndex) if is_adopted else parse_index(text, path, ShardIndex)
        frames = [row.frames for row in index.samples]
        if (index.file, index.bytes, index.sha256) != (entry.file, entry.bytes, entry.sha256):
            raise UserError(f"{path}: it belongs to another shard than the manifest says; {self._rebuild_hint}")
        channels = self.manifest.latent_shape[0]
        if not len(index.sums.total) == len(index.sums.squares) == channels:
            raise UserError(f"{path}: its sums are not those of {channels} channels; {self._rebuild_hint}")
        if (len(frames), sum(frames), min(frames)) != (entry.samples, entry.frames, entry.min_frames):
            raise UserError(
                f"{path}: the manifest counts other samples or frames in {entry.file}; {self._rebuild_hint}"
            )
        return index


def _read_frames(file: _ShardFile, data_offset: int, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Frames `start` to `stop` of a tensor `[F, ...]`; `data_offset` is that of the sample's tensor data."""
    frame_bytes = byte_count(info) // info.shape[0]
    part = replace(info, shape=(stop - start, *info.shape[1:]))
    data = file.read(data_offset + info.offset + start * frame_bytes, (stop - start) * frame_bytes)
    return view_tensor(data, part)
