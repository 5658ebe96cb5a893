"""Files of strangers: whatever a pickle in them names, nothing is called and the file is refused in one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from far_scale.convert.official import read_official
from far_scale.data.encode.source_reader import read_latents
from far_scale.data.video.containers import BadVideo
from far_scale.data.video.videos import read_actions, read_video
from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece
from far_scale.utils.errors import UserError
from harness.refusal import refused
from harness.strangers import Evil, seal_again


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that Evil makes; that it does so is tried first."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "tried")))
    assert (tmp_path / "tried").exists()
    return tmp_path / "mark"


def pieces(value: float = 0.0) -> dict[str, FlatPiece]:
    return {f"{kind}/x": FlatPiece(1000, 0, torch.full((1000,), value)) for kind in ("weight", "ema")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two tensors."""
    checkpoint.save(tmp_path / "run", 10, pieces(5.0), {"lanes": {}}, 1)
    return checkpoint.step_folder(tmp_path / "run", 10)


def test_pytorch_and_we_read_the_same(folder: Path) -> None:
    """`.metadata` stays PyTorch's own, so that other programs read checkpoints by torch.distributed.checkpoint."""
    ours, theirs = checkpoint.read_metadata(folder), dcp.FileSystemReader(str(folder)).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    loaded = pieces()
    checkpoint.load(folder, loaded, single_process=True)
    assert all(torch.equal(piece.data, torch.full((1000,), 5.0)) for piece in loaded.values())


def in_place_of_all(metadata: Any, evil: Evil) -> Any:
    return evil


def beside(metadata: Any, evil: Evil) -> Any:
    metadata.planner_data = [evil]
    return metadata


def as_bytes(metadata: Any, evil: Evil) -> Any:
    """An entry that PyTorch's planner hands to torch.load(weights_only=False), with a size that looks right."""
    entry = dcp.metadata.BytesStorageMetadata()
    entry.size = torch.Size([1000])  # type: ignore[attr-defined]
    metadata.state_dict_metadata["ema/x"] = entry
    return metadata


def elsewhere(metadata: Any, evil: Evil) -> Any:
    for place in metadata.storage_data.values():
        place.relative_path = "../../other"
    return metadata


def with_a_hole(metadata: Any, evil: Evil) -> Any:
    metadata.state_dict_metadata["ema/x"].chunks[0].sizes = torch.Size([900])
    return metadata


@pytest.mark.parametrize("change", [in_place_of_all, beside, as_bytes, elsewhere, with_a_hole])
def test_metadata_is_read_without_calling_anything(folder: Path, mark: Path, change: Callable[..., Any]) -> None:
    metadata = dcp.FileSystemReader(str(folder)).read_metadata()
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata, Evil(mark))))
    seal_again(folder)
    assert checkpoint.damage(folder) is None
    refused(
        lambda: checkpoint.load(folder, pieces(), single_process=True), str(folder / ".metadata"), "not the metadata"
    )
    assert not mark.exists()


def test_any_bytes_are_refused_as_metadata(folder: Path) -> None:
    whole = (folder / ".metadata").read_bytes()
    others = [b"", b"none", whole[:-20], pickle.dumps([]), pickle.dumps(3), pickle.dumps(torch.Size([2]))]
    for content in [*others, pickle.dumps(dcp.metadata.Metadata({"x": 3}, storage_data={}))]:  # type: ignore[dict-item]
        (folder / ".metadata").write_bytes(content)
        refused(lambda: checkpoint.load(folder, pieces(), single_process=True), str(folder / ".metadata"))


def test_files_of_tensors_hold_nothing_else(folder: Path, mark: Path) -> None:
    file = folder / "__0_0.distcp"
    start = file.stat().st_size
    torch.save(Evil(mark), folder / "evil")
    file.write_bytes(file.read_bytes() + (folder / "evil").read_bytes())
    metadata = dcp.FileSystemReader(str(folder)).read_metadata()
    for place in metadata.storage_data.values():
        place.offset, place.length = start, file.stat().st_size - start
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(lambda: checkpoint.load(folder, pieces(), single_process=True), str(folder), "something else than tensors")
    assert not mark.exists()


def test_no_other_reader_runs_a_pickle(tmp_path: Path, mark: Path) -> None:
    torch.save({"x": Evil(mark)}, tmp_path / "official.pth")
    torch.save(Evil(mark), tmp_path / "latents.pt")
    np.savez(tmp_path / "video.npz", frames=np.array([Evil(mark)], dtype=object))
    np.save(tmp_path / "actions.npy", np.array([Evil(mark)], dtype=object))
    refused(lambda: read_official(tmp_path / "official.pth"), "official.pth", "more than tensors")
    for read in (
        lambda: read_latents(tmp_path / "latents.pt", (4, 2, 2), "bfloat16"),
        lambda: read_video(tmp_path / "video.npz"),
        lambda: read_actions(tmp_path / "actions.npy", 1),
    ):
        with pytest.raises((BadVideo, UserError)) as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1 and "can still be loaded" not in str(caught.value)
    assert not mark.exists()
