"""Videos to shards: the same bytes for any number of workers and after a kill; bad videos and settings are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from far_scale import autoencoder as autoencoders
from far_scale.data.demo.episodes import record_episodes
from far_scale.data.encode.plan import encode_videos
from far_scale.data.shards import inspect
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.video.find import find_videos
from far_scale.data.video.transforms import resize_and_crop
from far_scale.data.video.videos import read_video, write_mp4
from far_scale.utils.errors import UserError
from harness import processes

ROOT = Path(__file__).parents[2]
AUTOENCODER = "compact-vizdoom-f8c32"
SEED, VIDEOS, FRAMES = 900_000, 10, 40


def encode(videos: Path, out: Path, **changes) -> Manifest:
    settings = {"samples_per_shard": 2, "actions": 4, "min_frames": FRAMES, "workers": 1, **changes}
    return encode_videos(find_videos(videos), out, AUTOENCODER, **settings)


@pytest.fixture(scope="session")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten recorded episodes as .npz files, of seeds that the autoencoder was not trained on."""
    folder = tmp_path_factory.mktemp("episodes")
    record_episodes(folder, range(SEED, SEED + VIDEOS), FRAMES, workers=2)
    return folder


@pytest.fixture(scope="session")
def encoded(episodes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The episodes, encoded by two workers without a break."""
    out = tmp_path_factory.mktemp("encoded") / "set"
    encode(episodes, out, workers=2)
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "encode_latents.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def arguments(videos: Path, out: Path, workers: int) -> list[object]:
    settings = ["--actions", 4, "--min-frames", FRAMES, "--samples-per-shard", 2, "--workers", workers]
    return ["--videos", videos, "--out", out, "--autoencoder", AUTOENCODER, *settings]


def test_latents_are_the_autoencoders(episodes: Path, encoded: Path) -> None:
    shard_set, autoencoder = ShardSet.open(encoded), autoencoders.load(AUTOENCODER)
    manifest = shard_set.manifest
    assert (manifest.samples, manifest.frames, manifest.min_frames) == (VIDEOS, VIDEOS * FRAMES, FRAMES)
    assert manifest.latent_shape == (32, 8, 8) and manifest.autoencoder.weight_hash == autoencoder.weight_hash
    for number in (0, 3, 9):
        name = f"episode-{SEED + number}"
        sample, video = shard_set.read(number // 2, number % 2), read_video(episodes / f"{name}.npz")
        assert (sample.key, sample.source) == (name, f"{name}.npz")
        assert sample.actions.tolist() == video.actions.tolist() and sample.fps == video.fps
        pixels = torch.from_numpy(video.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            latents = autoencoder.encode(pixels)
            seen = autoencoder.decode(sample.latents.float())
        torch.testing.assert_close(sample.latents.float(), latents, atol=1e-4, rtol=2**-7)  # bfloat16 has 8 bits
        error = (seen - pixels).square().mean()
        assert 10 * torch.log10(4 / error) > 30  # dB: what was stored decodes to the video
    inspect.verify(shard_set)


def test_any_number_of_workers_writes_the_same_bytes(episodes: Path, encoded: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    encode(episodes, tmp_path / "set", workers=1)
    assert bytes_of(tmp_path / "set") == bytes_of(encoded)
    assert torch.get_num_threads() == threads
    assert len(bytes_of(encoded)) == 13  # five shards with an index each, the manifest, settings, fingerprints


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
def test_killed_and_resumed(episodes: Path, encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = subprocess.Popen(
        command(*arguments(episodes, out, 2)), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(out.glob("*.index.json")):
        assert process.poll() is None
        time.sleep(0.001)
    workers = children_of(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while any(processes.is_running(worker) for worker in workers):
        assert time.monotonic() < until, "a worker outlives its parent"
        time.sleep(0.01)
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index.json")}
    assert 1 <= len(done) < 5 and not (out / "manifest.json").exists()
    for left in (".shard-000004.1.part.tar", ".videos-000004.1.part.jsonl"):
        (out / left).write_bytes(b"left by a kill in mid-write")
    encode(episodes, out)
    assert bytes_of(out) == bytes_of(encoded)
    assert all((out / name).stat().st_mtime_ns == when for name, when in done.items())  # not made again


def test_a_complete_set_is_unchanged_and_a_damaged_one_is_repaired(
    episodes: Path, encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    out.mkdir()
    for name, data in bytes_of(encoded).items():
        (out / name).write_bytes(data)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("far_scale.data.encode.tasks.encode_shards", None)  # nothing may be started
        encode(episodes, out, workers=2)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    shard = out / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    (out / "manifest.json").write_text("{")
    encode(episodes, out)
    assert bytes_of(out) == bytes_of(encoded)


def test_other_settings_are_refused(episodes: Path, encoded: Path, tmp_path: Path) -> None:
    before = bytes_of(encoded)
    for changes, word in [
        ({"samples_per_shard": 3}, "samples-per-shard 2, not 3"),
        ({"actions": 0}, "actions 4, not 0"),
        ({"size": 32}, "size 64, not 32"),
        ({"dtype": "float16"}, "dtype bfloat16, not float16"),
        ({"min_frames": 1}, "min-frames 40, not 1"),
    ]:
        with pytest.raises(UserError, match=word):
            encode(episodes, encoded, **changes)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(episodes.iterdir())[:-1]:
        (fewer / path.name).symlink_to(path)
    with pytest.raises(UserError, match=r"videos 10 with fingerprint .* another folder"):
        encode(fewer, encoded)
    assert bytes_of(encoded) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="did not make"):
        encode(episodes, tmp_path / "foreign")
    with pytest.raises(UserError, match=r"--size 60: .* multiple of 8"):
        encode(episodes, tmp_path / "odd", size=60)


def test_a_short_video_is_reported_in_one_line(episodes: Path, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "set"
    videos.mkdir()
    with np.load(episodes / f"episode-{SEED}.npz") as episode:
        np.savez(videos / "brief.npz", frames=episode["frames"][:7], actions=episode["actions"][:7], fps=8.0)
    done = processes.run(*command(*arguments(videos, out, 1))[1:])
    assert done.returncode == 2
    complaint = done.stderr.strip().splitlines()[-1]
    assert complaint.startswith("error: ") and "Traceback" not in done.stderr
    assert "brief.npz: 7 frames, fewer than the 40 of --min-frames" in complaint
    assert sorted(path.name for path in out.iterdir()) == [
        "encoding.json",
        "rejected-000000.jsonl",
        "videos-000000.jsonl",
    ]


def test_keys_and_folder_labels(episodes: Path, tmp_path: Path) -> None:
    for name in ("archery/v 1.npz", "archery/v.2.npz", "bowling/v 1.npz"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).symlink_to(episodes / f"episode-{SEED + 1}.npz")
    encode(tmp_path / "videos", tmp_path / "set", labels=2, samples_per_shard=3)
    shard_set = ShardSet.open(tmp_path / "set")
    samples = [shard_set.read(0, number) for number in range(3)]
    assert [sample.key for sample in samples] == ["archery_v_1", "archery_v_2", "bowling_v_1"]
    assert [sample.label for sample in samples] == [0, 0, 1]
    (tmp_path / "videos" / "archery" / "v_1.npz").symlink_to(episodes / f"episode-{SEED + 1}.npz")
    with pytest.raises(UserError, match=r"would have the key archery_v_1.*rename"):
        encode(tmp_path / "videos", tmp_path / "again")
    with pytest.raises(UserError, match="no video"):
        encode_videos([], tmp_path / "none", AUTOENCODER)


def test_video_files_of_any_size(episodes: Path, tmp_path: Path) -> None:
    frames = read_video(episodes / f"episode-{SEED}.npz").frames
    wide = np.pad(frames.repeat(2, axis=1).repeat(2, axis=2), ((0, 0), (0, 0), (20, 20), (0, 0)))  # 128 x 168
    write_mp4(tmp_path / "videos" / "wide.mp4", wide, fps=30.0)
    manifest = encode(tmp_path / "videos", tmp_path / "set", actions=0)
    assert (manifest.actions, manifest.fps, manifest.frames) == (0, 30.0, FRAMES)
    sample = ShardSet.open(tmp_path / "set").read(0, 0)
    assert sample.actions is None and sample.source == "wide.mp4"
    with torch.inference_mode():
        pixels = autoencoders.load(AUTOENCODER).decode(sample.latents.float())
    seen = ((pixels + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(seen - frames).mean() < 12  # of 255: through H.264, two scalings and the autoencoder


def test_an_action_that_the_set_does_not_have(episodes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"episode-\d+\.npz: its actions go from 0 to 3.* raise the number"):
        encode(episodes, tmp_path / "set", actions=3)
    assert not list((tmp_path / "set").glob("*manifest*")) and not list((tmp_path / "set").glob(".*"))


def test_the_shorter_side_is_resized_and_the_centre_cropped() -> None:
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    fitted = resize_and_crop(np.stack([columns, columns]), 50)
    assert fitted.shape == (2, 50, 50, 3) and fitted.dtype == np.uint8
    assert np.abs(fitted[0, 25, :, 0].astype(int) - (50 + 2 * np.arange(50))).max() <= 1  # the middle half, halved
    stripes = np.zeros((1, 128, 128, 3), np.uint8)
    stripes[:, :, ::2] = 255
    # antialiased, not one of the stripes
    assert np.abs(resize_and_crop(stripes, 64)[0, :, 2:-2].astype(int) - 127).max() <= 2
    square = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    assert np.array_equal(resize_and_crop(square, 64), square)


def test_inspect(encoded: Path, tmp_path: Path) -> None:
    tool = ROOT / "tools" / "inspect_shards.py"
    sheet = tmp_path / "sheet.png"
    done = processes.run(tool, encoded, "--verify", "--png", sheet)
    done.check_returncode()
    assert "5 shards, 10 samples, 400 frames" in done.stdout and "verified" in done.stdout
    with Image.open(sheet) as picture:
        assert picture.size == (8 * 66, 8 * 66) and np.asarray(picture).std() > 10
    done = processes.run(tool, tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_inspect_reports_other_weights_and_other_statistics(encoded: Path, tmp_path: Path) -> None:
    for name, data in bytes_of(encoded).items():
        (tmp_path / name).write_bytes(data)
    manifest = Manifest.read(tmp_path)
    other = manifest.autoencoder.model_copy(update={"weight_hash": "f" * 64})
    manifest.model_copy(update={"autoencoder": other}).write(tmp_path)
    with pytest.raises(UserError, match=r"its weights are .* encode the videos again"):
        inspect.contact_sheet(ShardSet.open(tmp_path))
    manifest.model_copy(update={"std": tuple(2 * std for std in manifest.std)}).write(tmp_path)
    with pytest.raises(UserError, match="mean and std"):
        inspect.verify(ShardSet.open(tmp_path))
