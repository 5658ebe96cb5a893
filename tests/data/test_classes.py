"""Classes of videos and their names: folders, lists, name files, and sets that do not fit one another."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.config.schema import WeightedShards
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, read_config, save_model_dir
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.convert import convert
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.records import classes_differ
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.video.sources import find_source_set, find_sources
from far_scale.data.video.video_lists import read_class_names
from far_scale.data.video.videos import write_mp4
from far_scale.distributed.process_group import Processes
from far_scale.evaluation.rollouts.episodes import EpisodeSelection, load_episodes
from far_scale.model import FAR, FARConfig
from far_scale.train import resume
from far_scale.train.checkpoint import export as zero
from far_scale.train.curriculum import stages
from far_scale.train.resume_checks import check_same_classes
from far_scale.train.run_state import stage_metadata
from far_scale.train.shard_sets import open_sets, open_source
from far_scale.utils.event_log import EventLog
from far_scale.utils.io import sha256
from harness.latent_sets import FACTS, read_all, write_set
from harness.launch import ROOT
from harness.refusal import refused

AUTOENCODER = "compact-vizdoom-f8c32"
Encode = Callable[..., list[tuple[str, int | None]]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of two frames."""
    path = tmp_path_factory.mktemp("clip") / "1.mp4"
    write_mp4(path, np.full((2, 64, 64, 3), 90, np.uint8), 10)
    return path


@pytest.fixture
def encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encode:
    """Run tools/encode_latents.py into tmp_path/set; returns source and label of each sample."""

    def run(videos: Path, *more: object, out: str = "set") -> list[tuple[str, int | None]]:
        where = ["--videos", videos, "--out", tmp_path / out, "--autoencoder", AUTOENCODER, "--workers", 1]
        monkeypatch.setattr(sys, "argv", ["encode_latents.py", *map(str, [*where, *more])])
        runpy.run_path(str(ROOT / "tools" / "encode_latents.py"), run_name="__main__")
        return (
            [(s.source, s.label) for s in read_all(tmp_path / out)]
            if (tmp_path / out / "manifest.json").exists()
            else []
        )

    return run


def folders(root: Path, clip: Path, *names: str) -> Path:
    """A folder with a subfolder of each name that holds a video."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, root / name / "1.mp4")
    return root


def labels_of(videos: Path, labels: int, *classes: str) -> dict[str, int | None]:
    """The class of each folder."""
    found = find_source_set(videos, None, labels, classes or None)
    return {source.path.parent.relative_to(videos).as_posix(): source.folder_label for source in found.sources}


def test_a_linked_class_folder_is_a_class(clip: Path, tmp_path: Path, encode: Encode) -> None:
    folders(tmp_path / "store", clip, "b")
    videos = folders(tmp_path / "videos", clip, "a", "c", ".Trash-1000", "$RECYCLE.BIN", "__MACOSX")
    (videos / "b").symlink_to("../store/b")
    assert encode(videos, "--labels", 3) == [("a/1.mp4", 0), ("b/1.mp4", 1), ("c/1.mp4", 2)]
    assert Manifest.read(tmp_path / "set").classes == ("a", "b", "c")
    (tmp_path / "classInd.txt").write_text("\ufeff1 a\n2 b\n3 c\n", encoding="utf-8")
    (tmp_path / "trainlist01.txt").write_text("\ufeffb/1.mp4 2\r\n", encoding="utf-8")
    assert encode(videos, "--labels", 3, "--split", tmp_path / "trainlist01.txt", out="split") == [("b/1.mp4", 1)]
    assert Manifest.read(tmp_path / "split").classes == ("a", "b", "c")


def test_folders_named_by_numbers_have_these_classes(clip: Path, tmp_path: Path, encode: Encode) -> None:
    videos = folders(tmp_path / "videos", clip, "0", "1", "2", "10")
    assert dict(encode(videos, "--labels", 11)) == {"0/1.mp4": 0, "1/1.mp4": 1, "2/1.mp4": 2, "10/1.mp4": 10}
    assert Manifest.read(tmp_path / "set").classes == tuple(map(str, range(11)))
    held_out = folders(tmp_path / "held-out", clip, "10", "2")
    assert dict(encode(held_out, "--labels", 11, out="held")) == {"10/1.mp4": 10, "2/1.mp4": 2}
    assert Manifest.read(tmp_path / "held").classes == Manifest.read(tmp_path / "set").classes
    refused(lambda: find_source_set(videos, labels=10), f"{videos / '10'}: is class 10", "--labels 10 has 0 to 9")
    assert labels_of(folders(tmp_path / "padded", clip, "00", "01", "007"), 8) == {"00": 0, "01": 1, "007": 7}
    refused(
        lambda: find_source_set(folders(videos, clip, "01"), labels=11),
        str(videos / "1"),
        str(videos / "01"),
        "class 1",
    )
    assert len(find_sources(videos)) == 5  # without labels, folders may have any names
    shutil.rmtree(videos / "01")
    assert labels_of(folders(videos, clip, "x"), 5) == {"0": 0, "1": 1, "10": 2, "2": 3, "x": 4}
    assert labels_of(folders(tmp_path / "nested", clip, "7/0", "7/1", "8/0"), 3) == {"7/0": 0, "7/1": 1, "8/0": 2}
    assert labels_of(folders(tmp_path / "inner", clip, "train/2", "train/10"), 11) == {"train/2": 2, "train/10": 10}
    assert labels_of(folders(tmp_path / "one", clip, "3"), 4) == {"3": 3}
    assert labels_of(folders(tmp_path / "alone", clip, "train/3"), 4) == {"train/3": 3}
    assert find_source_set(tmp_path / "one" / "3", labels=1).classes is None  # named itself, it is no class
    (tmp_path / "list.csv").write_text("video\nvideos/2/1.mp4\nvideos/10/1.mp4\n")
    assert [source.folder_label for source in find_source_set(tmp_path / "list.csv", labels=11).sources] == [10, 2]


def test_held_out_folders_have_the_classes_of_the_training_set(
    clip: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    training = folders(tmp_path / "training", clip, "a", "b", "c")
    held_out = folders(tmp_path / "held-out", clip, "b", "c")
    encode(training, "--labels", 3, out="train")
    assert "warning" not in capsys.readouterr().err
    assert encode(held_out, "--labels", 3, out="wrong") == [("b/1.mp4", 0), ("c/1.mp4", 1)]
    assert f"warning: {held_out}: 2 class folders, but --labels 3" in capsys.readouterr().err
    right = [("b/1.mp4", 1), ("c/1.mp4", 2)]
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n\r\nc\r\n")
    assert encode(held_out, "--classes", tmp_path / "names.txt", out="by-file") == right
    assert encode(held_out, "--classes-of", tmp_path / "train", "--labels", 3, out="by-set") == right
    assert encode(held_out / "c", "--classes-of", tmp_path / "train", out="one") == [("1.mp4", 2)]
    assert "warning" not in capsys.readouterr().err
    manifests = {name: Manifest.read(tmp_path / name) for name in ("train", "wrong", "by-file", "by-set")}
    assert {manifest.labels for manifest in manifests.values()} == {3}
    assert manifests["by-file"].classes == manifests["by-set"].classes == manifests["train"].classes == ("a", "b", "c")
    pair = [WeightedShards(shards=str(tmp_path / name), weight=1) for name in ("train", "by-set", "wrong")]
    assert open_source(tuple(pair[:2])).manifest.classes == ("a", "b", "c")
    refused(
        lambda: open_source(tuple(pair)), str(tmp_path / "wrong"), str(tmp_path / "train"), "class 0 is 'b', there 'a'"
    )
    folders(held_out, clip, "d")
    with pytest.raises(SystemExit):
        encode(held_out, "--classes", tmp_path / "names.txt", out="more")
    assert f"{held_out / 'd'}: this folder's name is none of the 3 class names" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        encode(training, "--classes", tmp_path / "names.txt", "--labels", 2, out="fewer")
    assert "--labels 2: there are 3 class names" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("a\nb\na\n")
    refused(lambda: read_class_names(tmp_path / "names.txt"), "names.txt:3: class a is on line 1 already")


def test_names_and_bytes_do_not_depend_on_tasks_and_are_converted(clip: Path, tmp_path: Path, encode: Encode) -> None:
    videos, more = folders(tmp_path / "videos", clip, "a", "b", "c"), ("--labels", 3, "--samples-per-shard", 1)
    encode(videos, *more, out="whole")
    for task in (1, 0):
        encode(videos, *more, "--tasks", 2, "--task", task, out="parts")
    encode(videos, *more, "--tasks", 2, "--merge", out="parts")
    digests = [{path.name: sha256(path) for path in (tmp_path / name).iterdir()} for name in ("whole", "parts")]
    assert digests[0] == digests[1] and Manifest.read(tmp_path / "parts").classes == ("a", "b", "c")
    convert(ShardSet.open(tmp_path / "whole"), tmp_path / "mds", "mds")
    convert(ShardSet.open(tmp_path / "mds"), tmp_path / "tars", "tar")
    assert sha256(tmp_path / "tars" / "manifest.json") == digests[0]["manifest.json"]
    assert Manifest.read(tmp_path / "mds").classes == ("a", "b", "c")
    with pytest.raises(SystemExit):  # other classes of the same videos are another set
        (tmp_path / "names.txt").write_text("c\nb\na\n")
        encode(videos, *more, "--classes", tmp_path / "names.txt", out="parts")


def test_a_set_begun_before_class_names_existed_continues(
    clip: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    for names, fits in ((("a", "b"), True), (("2", "10"), False)):
        videos, out = folders(tmp_path / names[0], clip, *names), tmp_path / f"set-{names[0]}"
        encode(videos, "--labels", 11, out=out.name)
        settings = json.loads((out / "encoding.json").read_text())
        settings.pop("classes")
        (out / "encoding.json").write_text(json.dumps(settings))
        (out / "manifest.json").unlink()
        if fits:
            encode(videos, "--labels", 11, out=out.name)
            assert "classes" not in json.loads((out / "manifest.json").read_text())
        else:
            with pytest.raises(SystemExit):
                encode(videos, "--labels", 11, out=out.name)
            assert "was encoded with classes None, not 11 with fingerprint" in capsys.readouterr().err


def test_labels_of_files_override_those_of_folders(clip: Path, tmp_path: Path, encode: Encode) -> None:
    """In an .npz file or the one beside the video; then the folders are not classes and give no names."""
    videos, frames = folders(tmp_path / "videos", clip, "part-0", "part-1"), np.zeros((2, 64, 64, 3), np.uint8)
    np.savez(videos / "part-0" / "2.npz", frames=frames, label=4)
    np.savez(videos / "part-1" / "1.npz", label=3)
    wanted = [("part-0/1.mp4", 0), ("part-0/2.npz", 4), ("part-1/1.mp4", 3)]
    assert encode(videos, "--labels", 5) == wanted
    assert Manifest.read(tmp_path / "set").classes is None
    before = (tmp_path / "set" / "manifest.json").read_bytes()
    assert encode(videos, "--labels", 5) == wanted  # all of it once more: there is nothing to do
    assert (tmp_path / "set" / "manifest.json").read_bytes() == before
    np.savez(videos / "part-0" / "2.npz", frames=frames, label=0)
    np.savez(videos / "part-1" / "1.npz", label=1)
    assert [label for _, label in encode(videos, "--labels", 2, out="same")] == [0, 0, 1]
    assert Manifest.read(tmp_path / "same").classes == ("part-0", "part-1")


def test_an_empty_label_is_refused_where_others_are_given(clip: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        shutil.copy(clip, tmp_path / name)
    rows = {
        "csv": ["video,label", "a.mp4,1", "b.mp4,"],
        "CSV": ["video, label", "a.mp4, 1", "b.mp4,  "],
        "jsonl": ['{"video": "a.mp4", "label": 1}', '{"video": "b.mp4", "label": null}'],
        "Jsonl": ['{"video": "a.mp4", "label": 1}', '{"video": "b.mp4", "label": ""}'],
        "JSONL": ['{"video": "a.mp4", "label": 1}', '{"video": "b.mp4"}'],
    }
    for suffix, lines in rows.items():
        path, row = tmp_path / f"list.{suffix}", len(lines)
        path.write_text("\n".join(lines) + "\n")
        refused(lambda path=path: find_source_set(path, labels=2), f"{path}:{row}: b.mp4 has no label", "give it one")
        assert [source.label for source in find_sources(path)] == [1, None]  # nobody asks for labels
    official = tmp_path / "list.json"
    official.write_text('[{"video_path": "a.mp4", "label": 1}, {"video_path": "b.mp4", "label": null}]')
    refused(lambda: find_source_set(official, labels=2), f"{official}: entry 1: b.mp4 has no label")
    np.savez(tmp_path / "b.npz", label=0)
    for suffix in rows:
        assert [source.label for source in find_source_set(tmp_path / f"list.{suffix}", labels=2).sources] == [1, 0]
    np.savez(tmp_path / "c.npz", frames=np.zeros((2, 8, 8, 3), np.uint8), label=3)
    (tmp_path / "list.csv").write_text("video,label\na.mp4,1\nc.npz,\n")
    assert [source.label for source in find_source_set(tmp_path / "list.csv", labels=4).sources] == [1, 3]
    np.savez(tmp_path / "c.npz", label=-3)
    refused(lambda: find_source_set(tmp_path / "list.csv", labels=4), "list.csv:3: c.npz has no label", "`label` is -3")


def test_labels_beside_the_videos_of_a_list_without_labels(clip: Path, tmp_path: Path) -> None:
    videos = folders(tmp_path, clip, "a", "b")
    listed = tmp_path / "list.csv"
    listed.write_text("video\na/1.mp4\nb/1.mp4\n")
    assert [source.folder_label for source in find_source_set(listed, labels=2).sources] == [0, 1]
    np.savez(videos / "a/1.npz", label=1)
    refused(lambda: find_source_set(listed, labels=2), "list.csv:3: 1.mp4 has no label")
    np.savez(videos / "b/1.npz", label=0)
    found = find_source_set(listed, labels=2)
    assert [source.label for source in found.sources] == [1, 0] and found.classes is None


def test_lists_as_other_programs_write_them(clip: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "b\u2028\u0085.mp4", "c\n,\n.mp4"):
        shutil.copy(clip, tmp_path / name)
    np.save(tmp_path / "turns.npy", np.zeros(2, np.int64))
    texts = {
        "excel.csv": "\ufeffvideo,label\r\na.mp4,1\r\n",
        "quoted.csv": '\ufeff"video","label"\r\n"a.mp4","1"\r\n',
        "pandas.csv": "video,label\na.mp4,1.0\n",
        "spaces.csv": "video, label, actions\na.mp4 , 1, turns.npy\n",
        "lines.csv": 'video,label\n"c\n,\n.mp4",1\na.mp4,1\n',
        "old-mac.csv": "video,label\ra.mp4,1\r",
        "marked.jsonl": '\ufeff{"video": "a.mp4", "label": 1.0}\r\n',
        "text.jsonl": '{"video": "a.mp4", "label": " 1"}',
        "separators.jsonl": '{"video": "b\u2028\u0085.mp4", "label": 1}\n',
        "joined.jsonl": '\ufeff{"video": "a.mp4", "label": 1}\n\ufeff{"video": "b\u2028\u0085.mp4", "label": 1}\n',
        "marked.json": '\ufeff[{"video_path": "a.mp4", "label": 1}]',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        sources = find_source_set(tmp_path / name, labels=2).sources
        assert {source.label for source in sources} == {1} and all(source.path.is_file() for source in sources), name
    assert find_sources(tmp_path / "spaces.csv")[0].actions == tmp_path / "turns.npy"
    assert len(find_sources(tmp_path / "joined.jsonl")) == len(find_sources(tmp_path / "lines.csv")) == 2
    for name, text, *words in [
        ("1.csv", "video,label\na.mp4,1.5\n", "1.csv:2: `label` is '1.5'"),
        ("2.csv", "video,label\n,1\n", "2.csv:2: `video` is empty"),
        ("3.jsonl", '{"video": null, "label": 1}\n', "3.jsonl:1: `video` is empty"),
        ("4.jsonl", '{"video": "a.mp4", "label": true}\n', "4.jsonl:1: `label` is True"),
        ("5.csv", "video,label\na.mp4,-1\n", "5.csv:2: `label` is '-1'"),
        ("6.csv", 'video,label\na.mp4,1\n"b.mp4,0\nc.mp4,1\n', "6.csv:3: no CSV", "quote that is not closed"),
        ("7.csv", 'video,label\n"a.mp4,1\n"b.mp4",0\nc.mp4,1\n', "7.csv:2: no CSV", "quote that is not closed"),
        ("8.csv", "video,label,video\na.mp4,1,b.mp4\n", "8.csv: has the column `video` twice"),
        ("list.txt", "a.mp4\n", "list.txt: is a text file, not a video", ".csv file with the header video,label"),
        ("list.tsv", "video\tlabel\na.mp4\t1\n", "list.tsv: is a text file"),
    ]:
        (tmp_path / name).write_text(text)
        refused(lambda name=name: find_source_set(tmp_path / name, labels=2), *words)
    for name in ("unicode.csv", "unicode.jsonl", "unicode.txt"):
        (tmp_path / name).write_text("video,label\na.mp4,1\n", encoding="utf-16")
        refused(
            lambda name=name: find_source_set(tmp_path / name, labels=2), name, "UTF-16" if name[-1] != "t" else "text"
        )


def test_one_bad_video_is_a_reject(clip: Path, tmp_path: Path, encode: Encode) -> None:
    """A broken link, missing actions, and actions or a label out of range do not stop the other videos."""
    videos, frames = tmp_path / "videos", np.zeros((2, 64, 64, 3), np.uint8)
    videos.mkdir()
    (videos / "gone.npz").symlink_to("nowhere.npz")
    os.mkfifo(videos / "pipe.mp4")
    for name, arrays in {
        "actionless": {"label": 1},
        "good": {"label": 1, "actions": [0, 1]},
        "label": {"label": 2, "actions": [0, 1]},
        "turns": {"label": 1, "actions": [0, 9]},
    }.items():
        np.savez(videos / f"{name}.npz", frames=frames, **arrays)
    more = ("--labels", 2, "--actions", 4, "--max-rejected", 1)
    assert encode(videos, *more) == [("good.npz", 1)]
    rejects = {row["source"]: row["reason"] for row in map(json.loads, (tmp_path / "set/rejected.jsonl").open())}
    assert rejects["gone.npz"].startswith("there is no such file")
    assert rejects["actionless.npz"].startswith("it has no action for each frame")
    assert rejects["label.npz"].startswith("its label is 2, but the set has the labels 0 to 1")
    assert rejects["turns.npz"].startswith("its actions go from 0 to 9") and len(rejects) == 5
    assert rejects["pipe.mp4"].startswith("is no plain file")
    np.savez(videos / "nowhere.npz", frames=frames, label=0, actions=[0, 1])
    (videos / "nowhere.npz").rename(tmp_path / "there.npz")
    (videos / "gone.npz").unlink()
    shutil.copy(tmp_path / "there.npz", videos / "gone.npz")
    assert encode(videos, *more) == [("gone.npz", 0), ("good.npz", 1)]  # put right since


def test_latents_that_are_not_finite_are_a_reject(tmp_path: Path, encode: Encode) -> None:
    for number, value in enumerate((1.0, float("nan"))):
        torch.save(torch.full((2, 32, 8, 8), value, dtype=torch.bfloat16), tmp_path / f"{number}.pt")
    (tmp_path / "list.json").write_text(json.dumps([{"latent_path": f"{number}.pt"} for number in range(2)]))
    assert encode(tmp_path / "list.json", "--max-rejected", 0.5) == [("0.pt", None)]


def test_manifests_without_names_are_unchanged(tmp_path: Path) -> None:
    plain = write_set(tmp_path / "plain", [9] * 4, 4)
    text = (tmp_path / "plain" / "manifest.json").read_text()
    assert (
        "classes" not in text
        and "classes" not in plain.model_dump_json()
        and Manifest.read(tmp_path / "plain") == plain
    )
    named = write_set(tmp_path / "named", [9] * 4, 4, replace(FACTS, classes=("x", "y", "z")))
    assert named.fingerprint() != plain.fingerprint() and Manifest.read(tmp_path / "named") == named
    (tmp_path / "named" / "manifest.json").write_text(
        "\ufeff" + (tmp_path / "named" / "manifest.json").read_text(), encoding="utf-8"
    )
    assert Manifest.read(tmp_path / "named") == named
    for classes in (["x", "x"], ["a", "b", "c", "d"], [""], "abc"):
        changed = json.loads(text) | {"classes": classes}
        refused(lambda changed=changed: Manifest.parse(json.dumps(changed).encode(), "m.json"), "m.json", "classes")


def test_differences_between_class_names() -> None:
    assert classes_differ(None, ["a"]) is None and classes_differ(("a", "b"), ["a", "b"]) is None
    assert classes_differ(["a", "c"], ["a", "b"]) == "class 1 is 'c', there 'b'"
    assert classes_differ(["a"], ["a", "b\n"]) == "class 1 is missing, there 'b\\n'"


def test_classes_of_stages_checkpoints_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of one run must agree, and with its checkpoint and model; a set without names fits all."""
    for name, classes in {"one": ("x", "y", "z"), "other": ("y", "x", "z"), "unknown": None}.items():
        write_set(tmp_path / name, [9] * 8, 4, replace(FACTS, actions=0, classes=classes))
    (tmp_path / "staged.yaml").write_text(
        f"""\
extends: demo_cpu
model: {{layers: 1, heads: 1, window: 4, condition: label, classes: 3, patch: 1, channels: 4}}
data: {{shards: {tmp_path}/one, autoencoder: some-autoencoder, latent_shape: [4, 2, 2], lanes: 2, frames: 4}}
train: {{steps: null}}
optimizer: {{warmup_steps: 1}}
sample: {{given: 2}}
curriculum:
  - {{steps: 2, shards: {tmp_path}/unknown}}
  - {{steps: 2, shards: {tmp_path}/other}}
"""
    )
    alone = Processes(0, 1, torch.device("cpu"))

    def opened(*overrides: str) -> dict[str, object]:
        recipe = load_recipe(tmp_path / "staged.yaml", overrides)
        sets = open_sets(recipe.data, stages(recipe), alone, EventLog(tmp_path, False), 0)
        return stage_metadata(stages(recipe)[1], sets.by_stage[1].manifest)

    refused(opened, f"{tmp_path}/other does not fit {tmp_path}/one", "class 0 is 'y', there 'x'", "--classes-of")
    now = opened(f"data.shards={tmp_path}/unknown")
    assert now["classes"] == ["y", "x", "z"]
    refused(lambda: check_same_classes(tmp_path, {"classes": ["x", "y", "z"]}, now), "class 0 is 'y', there 'x'")
    check_same_classes(tmp_path, {}, now)  # a checkpoint of before there were names
    recipe = load_recipe(tmp_path / "staged.yaml")
    with monkeypatch.context() as patch:  # neither --accept-changes nor anything else lets it go on
        patch.setattr(resume, "training_pieces", lambda *_: {})
        patch.setattr(resume, "check_fits", lambda *_: None)
        patch.setattr(resume.checkpoint, "read_state", lambda _: {"stage": 1, "classes": ["x", "y", "z"]})
        going_on = resume.Resume(recipe, stages(recipe), alone, EventLog(tmp_path, False))
        refused(
            lambda: going_on.restore(2, None, None, None, {}, {1: now}, {}, True), "step-00000002", "class 0 is 'y'"
        )

    config = FARConfig(layers=1, heads=1, channels=4, window=4, labels=3)
    manifest = Manifest.read(tmp_path / "one")
    card = ModelMetadata(
        autoencoder=manifest.autoencoder,
        scaling=LatentScaling.of(manifest, "factor"),
        latent_shape=manifest.latent_shape,
        fps=manifest.fps,
        classes=manifest.classes,
        training=TrainingMetadata(step=1, recipe_hash="r", weights="ema", far_scale="0"),
    )
    save_model_dir(tmp_path / "model", config, FAR(config).state_dict(), card)
    assert read_config(tmp_path / "model") == (config, card)
    save_model_dir(tmp_path / "model", config, FAR(config).state_dict(), card.model_copy(update={"classes": None}))
    assert "classes" not in (tmp_path / "model" / "config.json").read_text()

    state = {
        "autoencoder": FACTS.autoencoder.model_dump(),
        "scaling": card.scaling.to_dict(),
        "latent_shape": [4, 2, 2],
    }
    state |= {"fps": 8.0, "frame_stride": 1, "step": 2, "recipe_hash": "r", "versions": {"far_scale": "0"}}
    state |= {"model": config.to_dict(), "classes": ["x", "y", "z"]}
    monkeypatch.setattr(zero, "_open", lambda *_: (tmp_path, state, "f" * 64))
    monkeypatch.setattr(zero, "_read_weights", lambda *_: FAR(config).state_dict())
    zero.export("run", None, "ema", tmp_path / "exported")
    assert read_config(tmp_path / "exported")[1].classes == ("x", "y", "z")

    def sampled(name: str, conditioned: bool = True) -> None:
        load_episodes(tmp_path / name, config, card, None, EpisodeSelection(2, 2, 2, conditioned))  # type: ignore[arg-type]

    for name in ("one", "unknown"):
        sampled(name)
    sampled("other", conditioned=False)  # labels are not read
    refused(lambda: sampled("other"), f"{tmp_path}/other: its classes are not the model's: class 0 is 'y', there 'x'")
