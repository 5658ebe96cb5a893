"""WebDataset tars of latents as others write them, with webdataset's own writer, and their adoption."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import save

from far_scale import autoencoder as autoencoders
from far_scale.data.adopt.adopt import adopt
from far_scale.data.adopt.detect import FormatOptions
from far_scale.data.adopt.sources import find_shards
from far_scale.data.loader.mixture import Mixture
from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from harness.latent_sets import FACTS, make_sample

LANES = 4
DEALING = PackingConfig(lanes=LANES, frames=(4, 9), frame_stride=2, shuffle_window=4, seed=7, clips_per_pack=2)
BOTH: dict[str, Any] = {"actions": FACTS.actions, "labels": FACTS.labels}


def as_npy(sample: Sample) -> dict[str, Any]:
    """float16 in an .npy, label and actions in members of their own."""
    assert sample.actions is not None
    return {
        "latent.npy": sample.latents.half().numpy(),
        "actions.npy": sample.actions.numpy().astype(np.int32),
        "cls": sample.label,
        "json": {"fps": 8, "caption": "of no use"},
    }


def as_pth(sample: Sample) -> dict[str, Any]:
    """bfloat16 in a .pth, all else in the JSON."""
    assert sample.actions is not None
    return {"pth": sample.latents, "json": {"fps": 8.0, "label": sample.label, "actions": sample.actions.tolist()}}


def as_safetensors(sample: Sample) -> dict[str, Any]:
    """Latents and actions in one .safetensors beside a tensor of no use."""
    assert sample.actions is not None
    tensors = {"latents": sample.latents, "action": sample.actions, "mask": sample.actions.bool()}
    return {"safetensors": save(tensors), "cls": sample.label, "json": {"fps": 8.0}}


def write_tars(folder: Path, frames: list[int], per_shard: int, members: Callable[[Sample], dict[str, Any]]) -> None:
    """`set-000000.tar`, ... of the samples of `latent_sets`."""
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/set-%06d.tar", maxcount=per_shard, verbose=0) as out:
        for number, count in enumerate(frames):
            sample = make_sample(number, count)
            out.write({"__key__": sample.key, **members(sample)})


def tar_of(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    """A tar by Python's tarfile."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def npy(array: np.ndarray) -> bytes:
    """An array as an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def torch_file(stored: object) -> bytes:
    """What torch.save makes."""
    file = io.BytesIO()
    torch.save(stored, file)
    return file.getvalue()


def json_bytes(**values: Any) -> bytes:
    """A JSON member."""
    return json.dumps(values).encode()


@pytest.fixture
def four_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder of `latent_sets`, which nobody has, is known by its name."""
    known = FACTS.autoencoder
    stand_in = SimpleNamespace(
        name=known.name,
        weight_hash=known.weight_hash,
        scaling_factor=known.scaling_factor,
        latent_channels=FACTS.latent_shape[0],
    )
    real = autoencoders.load
    monkeypatch.setattr(autoencoders, "load", lambda name: stand_in if name == known.name else real(name))


def adopted(
    source: str | Path,
    out: Path,
    max_rejected: float = 0.0,
    autoencoder: str = FACTS.autoencoder.name,
    classes: tuple[str, ...] | None = None,
    **options: Any,
) -> Manifest:
    """Adopt a source."""
    return adopt(find_shards([str(source)]), out, autoencoder, FormatOptions(**options), classes, max_rejected)


def packs_of(
    source: ShardSet | Mixture, steps: int, lanes: range | list[int] = range(LANES), **more: Any
) -> list[Pack]:
    """The packs of a rank with these lanes."""
    scaling, packing = LatentScaling.of(source.manifest, "channel"), more.pop("packing", DEALING)
    with PackLoader(source, scaling, list(lanes), packing, **more) as packs:
        return [pack for step in islice(packs, steps) for pack in step]


def same(first: list[Pack], second: list[Pack]) -> bool:
    """Whether packs are the same, to the last bit."""

    def facts(pack: Pack) -> tuple[Any, ...]:
        tensors = [pack.latents, pack.actions, pack.labels]
        return pack.keys, pack.lane, pack.step, pack.lane_state, [None if t is None else t.tolist() for t in tensors]

    return [facts(pack) for pack in first] == [facts(pack) for pack in second]
