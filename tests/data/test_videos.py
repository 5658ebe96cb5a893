"""Reading and writing of videos, and the errors for files that cannot be read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from far_scale.data.demo.episodes import record_episode
from far_scale.data.video.containers import BadVideo
from far_scale.data.video.find import VIDEO_SUFFIXES, find_videos
from far_scale.data.video.videos import Video, read_actions, read_video, write_mp4
from far_scale.utils.errors import UserError


@pytest.fixture(scope="module")
def episode() -> Video:
    return record_episode(10_901, 24)


def arrays(episode: Video, **changes: object) -> dict[str, object]:
    """The episode's arrays as numpy.savez takes them, with changes; a change to None takes an array out."""
    changed = {"frames": episode.frames, "actions": episode.actions, "fps": episode.fps, "label": 3, **changes}
    return {key: value for key, value in changed.items() if value is not None}


def test_mp4_round_trip(episode: Video, tmp_path: Path) -> None:
    path = tmp_path / "walk.mp4"
    write_mp4(path, episode.frames, 12.5)
    video = read_video(path)
    assert video.frames.shape == episode.frames.shape and video.frames.dtype == np.uint8
    assert (video.key, video.source, video.fps) == ("walk", "walk.mp4", 12.5)
    assert video.actions is None and video.label is None
    error = (video.frames.astype(float) - episode.frames) ** 2
    # green has most of the luma: over 27 dB in spite of the chroma subsampling
    assert error[..., 1].mean() < 255**2 / 10**2.7
    assert error.mean((1, 2, 3)).max() < 3 * error.mean()  # no frame is another one, or out of order
    assert [file.name for file in tmp_path.iterdir()] == ["walk.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_other_containers_decode(episode: Video, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"walk{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for frame in episode.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    video = read_video(path)
    assert video.frames.shape == episode.frames.shape and video.fps == 5.0
    assert np.abs(video.frames.astype(float) - episode.frames).mean() < 10


def test_npz_round_trip(episode: Video, tmp_path: Path) -> None:
    np.savez(tmp_path / "walk.npz", **arrays(episode))
    np.savez_compressed(tmp_path / "bare.npz", frames=episode.frames, other=np.arange(3))
    video, bare = read_video(tmp_path / "walk.npz"), read_video(tmp_path / "bare.npz")
    assert np.array_equal(video.frames, episode.frames) and np.array_equal(video.actions, episode.actions)
    assert (video.label, video.fps, video.key, video.source) == (3, 8.0, "walk", "walk.npz")
    assert type(video.label) is int and type(video.fps) is float and video.actions.dtype == np.int64
    assert np.array_equal(bare.frames, episode.frames) and bare.actions is None and bare.label is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None}, "no array `frames`"),
        ({"frames": np.zeros((24, 64, 64, 3), np.float32)}, r"float32 \[24, 64, 64, 3\]; they must be uint8"),
        ({"frames": np.zeros((24, 64, 64), np.uint8)}, r"uint8 \[24, 64, 64\]; they must be uint8 \[frames"),
        ({"frames": np.zeros((24, 3, 64, 64), np.uint8)}, "they must be uint8"),
        ({"frames": np.zeros((0, 64, 64, 3), np.uint8)}, "`frames` are empty"),
        ({"actions": np.zeros(23, np.int64)}, "23 actions for 24 frames"),
        ({"actions": np.zeros(24)}, "`actions` are float64"),
        ({"actions": np.zeros((24, 2), np.int64)}, "must be integers"),
        ({"actions": np.full(24, -1)}, "action -1"),
        ({"actions": np.array([{"a": 1}] * 24, dtype=object)}, "store plain arrays only"),
        ({"frames": np.array([{"a": 1}], dtype=object)}, "store plain arrays only"),
        ({"label": np.array([1, 2])}, "`label` is int64"),
        ({"label": 1.5}, "must be an integer"),
        ({"label": -1}, "`label` is -1"),
        ({"fps": 0.0}, "`fps` is 0.0"),
        ({"fps": "ten"}, "`fps` is <U3"),
    ],
)
def test_wrong_arrays_are_refused(episode: Video, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "walk.npz"
    np.savez(path, **arrays(episode, **changes))
    with pytest.raises(UserError, match=message) as caught:
        read_video(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_broken_files_are_refused(episode: Video, tmp_path: Path) -> None:
    write_mp4(tmp_path / "whole.mp4", episode.frames, 8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    np.savez_compressed(tmp_path / "whole.npz", **arrays(episode))
    archive = (tmp_path / "whole.npz").read_bytes()
    middle = len(archive) // 2
    broken = {
        "cut.mp4": whole[: len(whole) // 2],
        "text.mp4": b"not a video at all",
        "empty.mp4": b"",
        "cut.npz": archive[:middle],
        "text.npz": b"not an archive",
        "flipped.npz": archive[:middle] + bytes(64) + archive[middle + 64 :],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_video(tmp_path / name)
        assert name in str(caught.value) and "; " in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such video"):
        read_video(tmp_path / "absent.mp4")


@pytest.mark.parametrize(("suffix", "codec"), [(".avi", "mpeg4"), (".mkv", "libx264"), (".webm", "libvpx")])
def test_a_video_that_is_cut_off_is_not_read_as_a_shorter_one(
    episode: Video, tmp_path: Path, suffix: str, codec: str
) -> None:
    path = tmp_path / f"walk{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 1_000_000
        for frame in episode.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert len(read_video(path).frames) == 24
    whole = path.read_bytes()
    for fraction in (0.3, 0.6, 0.8):
        path.write_bytes(whole[: int(len(whole) * fraction)])
        with pytest.raises(BadVideo, match="cut off"):
            read_video(path)


def test_actions_in_a_file_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "walk.npy"
    np.save(path, np.array([0, 2, 1], np.int16))
    assert read_actions(path, 3).tolist() == [0, 2, 1] and read_actions(path, 3).dtype == np.int64
    with pytest.raises(BadVideo, match=r"walk\.npy: 3 actions for 4 frames"):
        read_actions(path, 4)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"not an array"):
        path.write_bytes(content)
        with pytest.raises(BadVideo, match=r"walk\.npy: no actions .*; write them with numpy\.save"):
            read_actions(path, 3)
    with pytest.raises(UserError, match="no such file of actions") as caught:
        read_actions(tmp_path / "absent.npy", 3)
    assert not isinstance(caught.value, BadVideo)  # a wrong list or an absent disk is no broken video


def test_a_disk_that_fails_is_not_a_broken_video(
    episode: Video, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "walk.npz", **arrays(episode))
    whole = (tmp_path / "walk.npz").read_bytes()
    (tmp_path / "walk.npz").write_bytes(whole[: len(whole) // 2])
    write_mp4(tmp_path / "walk.mp4", episode.frames, 8)
    (tmp_path / "walk.mp4").write_bytes((tmp_path / "walk.mp4").read_bytes()[:500])
    for name in ("walk.npz", "walk.mp4"):
        with pytest.raises(BadVideo):
            read_video(tmp_path / name)
        with monkeypatch.context() as patch:

            def fail(path: Path, mode: str) -> None:
                raise OSError(errno.EIO, "Input/output error", str(path))

            patch.setattr("far_scale.data.video.containers.open", fail, raising=False)
            with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)") as caught:
                read_video(tmp_path / name)
            assert not isinstance(caught.value, BadVideo)


def test_a_file_without_pictures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="no video stream"):
        read_video(path)


def test_a_video_that_cannot_be_written_leaves_nothing(episode: Video, tmp_path: Path) -> None:
    for frames, fps, message in (
        (episode.frames[:, :63], 8, "even height and width"),
        (episode.frames[:0], 8, "no frames to write"),
        (episode.frames / 255, 8, "must be uint8"),
        (episode.frames[0], 8, "must be uint8"),
        ([episode.frames[0], episode.frames[1, :32]], 8, "must have one size"),
        (episode.frames, 0, "above 0"),
    ):
        with pytest.raises(UserError, match=message):
            write_mp4(tmp_path / "walk.mp4", frames, fps)
    assert list(tmp_path.iterdir()) == []


def test_frames_are_written_one_by_one_as_they_are_made(episode: Video, tmp_path: Path) -> None:
    def frames(fail_at: int | None) -> Iterator[np.ndarray]:
        for index, frame in enumerate(episode.frames):
            if index == fail_at:
                raise UserError("it went wrong")
            yield frame
            seen.append([file.name for file in tmp_path.iterdir()])

    for fail_at, files in ((0, 0), (7, 7)):
        seen: list[list[str]] = []
        with pytest.raises(UserError, match="it went wrong"):
            write_mp4(tmp_path / "walk.mp4", frames(fail_at), 8)
        assert len(seen) == files and list(tmp_path.iterdir()) == []
    seen = []
    write_mp4(tmp_path / "walk.mp4", frames(None), 8)
    assert len(seen) == 24 and not any("walk.mp4" in names for names in seen)  # written beside, until all are
    one_by_one = (tmp_path / "walk.mp4").read_bytes()
    write_mp4(tmp_path / "walk.mp4", episode.frames, 8)
    assert (tmp_path / "walk.mp4").read_bytes() == one_by_one


def test_find_videos(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("b/deep/2.NPZ", "b/1.mp4", "a.mkv", "notes.txt", ".half.1.part.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.mp4").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_videos(tmp_path)]
    assert found == ["a.mkv", "b/1.mp4", "b/deep/2.NPZ"]
    assert find_videos(tmp_path / "a.mkv") == [tmp_path / "a.mkv"]
    (tmp_path / "b" / "3.mp4").symlink_to(tmp_path / "moved.mp4")
    assert find_videos(tmp_path / "b")[1] == tmp_path / "b" / "3.mp4"  # not silently skipped
    with pytest.raises(UserError, match=r"3\.mp4: there is no such video"):
        read_video(tmp_path / "b" / "3.mp4")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no videos in this folder"):
        find_videos(tmp_path / "none")
    with pytest.raises(UserError, match="no such file or folder"):
        find_videos(tmp_path / "absent")


def below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_videos(folder)]


def test_linked_folders_are_entered_but_never_round_in_a_circle(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "root"
    for file in (store / "c" / "1.mp4", store / "other" / "2.mp4", root / "a" / "deep" / "3.mp4"):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    (root / "c").symlink_to("../store/c")
    (root / "d").symlink_to(store / "c")  # the same folder by another name
    (root / "a" / "file.mp4").symlink_to(store / "c" / "1.mp4")
    assert below(root) == ["a/deep/3.mp4", "a/file.mp4", "c/1.mp4", "d/1.mp4"]
    (root / "a" / "deep" / "up").symlink_to("..")
    (root / "a" / "itself").symlink_to(".")
    (root / "a" / "above").symlink_to("../..")  # all that root lies in leads back to it, too
    (store / "c" / "store").symlink_to("..")
    (store / "c" / "root").symlink_to(root)
    (root / "a" / "c").symlink_to("../c")  # a link to a link
    assert below(root) == ["a/c/1.mp4", "a/deep/3.mp4", "a/file.mp4", "c/1.mp4", "d/1.mp4"]
    (tmp_path / "way").symlink_to(root)
    assert below(tmp_path / "way") == below(root)
    (root / "e").symlink_to("../store/gone")
    with pytest.raises(UserError, match=r"root/e: this link leads nowhere.*\(../store/gone\)"):
        find_videos(root)
    (root / "e").unlink()
    (root / "e").symlink_to("e")
    with pytest.raises(UserError, match="root/e: this link leads nowhere"):
        find_videos(root)


def test_two_folders_that_link_to_one_another(tmp_path: Path) -> None:
    for one, other in ("ab", "ba"):
        (tmp_path / one).mkdir()
        (tmp_path / one / f"{one}.mp4").write_bytes(b"x")
        (tmp_path / one / "link").symlink_to(f"../{other}")
    assert below(tmp_path) == ["a/a.mp4", "a/link/b.mp4", "b/b.mp4", "b/link/a.mp4"]


def test_hidden_folders_are_skipped_at_any_depth(tmp_path: Path) -> None:
    for name in (".Trash-1000/1.mp4", "a/.thumbs/2.mp4", "a/b/.x.mp4", "a/b/3.mp4", ".own/4.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".linked").symlink_to("a")
    (tmp_path / ".gone").symlink_to("nowhere")
    assert below(tmp_path) == ["a/b/3.mp4"]
    assert below(tmp_path / ".own") == ["4.mp4"]  # which was asked for


def test_skipped_files_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "v.mp4",
        "1.docx",
        "deep/2.DOCX",
        "3.zip",
        "v.npy",
        "list.csv",
        "t.txt",
        "l.json",
        ".x.zip",
        ".h/4.zip",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for _ in range(2):
        assert below(tmp_path) == ["v.mp4"]
    assert capsys.readouterr().err == f"warning: {tmp_path}: skipped 3 files (.docx 2, .zip 1)\n"  # once
    (tmp_path / "v.mp4").unlink()
    (tmp_path / "deep" / "README").write_bytes(b"x")
    (tmp_path / "deep" / "a.\n").write_bytes(b"x")
    kinds = r"no videos in this folder: skipped 5 files \(\.docx 2, \.zip 1, other 1, without suffix 1\); they end in"
    with pytest.raises(UserError, match=kinds):
        find_videos(tmp_path)


# what FFmpeg writes without other libraries: container and codec by suffix
CONTAINERS = {
    "mp4": "mp4 mpeg4", "m4v": "mp4 mpeg4", "mov": "mov mpeg4", "qt": "mov mpeg4", "3gp": "3gp h263",
    "3g2": "3g2 mpeg4", "f4v": "mov mpeg4", "avi": "avi mpeg4", "divx": "avi mpeg4", "mkv": "matroska mpeg4",
    "mk3d": "matroska mpeg4", "flv": "flv flv1", "wmv": "asf wmv2", "asf": "asf wmv2", "mpg": "mpeg mpeg1video",
    "mpeg": "mpeg mpeg2video", "mpe": "mpeg mpeg1video", "m1v": "mpeg1video mpeg1video", "m2v": "mpeg2video mpeg2video",
    "vob": "vob mpeg2video", "ts": "mpegts mpeg2video", "m2t": "mpegts mpeg2video", "mts": "mpegts mpeg2video",
    "m2ts": "mpegts mpeg2video", "mxf": "mxf mpeg2video", "nut": "nut mpeg4", "rm": "rm rv10", "rmvb": "rm rv20",
    "mjpeg": "mjpeg mjpeg", "mjpg": "mjpeg mjpeg", "y4m": "yuv4mpegpipe rawvideo", "gif": "gif gif",
    "apng": "apng apng",
}  # fmt: skip
BY_LIBRARIES = {"webm", "ogv", "ivf", "h264", "264", "hevc", "265", "npz"}  # VP8, Theora, H.264, H.265
FORMATS = {"mjpeg": "yuvj420p", "gif": "rgb8", "apng": "rgb24"}


def test_every_suffix_is_of_a_container_that_reads(tmp_path: Path) -> None:
    assert {suffix[1:] for suffix in VIDEO_SUFFIXES} == set(CONTAINERS) | BY_LIBRARIES
    for suffix, how in CONTAINERS.items():
        (container_format, codec), path = how.split(), tmp_path / f"v.{suffix}"
        with av.open(str(path), "w", format=container_format) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = (176, 144)  # the smallest of H.263
            stream.pix_fmt = FORMATS.get(codec, "yuv420p")
            for shade in range(0, 240, 20):
                frame = av.VideoFrame.from_ndarray(np.full((144, 176, 3), shade, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        frames = read_video(path).frames
        assert frames.shape == (12, 144, 176, 3), suffix
        assert np.abs(frames.mean((1, 2, 3)) - np.arange(0, 240, 20)).max() < 40, suffix
    assert len(find_videos(tmp_path)) == len(CONTAINERS)
