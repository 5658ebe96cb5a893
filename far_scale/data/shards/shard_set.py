"""Reading a shard set at random: any sample by its number, any part of it by offset."""

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
from far_scale.data.remote.fetch import is_remote, shown
from far_scale.data.shards.adopted import AdoptedRow
from far_scale.data.shards.damage import DamagedError
from far_scale.data.shards.foreign_samples import SampleReader
from far_scale.data.shards.index import AdoptedIndex, ChannelSums, IndexRow, LatentSums, ShardIndex, parse_index
from far_scale.data.shards.manifest import DTYPES, MANIFEST_NAME, Manifest
from far_scale.data.shards.sample import (
    Mismatch,
    Sample,
    TensorPlace,
    byte_count,
    index_shard,
    parse_facts,
    parse_header,
    view,
)
from far_scale.data.shards.store import StagedStore, adopted_store, manifest_text, missing, name_of, store_of
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256

T = TypeVar("T")
_OPEN_SHARDS = 128  # of a rank: each lane's shuffle window may stretch over a few
_KNOWN_INDEXES = 256


class _Recent(Generic[T]):
    """The values used last, made when they are missing. What falls out is closed when its last user lets go of it.

    What is damaged is not tried again, which may take minutes where it comes from far away.
    """

    def __init__(self, size: int, make: Callable[[int], T]) -> None:
        self._size, self._make, self._lock = size, make, threading.Lock()
        self._values: OrderedDict[int, T] = OrderedDict()
        self._damaged: dict[int, DamagedError] = {}

    def __getitem__(self, key: int) -> T:
        with self._lock:
            if (known := self._damaged.get(key)) is not None:
                raise DamagedError(known.file, known.problem)
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

    def drop(self, key: int, unwanted: Callable[[T], bool]) -> None:
        """Let go of the unwanted, but for that of `key`."""
        with self._lock:
            for other in [other for other, value in self._values.items() if other != key and unwanted(value)]:
                del self._values[other]

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


class _Tar:
    """An open shard. It closes when nothing refers to it, so a reader in another thread never loses its descriptor."""

    def __init__(self, name: str, descriptor: int, size: int, again: str) -> None:
        """`name` is what messages call it, `again` how it is made again; the descriptor is closed with this."""
        self.descriptor, self.name, self.size, self._again = descriptor, name, size, again
        check_size(name, os.fstat(descriptor).st_size, size, again)

    def read(self, offset: int, size: int) -> bytearray:
        """`size` bytes from `offset`; what does not lie in the file is refused before anything is allocated."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise Mismatch(f"it should have {size} bytes at {offset}, beyond the end of the file")
        data = bytearray(size)
        rest, filled = memoryview(data), 0
        while filled < size:
            try:
                count = os.preadv(self.descriptor, [rest[filled:]], offset + filled)
            except OSError as error:  # of a disk, or a file server
                raise Mismatch(f"reading fails: {error.strerror}") from None
            if count == 0:  # it was cut off after it was opened
                check_size(self.name, os.fstat(self.descriptor).st_size, self.size, self._again)
                raise Mismatch("the file ends early")
            filled += count
        return data

    def __del__(self) -> None:
        os.close(self.descriptor)


class _WrongKind(Mismatch):
    """A sound sample that does not belong into this set."""


def check_size(name: str, size: int, expected: int, again: str) -> None:
    """Refuse a shard whose size is not the manifest's."""
    if size != expected:
        state = "truncated" if size < expected else "not the shard that the manifest describes"
        raise DamagedError(name, f"{state} ({size} bytes, the manifest says {expected}); copy it again, or {again}")


def _close(first: ChannelSums, second: ChannelSums) -> bool:
    """Whether sums of the same latents, added up in another order, would differ so little."""
    # They differ by rounding alone, which is far below a millionth of the absolute values' sum.
    total, squares = (np.abs(np.subtract(getattr(first, name), getattr(second, name))) for name in ("total", "squares"))
    known = np.asarray(second.squares)
    rounding = 1e-6 * np.sqrt(second.values * known) + 1e-12
    return first.values == second.values and bool((total <= rounding).all() and (squares <= 1e-6 * known).all())


class ShardSet:
    """Shards and their manifest, in a folder or far away; safe to read from several threads at once.

    Attributes:
        folder: where they lie, folder or URL, as messages call it.
        manifest: what the set is.
        store: where its files come from.
        far: whether its shards are read in the node's cache alone: they are remote, or compressed.
        cached: whether its shards come through the node's cache, from wherever.
        staged: a local set that does, with its counters; None otherwise.
    """

    def __init__(self, where: str | Path, manifest: Manifest, node: NodeCache | None = None) -> None:
        """`node` is the node's cache: a remote set is read through it, and a local one where it is given.

        Raises:
            UserError: it is remote, and there is no cache, or one that does not hold its largest shard.
        """
        self.folder = shown(str(where)) if is_remote(where) else str(where)
        self.manifest, self.cached = manifest, node is not None
        adopted = manifest.adopted is not None
        self._again = "adopt the shards again" if adopted else "encode the set again"
        self.far = bool(manifest.shards.cached) if adopted else is_remote(where)
        # Of a local set whose shards are remote or compressed, the indexes are read where they lie.
        own = store_of(where, None if self.far and not is_remote(where) else node, self._again)
        self.staged = own if isinstance(own, StagedStore) else None
        self.store = adopted_store(own, node, self._again) if adopted else own
        self._adopted = SampleReader.of(manifest) if adopted else None
        largest = int(manifest.shards.bytes.max())
        if self.far and node is not None and node.most_bytes < largest:
            raise UserError(
                f"data.cache_gb={node.most_bytes / 1e9:g} holds not one shard of {self.folder}, which has shards of "
                f"{largest / 1e9:g} GB; give it room for those that are read at once"
            )
        self._tars = _Recent(_OPEN_SHARDS, self._open_tar)
        self._indexes = _Recent(_KNOWN_INDEXES, self._load_index)

    @staticmethod
    def open(where: str | Path, node: NodeCache | None = None) -> ShardSet:
        """Open a shard set; the manifest is checked and, of a local set, that each shard is there in its full size.

        Raises:
            UserError: no manifest or not a valid one; a shard is missing or has another size.
        """
        store_of(where, node)  # without a cache nothing is fetched
        shard_set = ShardSet.known(where, manifest_text(where), node)
        for _, problem in shard_set.missing_shards():
            raise problem
        return shard_set

    @staticmethod
    def known(where: str | Path, text: bytes, node: NodeCache | None = None) -> ShardSet:
        """The shard set whose manifest has been read already; no shard is looked at.

        Raises:
            UserError: it is not a valid manifest.
        """
        return ShardSet(where, Manifest.parse(text, name_of(where, MANIFEST_NAME)), node)

    def missing_shards(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, DamagedError]]:
        """Of every `parts`-th shard, from `part` on, those that are not there in their full size: number and problem.

        Those far away are not asked for: each one is checked when it is fetched.
        """
        if self.far:
            return
        for number in range(part, len(self.manifest.shards), parts):
            entry = self.manifest.shards[number]
            name = self.store.name(entry.place)
            try:
                check_size(name, os.stat(name).st_size, entry.bytes, self._again)
            except FileNotFoundError:
                yield number, missing(name, "shard", self._again)
            except DamagedError as problem:
                yield number, problem

    @property
    def samples_per_shard(self) -> list[int]:
        counts: list[int] = self.manifest.shards.samples.tolist()
        return counts

    def index(self, shard: int) -> ShardIndex | AdoptedIndex:
        """Where the samples of a shard lie.

        Raises:
            UserError: the index is missing, or is not the one that the manifest was written with.
        """
        return self._indexes[shard]

    def name_of(self, shard: int) -> str:
        """A shard as messages call it."""
        return self.store.name(self.manifest.shards[shard].place)

    def fetch_ahead(self, shard: int) -> None:
        """Have the index and the shard in the node's cache before they are asked for, unless there is no room.

        Raises:
            UserError: the cache cannot keep them; what cannot be fetched is left to whoever asks for it.
        """
        entry = self.manifest.shards[shard]
        self.store.fetch_ahead(ShardIndex.path_of("", entry.file).name, entry.index_sha256, None)
        self.store.fetch_ahead(entry.place, entry.sha256, entry.bytes)

    def frames_of(self, shard: int, sample: int) -> int:
        """Frame count of a sample.

        Raises:
            UserError: as by `index`.
        """
        return self.index(shard).samples[sample].frames

    def read(self, shard: int, sample: int, start: int = 0, frames: int | None = None, stride: int = 1) -> Sample:
        """A sample, or of its frames `start`, `start + stride`, ... as many as `frames`; only their bytes are read.

        The latents are a view of the bytes as they were read, without a copy.

        Raises:
            DamagedError: the sample or its shard is damaged, or cannot be had.
            UserError: it is sound and of another kind than the manifest says.
            ValueError: the sample does not have these frames.
        """
        row = self.index(shard).samples[sample]
        count = row.frames if frames is None else frames
        last = start + (count - 1) * stride
        if start < 0 or count < 1 or stride < 1 or last >= row.frames:
            raise ValueError(f"frames {start} to {last} of {row.key}, which has {row.frames}")
        try:
            return self._read(self._tar(shard), row, start, last + 1, stride)
        except Mismatch as problem:
            name = self.name_of(shard)
            text = f"sample {row.key!r} is not what the index describes ({problem}); {self._again}"
            if isinstance(problem, _WrongKind):
                raise UserError(f"{name}: {text}") from None
            raise DamagedError(name, text, row.key) from None
        except DamagedError as problem:
            raise DamagedError(problem.file, problem.problem, row.key) from None

    def _tar(self, shard: int) -> _Tar:
        """An open shard, to be read from now."""
        tar = self._tars[shard]
        if self.far:
            touch(tar.descriptor)
        if self.cached:
            # What has left the cache takes no place on the disk once it is closed; what is read now is read on.
            self._tars.drop(shard, lambda other: is_evicted(other.descriptor))
        return tar

    def _read(self, tar: _Tar, row: IndexRow | AdoptedRow, start: int, stop: int, stride: int) -> Sample:
        manifest = self.manifest
        if isinstance(row, AdoptedRow):
            assert self._adopted is not None
            return self._adopted.read(tar.read, row, start, stop, stride)
        places = parse_header(bytes(tar.read(row.tensors_offset, row.header_bytes)), row.tensors_bytes)
        latent, action = places["latent"], places.get("action")
        if latent.shape != (row.frames, *manifest.latent_shape) or latent.dtype != DTYPES[manifest.latent_dtype]:
            raise _WrongKind(f"its latents are {list(latent.shape)} {latent.dtype}")
        if (action is not None) != (manifest.actions > 0):
            raise _WrongKind("it has actions and the set has none, or the other way round")
        data = row.tensors_offset + row.header_bytes
        facts = parse_facts(bytes(tar.read(row.json_offset, row.json_bytes)), row.frames)
        label = facts["label"]
        if not (0 <= label < manifest.labels if label is not None else manifest.labels == 0):
            raise _WrongKind(f"its label is {label}, and the set has {manifest.labels} labels")
        latents = _read_frames(tar, data, latent, start, stop)[::stride]
        actions = None if action is None else _read_frames(tar, data, action, start, stop)[::stride]
        # Checked here, since on a GPU a class that the embedding does not have ends the process without a word of it.
        if actions is not None and not 0 <= int(actions.min()) <= int(actions.max()) < manifest.actions:
            raise _WrongKind(f"it has an action beyond the set's {manifest.actions}")
        return Sample(
            key=row.key,
            latents=latents,
            actions=actions,
            label=label,
            fps=facts["fps"],
            source=facts["source"],
        )

    def verify_shard(self, number: int) -> ShardIndex | AdoptedIndex:
        """Read every byte of a shard: checksums, members against the index, each sample, the sums of its latents.

        Returns:
            Its index.

        Raises:
            UserError: the first thing that is wrong with it.
        """
        entry = self.manifest.shards[number]
        index = self.index(number)
        self._open_tar(number)  # missing, or of another size
        path = self.store.path(entry.place, entry.bytes, entry.sha256)
        if sha256(path) != entry.sha256:
            raise UserError(f"{path}: its SHA-256 is not the manifest's; copy it again, or {self._again}")
        if self._adopted is None:
            rows: list[IndexRow] | list[AdoptedRow] = index_shard(path, entry.file)
        else:
            rows = self._adopted.scan(path, self.name_of(number), entry.file).rows
        if rows != index.samples:
            raise UserError(f"{path}: its samples are not those of its index; {self._again}")
        sums = LatentSums(len(index.sums.total))
        for sample in range(len(index.samples)):
            sums.add(self.read(number, sample).latents)
        if not _close(index.sums, sums.result()):
            raise UserError(f"{path}: the sums in its index are not those of its latents; {self._again}")
        return index

    def check(self, recipe: Any) -> None:
        """Refuse a recipe that this set cannot serve.

        Raises:
            UserError: the recipe's key, what it says, what the manifest says, and the mend.
        """
        manifest, data, model = self.manifest, recipe.data, recipe.model

        def refuse(key: str, value: object, fact: str, mend: str) -> None:
            raise UserError(f"recipe {key}={value} does not fit the shard set {self.folder}, {fact}; {mend}")

        name = manifest.autoencoder.name
        if data.autoencoder != name:
            mend = f"set data.autoencoder={name}, or encode the videos with {data.autoencoder}"
            refuse("data.autoencoder", data.autoencoder, f"whose latents are by {name}", mend)
        shape = list(manifest.latent_shape)
        if list(data.latent_shape) != shape:
            mend = f"set data.latent_shape={shape}, or encode the videos at the other size"
            refuse("data.latent_shape", list(data.latent_shape), f"whose frame latents are {shape}", mend)
        if model.condition != "none":
            classes = {"label": manifest.labels, "action": manifest.actions}[model.condition]
            if not classes:
                mend = f"set model.condition=none, or encode the videos with their {model.condition}s"
                refuse("model.condition", model.condition, f"which has no {model.condition}s", mend)
            if model.classes != classes:
                fact = f"which has {classes} {model.condition} classes"
                refuse("model.classes", model.classes, fact, f"set model.classes={classes}")
        span = (min_frames(data.frames) - 1) * data.frame_stride + 1
        if span > manifest.min_frames:
            fact = f"whose shortest sample has {manifest.min_frames} frames and {span} are needed"
            mend = "lower data.frames or data.frame_stride, or encode with --min-frames"
            refuse("data.frames", f"{min_frames(data.frames)} with data.frame_stride={data.frame_stride}", fact, mend)

    def _open_tar(self, shard: int) -> _Tar:
        entry = self.manifest.shards[shard]
        descriptor = self.store.open(entry.place, entry.bytes, entry.sha256)
        return _Tar(self.name_of(shard), descriptor, entry.bytes, self._again)

    def _load_index(self, shard: int) -> ShardIndex | AdoptedIndex:
        entry = self.manifest.shards[shard]
        file = ShardIndex.path_of("", entry.file).name
        path, text = self.store.name(file), self.store.read_index(file, entry.index_sha256)
        if hashlib.sha256(text).hexdigest() != entry.index_sha256:
            raise DamagedError(path, f"its SHA-256 is not the manifest's; copy it again, or {self._again}")
        own = self._adopted is None
        index = parse_index(text, path, ShardIndex) if own else parse_index(text, path, AdoptedIndex)
        frames = [row.frames for row in index.samples]
        if (index.file, index.bytes, index.sha256) != (entry.file, entry.bytes, entry.sha256):
            raise UserError(f"{path}: it belongs to another shard than the manifest says; {self._again}")
        channels = self.manifest.latent_shape[0]
        if not len(index.sums.total) == len(index.sums.squares) == channels:
            raise UserError(f"{path}: its sums are not those of {channels} channels; {self._again}")
        if (len(frames), sum(frames), min(frames)) != (entry.samples, entry.frames, entry.min_frames):
            raise UserError(f"{path}: the manifest counts other samples or frames in {entry.file}; {self._again}")
        return index


def _read_frames(tar: _Tar, data: int, place: TensorPlace, start: int, stop: int) -> torch.Tensor:
    """Frames `start` to `stop` of a tensor `[F, ...]`; `data` is where the data of the sample's tensors begins."""
    frame_bytes = byte_count(place) // place.shape[0]
    part = replace(place, shape=(stop - start, *place.shape[1:]))
    return view(tar.read(data + place.begin + start * frame_bytes, (stop - start) * frame_bytes), part)
