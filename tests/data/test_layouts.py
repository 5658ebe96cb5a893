"""Published layouts of data sets, the official code's lists, and resizing, cropping, mirroring and frame stride."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from far_scale import autoencoder as autoencoders
from far_scale.data.encode.fingerprints import read_fingerprints
from far_scale.data.encode.job import EncodingJob
from far_scale.data.encode.plan import plan_encoding
from far_scale.data.encode.source_reader import read_latents
from far_scale.data.encode.tasks import encode_task, merge_tasks
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.video.containers import BadVideo
from far_scale.data.video.sources import Source, add_flipped, find_sources
from far_scale.data.video.transforms import FrameTransform, to_pixels
from far_scale.data.video.videos import Video, read_actions, read_video, write_mp4
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256
from harness import processes

TOOL = Path(__file__).parents[2] / "tools" / "encode_latents.py"
AUTOENCODER = "compact-vizdoom-f8c32"
FRAMES = 24
PLAIN = FrameTransform(64)


def planned(
    sources: list[Source], out: Path, transform: FrameTransform, merging: bool = False, **changes
) -> EncodingJob:
    settings = {"actions": 0, "labels": 0, "min_frames": 1, "precision": "fp32", **changes}
    device = None if merging else "cpu"
    return plan_encoding(sources, out, AUTOENCODER, "bfloat16", 2, transform=transform, device=device, **settings)


def encode(sources: list[Source], out: Path, transform: FrameTransform = PLAIN, tasks: int = 1, **changes) -> Manifest:
    for task in range(tasks):
        encode_task(planned(sources, out, transform, **changes), task, tasks, 1, 0.0)
    return merge_tasks(planned(sources, out, transform, merging=True, **changes), tasks, 0.0)


def samples_of(folder: Path) -> dict[str, Sample]:
    shards = ShardSet.open(folder)
    found = [shards.read(shard, row) for shard, count in enumerate(shards.samples_per_shard) for row in range(count)]
    return {sample.key: sample for sample in found}


def latents_of(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the autoencoder makes of pixels [F, 3, H, W] from -1 to 1, as stored."""
    torch.set_num_threads(1)
    return autoencoders.load(AUTOENCODER, dtype=dtype).encode(pixels).bfloat16()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), atol=1e-3, rtol=2**-6)


def write_mp4v(path: Path, frames: np.ndarray) -> None:
    """As OpenCV writes it for TECO's Minecraft: MPEG-4 part 2 at 20 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def episodes(recorded: Path) -> list[Video]:
    return [read_video(path) for path in sorted(recorded.glob("*.npz"))[:4]]


def test_teco_dmlab(episodes: list[Video], tmp_path: Path) -> None:
    """dmlab/train/FOLDER/NUMBER.npz with `video` and `actions`; nothing is scaled, all 64x64."""
    for number, video in enumerate(episodes[:3]):
        path = tmp_path / "dmlab" / "train" / str(number % 2) / f"{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, video=video.frames, actions=video.actions.astype(np.int32))
    manifest = encode(find_sources(tmp_path / "dmlab" / "train"), tmp_path / "set", actions=4)
    assert (manifest.samples, manifest.frames, manifest.actions, manifest.fps) == (3, 3 * FRAMES, 4, 25.0)
    samples = samples_of(tmp_path / "set")
    assert list(samples) == ["0_0", "0_2", "1_1"]
    for key, video in zip(samples, (episodes[0], episodes[2], episodes[1]), strict=True):
        assert samples[key].actions.tolist() == video.actions.tolist()
        close(samples[key].latents, latents_of(to_pixels(torch.from_numpy(video.frames))))


def test_teco_minecraft(episodes: list[Video], tmp_path: Path) -> None:
    """minecraft/train/FOLDER/NUMBER.mp4, and beside it NUMBER.npz with `actions` only."""
    folder = tmp_path / "minecraft" / "train" / "7"
    for number, video in enumerate(episodes[:2]):
        write_mp4v(folder / f"{number:06d}.mp4", video.frames)
        np.savez_compressed(folder / f"{number:06d}.npz", actions=video.actions.astype(np.int32))
    sources = find_sources(tmp_path / "minecraft" / "train")
    assert [(source.name, source.actions.name) for source in sources] == [
        ("000000.mp4", "000000.npz"),
        ("000001.mp4", "000001.npz"),
    ]
    encode(sources, tmp_path / "set", actions=4)
    for sample, video in zip(samples_of(tmp_path / "set").values(), episodes, strict=False):
        assert sample.actions.tolist() == video.actions.tolist() and sample.fps == 20.0
    np.savez(folder / "000000.npz", actions=episodes[0].actions, frames=episodes[0].frames)
    with pytest.raises(BadVideo, match=r"000000\.npz: holds actions, frames; a file of actions has only `actions`"):
        read_actions(folder / "000000.npz", FRAMES)


def test_bair_with_actions_that_are_vectors(episodes: list[Video], tmp_path: Path) -> None:
    """Videos with the robot's commands, [F, 4] of floats, which the official code does not read either."""
    write_mp4(tmp_path / "bair" / "train" / "0.mp4", episodes[0].frames, 10)
    np.savez(tmp_path / "bair" / "train" / "0.npz", actions=np.zeros((FRAMES, 4), np.float32))
    np.savez(tmp_path / "bair" / "train" / "1.npz", video=episodes[1].frames, actions=np.zeros((FRAMES, 4)))
    listed = [{"video_path": f"bair/train/{name}", "action_path": "bair/train/none.npz"} for name in ("1.npz", "0.mp4")]
    (tmp_path / "bair" / "bair_train.json").write_text(json.dumps(listed))
    for number, videos in enumerate((tmp_path / "bair" / "train", tmp_path / "bair" / "bair_train.json")):
        manifest = encode(find_sources(videos), tmp_path / f"set-{number}")
        assert (manifest.samples, manifest.actions) == (2, 0)
    assert (tmp_path / "set-0" / "shard-000000.tar").read_bytes() == (
        tmp_path / "set-1" / "shard-000000.tar"
    ).read_bytes()
    with pytest.raises(
        UserError, match=r"first 0\.mp4: .*0\.npz: `actions` are float32 \[24, 4\]; they must be integers"
    ):
        encode(find_sources(tmp_path / "bair" / "train"), tmp_path / "none", actions=4)


def test_official_list_of_ucf101(episodes: list[Video], tmp_path: Path) -> None:
    """datasets/ucf101/train03.json, paths as from the folder that `datasets` lies in."""
    rows = []
    for number, name in enumerate(("Surfing/v_Surfing_g01_c01", "Archery/v_Archery_g01_c02")):
        write_mp4v(tmp_path / "datasets" / "ucf101" / "videos" / f"{name}.avi", episodes[number].frames)
        rows.append({"video_path": f"datasets/ucf101/videos/{name}.avi", "label": 87 - 85 * number, "class": "any"})
    listed = tmp_path / "datasets" / "ucf101" / "train03.json"
    listed.write_text(json.dumps(rows))
    encode(find_sources(listed), tmp_path / "set", labels=101)
    found = [(sample.source, sample.label) for sample in samples_of(tmp_path / "set").values()]
    assert found == [("Archery/v_Archery_g01_c02.avi", 2), ("Surfing/v_Surfing_g01_c01.avi", 87)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_official_list_of_latents(episodes: list[Video], tmp_path: Path, dtype: torch.dtype) -> None:
    """datasets/dmlab_latent/dmlab_train.json: .pt files, taken as they are, and actions in .npz files."""
    folder, rows, latents = tmp_path / "datasets" / "dmlab_latent", [], []
    folder.mkdir(parents=True)
    for number, video in enumerate(episodes[:2]):
        latents.append(latents_of(to_pixels(torch.from_numpy(video.frames))).to(dtype))
        torch.save(latents[-1], folder / f"{number}.pt")
        np.savez(folder / f"{number}.npz", actions=video.actions)
        rows.append({f"{kind}_path": f"datasets/dmlab_latent/{number}.{end}" for kind, end in KINDS.items()})
    (folder / "dmlab_train.json").write_text(json.dumps(rows))
    sources = find_sources(folder / "dmlab_train.json")
    manifest = encode(sources, tmp_path / "set", actions=4)
    autoencoder = autoencoders.load(AUTOENCODER)
    assert manifest.autoencoder.weight_hash == autoencoder.weight_hash and manifest.latent_shape == (32, 8, 8)
    for sample, stored, video in zip(samples_of(tmp_path / "set").values(), latents, episodes, strict=False):
        assert sample.latents.equal(stored.bfloat16()) and sample.actions.tolist() == video.actions.tolist()
    encode(sources, tmp_path / "thin", FrameTransform(64, stride=3), actions=4)
    thin = samples_of(tmp_path / "thin")["0"]
    assert thin.latents.equal(latents[0].bfloat16()[::3]) and thin.actions.tolist() == episodes[0].actions[::3].tolist()
    for changes in (
        {"transform": FrameTransform(64, crop="random")},
        {"transform": FrameTransform(64), "precision": "bf16"},
    ):
        with pytest.raises(UserError, match=r"0\.pt: holds latents, taken as they are; leave out"):
            planned(sources, tmp_path / "other", **changes)
    with pytest.raises(UserError, match="holds latents"):
        planned(add_flipped(sources), tmp_path / "other", FrameTransform(64))
    with pytest.raises(
        UserError, match=r"latents \[24, 32, 8, 8\], not \[F, 32, 16, 16\] as by --autoencoder and --size"
    ):
        encode(sources, tmp_path / "larger", FrameTransform(128))


KINDS = {"latent": "pt", "action": "npz"}


class Reached(Exception):
    """Code out of a file ran."""


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Reached, ("pickled code",)


def test_files_that_hold_no_latents(tmp_path: Path) -> None:
    path, shape = tmp_path / "0.pt", (4, 2, 2)
    right = torch.arange(3 * 16).reshape(3, *shape) / 8
    torch.save(right.half(), path)
    assert read_latents(path, shape, "float16").equal(right.half())
    for stored, message in [
        (right.half(), "latents in float16; give the --dtype that they have"),
        (right.double(), "latents in float64"),
        ({"latent": right}, "holds dict, not one dense tensor"),
        (right[:, 0], r"latents \[3, 2, 2\], not \[F, 4, 2, 2\]"),
        (right[:0], r"latents \[0, 4, 2, 2\]"),
        (torch.zeros(1, *shape).expand(10**12, *shape), "a view of fewer numbers than its shape says"),
        (right.to_sparse(), "not one dense tensor"),
        (Harmful(), "no latents"),
    ]:
        torch.save(stored, path)
        with pytest.raises(BadVideo, match=message):
            read_latents(path, shape, "bfloat16")
    with pytest.raises(UserError, match="no such file of latents"):
        read_latents(tmp_path / "absent.pt", shape, "bfloat16")


def test_damaged_latents_are_refused(tmp_path: Path) -> None:
    """Fuzzed: every damaged file is refused in one line, or reads as the whole one does."""
    path, shape = tmp_path / "0.pt", (4, 2, 2)
    torch.save(torch.arange(64).reshape(4, *shape).bfloat16(), path)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 16))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        try:
            assert read_latents(path, shape, "bfloat16").shape[1:] == shape
        except BadVideo as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a list of objects"),
        ('{"video_path": "0.npz"}', "not a list of objects"),
        ("[1]", "not a list of objects"),
        ("[", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('[{"path": "0.npz"}]', "entry 0 has no path under `video_path`"),
        ('[{"video_path": "0.npz"}, {"latent_path": "0.pt"}]', "entry 1 has no path under `video_path`"),
        ('[{"video_path": "0.npz", "label": "run"}]', "entry 0: `label` is 'run'"),
        ('[{"video_path": "0.npz", "action_path": 3}]', "entry 0: `action_path` is 3"),
        ('[{"video_path": "0.npz"}, {"video_path": "0.npz"}]', r"entry 1: .*0\.npz is listed already \(.*entry 0\)"),
        ('[{"video_path": "absent.npz"}]', r"its first file, absent\.npz, is in no folder above the list"),
        ('[{"video_path": "a\\u0000b"}]', "entry 0 has no path"),
    ],
)
def test_wrong_official_lists_are_refused(recorded: Path, tmp_path: Path, text: str, message: str) -> None:
    shutil.copy(next(recorded.glob("*.npz")), tmp_path / "0.npz")
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        find_sources(tmp_path / "list.json")
    assert str(caught.value).startswith(f"{tmp_path / 'list.json'}: ") and "\n" not in str(caught.value)


LISTS = {
    "list.csv": 'video,label,actions\n0.npz,1,turns.npy\n"b/1.npz",,\n',
    "list.jsonl": '{"video": "0.npz", "label": 1, "actions": "turns.npy"}\n{"video": "b/1.npz"}\n',
    "list.json": '[{"video_path": "0.npz", "label": 1, "action_path": "turns.npz"}, {"video_path": "b/1.npz"}]',
}
PIECES = [
    b'"',
    b"\n",
    b"\0",
    b"{",
    b"[",
    b",",
    b"\\ud800",
    b"\xff",
    b"null",
    b"-1",
    b"9" * 5000,
    b"../",
    b"\r",
    b"1e999",
]


@pytest.mark.parametrize("name", LISTS)
def test_fuzzed_lists(tmp_path: Path, name: str) -> None:
    """Every damaged list is refused in one line that names it, or gives sources with proper keys."""
    (tmp_path / "0.npz").write_bytes(b"")
    path, whole, rng, refused = tmp_path / name, LISTS[name].encode(), random.Random(1), 0
    path.write_bytes(whole)
    assert [source.key for source in find_sources(path)] == ["0", "b_1"]
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
            data[at : rng.choice((at, at + 1, end))] = rng.choice(PIECES)
        path.write_bytes(data)
        try:
            for source in find_sources(path):
                assert 1 <= len(source.key) <= 80 and source.name.encode() and source.label != -1
        except UserError as error:
            refused += 1
            assert str(path) in str(error) or "would have the key" in str(error)
            assert len(str(error)) < 1000 + len(str(path))
    assert refused > 300


@pytest.mark.parametrize("name", ["rejected.jsonl", "videos.jsonl"])
def test_fuzzed_rejects_and_fingerprints(recorded: Path, tmp_path: Path, name: str) -> None:
    """The rejects and fingerprints of a merged set, damaged: refused in one line, or its shards are made again."""
    for number, path in enumerate(sorted(recorded.glob("*.npz"))[:2]):
        shutil.copy(path, tmp_path / f"{number}.npz")
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    sources, out, rng = find_sources(tmp_path), tmp_path / "set", random.Random(2)
    job = planned(sources, out, FrameTransform(64))
    encode_task(job, 0, 1, 1, 0.5)
    merge_tasks(job, 1, 0.5)
    whole, refused = (out / name).read_bytes(), 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
            data[at : rng.choice((at, at + 1, end))] = rng.choice(PIECES)
        (out / name).write_bytes(data)
        try:
            merge_tasks(job, 1, 0.5)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        (out / name).write_bytes(whole)
    assert refused > 50
    merge_tasks(job, 1, 0.5)
    assert set(read_fingerprints(out / "videos.jsonl")) == {"0", "1", "broken"}


def ramp(height: int, width: int) -> np.ndarray:
    """Two frames, red the row, green the column: where a crop was taken can be read off."""
    rows, columns = np.mgrid[:height, :width]
    frame = np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)
    return np.stack([frame, frame])


def antialiased(line: np.ndarray, size: int) -> np.ndarray:
    """A line of pixels scaled down as PIL and torchvision do it: a triangle as wide as the scale around each centre."""
    scale = len(line) / size
    found = []
    for place in range(size):
        weights = np.clip(1 - np.abs((np.arange(len(line)) + 0.5) / scale - (place + 0.5)), 0, None)
        found.append((weights * line).sum() / weights.sum())
    return np.array(found)


@pytest.mark.parametrize(
    ("height", "width", "scaled"), [(240, 320, (128, 170)), (320, 240, (170, 128)), (100, 128, None)]
)
@pytest.mark.slow
def test_torch_resize_is_the_official_one(height: int, width: int, scaled: tuple[int, int] | None) -> None:
    """Sizes as torchvision's Resize(int) gives them, values as a plain computation does."""
    transform, rng = FrameTransform(128, "torch"), np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, height, width, 3)).astype(np.uint8)
    found = transform.resize_frames(frames)
    assert found.dtype == np.float32 and found.shape[1:3] == (scaled or (128, int(128 * 128 / 100)))
    if scaled is not None:
        rows = np.stack([antialiased(frames[0, :, column, 1] / 255, scaled[0]) for column in range(width)], axis=1)
        wanted = np.stack([antialiased(row, scaled[1]) for row in rows])
        assert np.abs(found[0, ..., 1] - wanted).max() < 1e-5
        byte = FrameTransform(128).resize_frames(frames)
        assert np.abs(found.mean() - byte.mean() / 255) < 1e-3
    same = transform.resize_frames(ramp(128, 200))
    assert np.array_equal(same * 255, ramp(128, 200).astype(np.float32))  # the shorter side fits: nothing is scaled


def test_crops() -> None:
    frames = ramp(64, 87)
    assert np.array_equal(FrameTransform(64).crop_frames(frames, "any"), frames[:, :, 11:75])
    # round(23 / 2), as officially
    assert np.array_equal(FrameTransform(64, "torch").crop_frames(frames, "any"), frames[:, :, 12:76])
    transform = FrameTransform(64, crop="random")
    lefts = [int(transform.crop_frames(frames, f"clip-{number}")[0, 0, 0, 1]) for number in range(400)]
    assert set(lefts) == set(range(24)) and lefts == [
        int(transform.crop_frames(frames, f"clip-{n}")[0, 0, 0, 1]) for n in range(400)
    ]
    high = transform.crop_frames(ramp(90, 64), "clip-0")
    assert high.shape == (2, 64, 64, 3) and (high[:, :, :, 1] == np.arange(64)).all()
    assert np.array_equal(transform.crop_frames(ramp(64, 64), "clip-0"), ramp(64, 64))


def test_stride_keeps_every_nth_frame_and_its_action(episodes: list[Video], tmp_path: Path) -> None:
    video = episodes[0]
    np.savez(tmp_path / "0.npz", frames=video.frames, actions=video.actions, fps=8.0)
    write_mp4(tmp_path / "1.mp4", video.frames, 8)
    np.save(tmp_path / "1.npy", video.actions)
    whole = read_video(tmp_path / "1.mp4").frames
    for stride in (1, 3, 5, 40):
        for path, frames, actions in ((tmp_path / "0.npz", video.frames, None), (tmp_path / "1.mp4", whole, "1.npy")):
            thin = read_video(path, actions_file=tmp_path / actions if actions else None, stride=stride)
            assert np.array_equal(thin.frames, frames[::stride]) and thin.fps == 8 / stride
            assert thin.actions.tolist() == video.actions[::stride].tolist()
    np.savez(tmp_path / "0.npz", frames=video.frames, actions=video.actions[:-1])
    with pytest.raises(BadVideo, match="23 actions for 24 frames"):
        read_video(tmp_path / "0.npz", stride=5)
    shrunk = read_video(tmp_path / "1.mp4", stride=2, transform=lambda frames: frames[:, ::2, ::4])
    assert np.array_equal(shrunk.frames, whole[::2, ::2, ::4])


def test_frames_to_latents_with_every_option(episodes: list[Video], tmp_path: Path) -> None:
    """Against a plain computation on frames of another shape: scale, crop, mirror, stride, precision."""
    tall = np.pad(episodes[0].frames.repeat(2, axis=1).repeat(2, axis=2), ((0, 0), (30, 0), (0, 0), (0, 0)))  # 158x128
    np.savez(tmp_path / "videos.npz", frames=tall, actions=episodes[0].actions, fps=8.0)
    sources = add_flipped(find_sources(tmp_path / "videos.npz"))
    assert [(source.key, source.flip) for source in sources] == [("videos", False), ("videos-flip", True)]
    transform = FrameTransform(64, "torch", "random", stride=2)
    manifest = encode(sources, tmp_path / "set", transform, precision="bf16")
    assert (manifest.samples, manifest.frames, manifest.fps) == (2, FRAMES, 4.0)
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(tall[::2]).permute(0, 3, 1, 2) / 255, (79, 64), mode="bilinear", antialias=True
    )
    tops = {}
    for key, sample in samples_of(tmp_path / "set").items():
        tops[key] = int(transform.crop_frames(ramp(79, 64), key)[0, 0, 0, 0])
        pixels = scaled[:, :, tops[key] : tops[key] + 64] * 2 - 1
        wanted = latents_of(pixels.flip(3) if key.endswith("-flip") else pixels, torch.bfloat16)
        assert sample.latents.equal(wanted) and sample.source == "videos.npz" and sample.actions is None
    assert tops["videos"] != tops["videos-flip"]  # each has a place of its own
    plain = encode(sources, tmp_path / "plain", transform)
    assert plain.std != manifest.std and plain.std == pytest.approx(manifest.std, rel=0.05)  # fp32, nearly the same


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_any_number_of_tasks_with_flips(recorded: Path, tmp_path: Path, tasks: int) -> None:
    sources, transform = add_flipped(find_sources(recorded)[:3]), FrameTransform(64, "torch", "random", 4)
    encode(sources, tmp_path / "set", transform, tasks)
    found = {path.name: sha256(path) for path in (tmp_path / "set").iterdir()}
    encode(sources, tmp_path / "again", transform)
    assert found == {path.name: sha256(path) for path in (tmp_path / "again").iterdir()} and len(found) == 9
    settings = json.loads((tmp_path / "set" / "encoding.json").read_text())
    wanted = {"size": 64, "resize": "torch", "crop": "random", "frame-stride": 4, "flip": True, "precision": "fp32"}
    assert wanted.items() <= settings.items()
    for changes, message in [
        ({"transform": FrameTransform(64, "torch", "random", 2)}, "frame-stride 4, not 2"),
        ({"transform": FrameTransform(64, "pillow", "random", 4)}, "resize torch, not pillow"),
        ({"transform": FrameTransform(64, "torch", "centre", 4)}, "crop random, not centre"),
        ({"transform": transform, "precision": "bf16"}, "precision fp32, not bf16"),
    ]:
        with pytest.raises(UserError, match=f"was encoded with {message}"):
            planned(sources, tmp_path / "set", **changes)


@pytest.mark.slow
def test_the_command_line_takes_every_option(recorded: Path, tmp_path: Path) -> None:
    rows = [{"video_path": f"recorded/{path.name}"} for path in sorted(recorded.glob("*.npz"))[:2]]
    (tmp_path / "recorded").symlink_to(recorded)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    options = [
        "--size",
        64,
        "--resize",
        "torch",
        "--crop",
        "random",
        "--frame-stride",
        3,
        "--flip",
        "--precision",
        "bf16",
    ]
    where = ["--videos", tmp_path / "list.json", "--out", tmp_path / "tool", "--autoencoder", AUTOENCODER]
    done = processes.run(TOOL, *where, *options, "--samples-per-shard", 2, "--workers", 1)
    done.check_returncode()
    assert "2 shards, 4 samples, 32 frames" in done.stdout
    sources = add_flipped(find_sources(tmp_path / "list.json"))
    encode(sources, tmp_path / "library", FrameTransform(64, "torch", "random", 3), precision="bf16")
    for path in (tmp_path / "library").iterdir():
        assert sha256(path) == sha256(tmp_path / "tool" / path.name), path.name


def test_flips_that_are_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--flip: frames would turn left where their actions turn right"):
        planned(add_flipped(find_sources(recorded)), tmp_path / "set", FrameTransform(64), actions=4)
    for name in ("a.npz", "a-flip.npz"):
        shutil.copy(next(recorded.glob("*.npz")), tmp_path / name)
    with pytest.raises(UserError, match=r"a\.npz: its sample would have the key a-flip, as .*a-flip\.npz; rename one"):
        add_flipped(find_sources(tmp_path))


@pytest.fixture
def four(recorded: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "four"
    folder.mkdir()
    for number, path in enumerate(sorted(recorded.glob("*.npz"))[:4]):
        with np.load(path) as episode:
            np.savez(folder / f"{number}.npz", **episode)  # not compressed: all have one size
    return folder


def test_changed_videos_are_refused(four: Path, tmp_path: Path) -> None:
    """By the task that made their shard and by the merge, also where size and name are the same."""
    out = tmp_path / "set"
    job = planned(find_sources(four), out, FrameTransform(64))
    encode_task(job, 0, 2, 1, 0.0)
    (four / "1.npz").rename(tmp_path / "kept.npz")
    shutil.copy(four / "2.npz", four / "1.npz")
    assert (four / "1.npz").stat().st_size == (tmp_path / "kept.npz").stat().st_size
    message = (
        r"1\.npz: has changed since shard 0 was made of it; encode into another folder, or remove .*000000\.index\.json"
    )
    with pytest.raises(UserError, match=message):
        encode_task(job, 0, 2, 1, 0.0)
    encode_task(job, 1, 2, 1, 0.0)  # has other videos, and opens no other's
    with pytest.raises(UserError, match=message):
        merge_tasks(job, 2, 0.0)
    shutil.copyfile(tmp_path / "kept.npz", four / "1.npz")  # the same again, at another time
    merge_tasks(job, 2, 0.0)
    assert encode_task(job, 0, 1, 1, 0.0) == 2  # nothing to do
    shutil.copy(four / "2.npz", four / "1.npz")
    for again in (lambda: encode_task(job, 0, 1, 1, 0.0), lambda: merge_tasks(job, 1, 0.0)):
        with pytest.raises(UserError, match=message):
            again()
    (out / "shard-000000.index.json").unlink()
    encode_task(job, 0, 1, 1, 0.0)
    merge_tasks(job, 1, 0.0)
    samples = samples_of(out)
    assert samples["1"].latents.equal(samples["2"].latents) and not samples["0"].latents.equal(samples["2"].latents)


def test_a_rejected_video_can_be_repaired(four: Path, tmp_path: Path) -> None:
    whole, out = (four / "3.npz").read_bytes(), tmp_path / "set"
    (four / "3.npz").write_bytes(whole[:5000])
    job = planned(find_sources(four), out, FrameTransform(64))
    with pytest.raises(UserError, match=r"1 of 4 videos are rejected.*first 3\.npz: not a whole"):
        encode_task(job, 0, 1, 1, 0.0)
    (four / "3.npz").write_bytes(whole)
    encode_task(job, 0, 1, 1, 0.0)
    assert merge_tasks(job, 1, 0.0).samples == 4 and not list(out.glob("reject*"))


def test_no_task_opens_the_videos_of_another(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: set[str] = set()

    def seen(path: object, *arguments: object) -> object:
        opened.add(Path(str(path)).name)
        return open(path, *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr("far_scale.data.encode.fingerprints.open", seen, raising=False)
    job = planned(find_sources(four), tmp_path / "set", FrameTransform(64))
    assert not opened
    encode_task(job, 1, 2, 1, 0.0)
    assert opened == {"2.npz", "3.npz"}
    opened.clear()
    encode_task(job, 0, 2, 1, 0.0)
    merge_tasks(job, 2, 0.0)
    assert opened == {"0.npz", "1.npz"}  # the merge reads only sizes and times
