"""Checksums of checkpoints are computed while they are written: nothing of them is read again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece, local
from far_scale.train.checkpoint.hashed import HashedFile
from far_scale.train.checkpoint.pieces import _SavePlanner
from far_scale.utils.io import read_json, sha256

SIZES = (1, 3, 1000, 400_000)  # the last is hashed beside its write


def pieces() -> dict[str, FlatPiece]:
    draw = torch.Generator().manual_seed(3)
    return {
        f"{kind}/blocks.{size}.weight": FlatPiece(size, 0, torch.randn(size, generator=draw))
        for kind in ("weight", "ema")
        for size in SIZES
    }


def opened_for_reading(do: Callable[[], object], folder: Path) -> tuple[int, list[str]]:
    """How often `do` opens a file below `folder`, and the names of those that it opens to read."""
    opened: list[tuple[str, int]] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(folder) in str(arguments[0]):
            opened.append((Path(arguments[0]).name, arguments[2]))

    sys.addaudithook(watch)  # for good: there is no way to remove one
    do()
    watching = False
    return len(opened), [name for name, flags in opened if flags & os.O_ACCMODE == os.O_RDONLY]


def test_a_save_reads_none_of_its_files_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    count, read = opened_for_reading(lambda: checkpoint.save(run, 10, pieces(), {"lanes": {}}, keep=1), tmp_path)
    # Folders, and files beside their later names, are opened to be synced.
    assert count > 5 and not [name for name in read if name.startswith("__") or name in (".metadata", "state.json")]
    folder = checkpoint.step_folder(run, 10)
    files = [path for path in folder.iterdir() if path.name != "checksums.json"]
    expected = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    assert read_json(folder / "checksums.json", "list") == expected and len(expected) == 3
    assert checkpoint.damage(folder) is None
    dcp.save(pieces(), checkpoint_id=str(tmp_path / "plain"), planner=_SavePlanner(), no_dist=True)
    assert (folder / "__0_0.distcp").read_bytes() == (tmp_path / "plain/__0_0.distcp").read_bytes()
    loaded = {name: FlatPiece(piece.total, 0, torch.zeros_like(piece.data)) for name, piece in pieces().items()}
    checkpoint.load(folder, loaded, single_process=True)
    assert all(torch.equal(loaded[name].data, piece.data) for name, piece in pieces().items())


def test_a_node_local_save_neither(tmp_path: Path) -> None:
    node = tmp_path / "node"
    own = pieces()
    own["weight/blocks.1000.weight"].data.requires_grad_()  # as the copy of a weight does
    _, read = opened_for_reading(lambda: local.save(node, 5, 0, 1, own, {}, None), tmp_path)
    file = node / "step-00000005" / "rank-00000-of-00001.safetensors"
    assert file.name not in read
    save_file({name: piece.data for name, piece in pieces().items()}, tmp_path / "plain")
    assert file.read_bytes() == (tmp_path / "plain").read_bytes()
    described = json.loads(file.with_suffix(".json").read_text())
    assert described["file"] == {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}}
    assert local.newest(node, 0, 0, 1, pieces(), None, None) == 5


def test_what_is_not_written_in_order_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with HashedFile(tmp_path / "file") as file:
        file.write(b"abcd")
        assert file.sum() is not None
        file.seek(1)
        file.write(b"x")
    assert file.sum() is None and (tmp_path / "file").read_bytes() == b"axcd"
    monkeypatch.setattr(HashedFile, "sum", lambda _: None)
    checkpoint.save(tmp_path / "run", 10, pieces(), {"lanes": {}}, keep=1)
    assert checkpoint.damage(checkpoint.step_folder(tmp_path / "run", 10)) is None
    (line,) = capfd.readouterr().err.splitlines()
    assert "step-00000010/__0_0.distcp: was not written in order, so it is read again" in line
