"""Videos of phones, browsers, screen recorders and broken copies: read completely and correctly, or refused."""

from __future__ import annotations

import io
import itertools
import random
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from far_scale.data.video.containers import BadVideo
from far_scale.data.video.videos import read_video, write_mp4
from harness.refusal import refused

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from damaged_videos import FPS, KINDS, Kind, moving_picture, write_video

ONE = 1 << 16  # of a display matrix
# x' = a x + c y, y' = b x + d y; and the frames [F, H, W, 3] as players show them
TURNS: dict[tuple[int, int, int, int], Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    (ONE, 0, 0, ONE): lambda frames: frames,
    (0, ONE, -ONE, 0): lambda frames: np.rot90(frames, -1, (1, 2)),  # held upright: a quarter to the right
    (-ONE, 0, 0, -ONE): lambda frames: np.rot90(frames, 2, (1, 2)),
    (0, -ONE, ONE, 0): lambda frames: np.rot90(frames, 1, (1, 2)),
    (-ONE, 0, 0, ONE): lambda frames: frames[:, :, ::-1],  # the camera on the side of the screen
    (ONE, 0, 0, -ONE): lambda frames: frames[:, ::-1],
    (0, ONE, ONE, 0): lambda frames: frames.swapaxes(1, 2),
    (0, -ONE, -ONE, 0): lambda frames: frames.swapaxes(1, 2)[:, ::-1, ::-1],
}


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    return moving_picture()


def write(path: Path, frames: NDArray[np.uint8], kind: Kind, **more: Any) -> bytes:
    """The bytes of a video of that kind, which is written to `path`."""
    write_video(path, frames, kind.codec, sound=kind.sound, options=kind.options, encoding=kind.encoding, **more)
    return path.read_bytes()


def write_turned(path: Path, frames: NDArray[np.uint8], matrix: tuple[int, ...]) -> None:
    """A video that asks players to turn it by this matrix."""
    if path.suffix == ".mkv":
        write_video(path, frames, "libx264", prepare=lambda stream: stream.set_display_matrix(matrix))
        return
    write_video(path, frames, "libx264")
    straight, turned = (struct.pack(">9i", *numbers) for numbers in ((ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), matrix))
    data = path.read_bytes()
    at = data.index(straight, data.index(b"tkhd"))  # of the track; the film has one too
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])


def remux(
    path: Path,
    out: Path,
    change: Callable[[int, Any], Any] = lambda _, packet: packet,
    options: dict[str, str] = {},  # noqa: B006
) -> None:
    """Copy the packets of the pictures to another container; `change` may alter one, or leave it out."""
    with av.open(str(path)) as source, av.open(str(out), "w", options=options) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            if (changed := change(number, packet)) is not None:
                changed.stream = stream
                copy.mux(changed)


def kinds(*names: str) -> list[Kind]:
    return [kind for kind in KINDS if kind.name in names]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_frames_are_turned_as_players_turn_them(frames: NDArray[np.uint8], tmp_path: Path, suffix: str) -> None:
    if suffix == ".mkv" and not hasattr(av.video.stream.VideoStream, "set_display_matrix"):
        pytest.skip("this PyAV writes no display matrix")
    straight = tmp_path / f"straight{suffix}"
    write_video(straight, frames[:3], "libx264")
    stored = read_video(straight).frames
    for number, ((a, b, c, d), upright) in enumerate(TURNS.items()):
        path = tmp_path / f"{number}{suffix}"
        write_turned(path, frames[:3], (a, b, 0, c, d, 0, 0, 0, 1 << 30))
        read = read_video(path)
        assert np.array_equal(read.frames, upright(stored)), (a, b, c, d)
        shrunk = read_video(path, transform=lambda block: block[:, ::2, ::4]).frames
        assert np.array_equal(shrunk, read.frames[:, ::2, ::4])
    write_turned(path, frames[:3], (46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30))
    refused(lambda: read_video(path), str(path), "45 degrees, not a multiple of 90", "convert it")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_cut_file_is_refused_wherever_it_is_cut(frames: NDArray[np.uint8], tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / f"walk{kind.suffix}"
    whole = write(path, frames, kind)
    assert len(read_video(path).frames) == 24 and read_video(path).fps == FPS
    rng = random.Random(kind.name)
    for fraction in (0.6, 0.9, *(rng.random() for _ in range(6)), 1 - 1 / len(whole)):
        path.write_bytes(whole[: int(fraction * len(whole))])
        with pytest.raises(BadVideo, match=r"cut off|damaged|does not decode|missing"):
            read_video(path)


@pytest.mark.parametrize("kind", kinds("mkv libx264 + aac", "webm libvpx-vp9 + libopus", "mov libx264 + aac"))
@pytest.mark.parametrize("seconds", [1.5, 2.6])
def test_sound_may_be_longer_or_shorter(frames: NDArray[np.uint8], tmp_path: Path, kind: Kind, seconds: float) -> None:
    path = tmp_path / f"walk{kind.suffix}"
    whole = write(path, frames, kind, seconds=seconds)
    assert len(read_video(path).frames) == 24
    path.write_bytes(whole[: len(whole) * 6 // 10])
    refused(lambda: read_video(path), "cut off")


@pytest.mark.parametrize("suffix", [".flv", ".ts", ".wmv", ".ogv", ".nut", ".ivf"])
def test_cut_files_of_rarer_containers(frames: NDArray[np.uint8], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"walk{suffix}"
    codec = {".flv": "libx264", ".ts": "libx264", ".wmv": "mpeg4", ".ogv": "libvpx", ".nut": "mpeg4", ".ivf": "libvpx"}[
        suffix
    ]
    write_video(path, frames, codec)
    whole = path.read_bytes()
    assert len(read_video(path).frames) == 24
    for fraction in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(fraction * len(whole)) // 188 * 188 + 94])
        with pytest.raises(BadVideo):
            read_video(path)


def test_a_live_stream_of_unknown_size_is_read(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "live.mkv"
    write_video(path, frames, "libx264", options={"live": "1"})
    whole = path.read_bytes()
    assert b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" in whole
    assert len(read_video(path).frames) == 24
    path.write_bytes(whole[: len(whole) * 6 // 10])
    refused(lambda: read_video(path), "cut off")


def test_hevc_that_loses_frames_is_refused(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    (kind,) = kinds("mp4 libx265")
    path = tmp_path / "walk.mp4"
    whole = write(path, frames, kind)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
        offset, size = packet.pos, packet.size
    # the second picture of the group cannot be parsed any more, and FFmpeg's decoder drops it without an error
    lost = whole[: offset + 4] + b"\x7f\xff" + bytes(size - 6) + whole[offset + size :]
    path.write_bytes(lost)
    refused(lambda: read_video(path), str(path), "leave it out")


def test_an_empty_packet_repeats_the_previous_frame(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    """As Theora stores it while nothing moves."""
    path, out = tmp_path / "walk.mkv", tmp_path / "still.nut"
    write_video(path, frames, "mjpeg")

    def empty(number: int, packet: Any) -> Any:
        if number not in (3, 4, 20):
            return packet
        still = av.Packet()
        still.pts, still.dts, still.time_base = packet.pts, packet.dts, packet.time_base
        return still

    remux(path, out, empty)
    kept = [number for number in range(24) if number not in (3, 4, 20)]
    assert np.array_equal(read_video(out).frames, read_video(path).frames[kept])


def test_packets_without_a_frame_are_no_loss(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    plain, path = tmp_path / "plain.webm", tmp_path / "walk.webm"
    write_video(plain, frames, "libvpx")
    truth = read_video(plain).frames

    # the key frame also as an invisible reference packet with the time of the next one, as libvpx writes them
    with av.open(str(plain)) as source, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if not packet.size:
                continue
            for shown in (False, True) if packet.is_keyframe else (True,):
                data = bytes(packet)
                one = av.Packet(data if shown else bytes([data[0] & ~0x10]) + data[1:])
                one.pts, one.dts, one.time_base, one.stream = packet.pts, packet.dts, packet.time_base, stream
                one.is_keyframe = packet.is_keyframe
                copy.mux(one)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 25
    assert np.array_equal(read_video(path).frames, truth)
    # but where such a packet leaves a gap, a frame is lost
    with av.open(str(plain)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
    whole, data = plain.read_bytes(), bytes(packet)
    at = whole.index(data)
    plain.write_bytes(whole[:at] + bytes([data[0] ^ 0x10]) + whole[at + 1 :])
    refused(lambda: read_video(plain), "1 of its 24 frames do not decode")


@pytest.mark.parametrize("hidden, packets", [(11, 29), (3, 18), (4, 30), (0, 22)])
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_trimmed_copy_is_read_wherever_it_is_cut(tmp_path: Path, suffix: str, hidden: int, packets: int) -> None:
    """Frames before the cut are hidden by an edit list; reordered frames are missing at the end."""
    path, cut = tmp_path / "whole.mp4", tmp_path / f"cut{suffix}"
    write_video(path, moving_picture(32), "libx264", encoding={"x264-params": "bframes=3:b-pyramid=normal:b-adapt=0"})
    with av.open(str(path)) as container:
        packet = next(container.demux(video=0))
        frame = round(1 / FPS / float(packet.time_base))
        pts = [one.pts for one in itertools.chain([packet], container.demux(video=0)) if one.size]

    def trim(number: int, packet: Any) -> Any:
        packet.pts, packet.dts = packet.pts - hidden * frame, packet.dts - hidden * frame
        return packet if number < packets else None

    remux(path, cut, trim)
    kept = [number for number in sorted(round(one / frame) for one in pts[:packets]) if number >= hidden]
    assert np.array_equal(read_video(cut).frames, read_video(path).frames[kept])


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_an_open_group_that_was_cut_in_two_is_read(tmp_path: Path, codec: str, suffix: str) -> None:
    group = "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0"
    encoding = {"x264-params": group, "x265-params": f"{group}:log-level=none:pools=none:frame-threads=1"}
    path, cut = tmp_path / "whole.mkv", tmp_path / f"cut{suffix}"
    write_video(path, moving_picture(32), codec, encoding={f"{codec[3:]}-params": encoding[f"{codec[3:]}-params"]})
    whole = read_video(path).frames
    assert len(whole) == 32
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        first = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        start = packets[first].pts
        before = sum(packet.pts < start for packet in packets[first:])  # predicted from the group before
        after = sum(packet.pts >= start for packet in packets)
    assert before
    remux(path, cut, lambda number, packet: packet if number >= first else None)
    read = read_video(cut).frames
    assert after <= len(read) <= after + before
    assert np.array_equal(read[-after:], whole[-after:])


@pytest.mark.parametrize("suffix", [".avi", ".mov"])
def test_damaged_mjpeg_is_refused_where_the_decoder_sees_it(
    frames: NDArray[np.uint8], tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"walk{suffix}"
    write_video(path, frames, "mjpeg")
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    seen = 0
    for number in range(4, 20):
        at = packets[number].pos + packets[number].size * 6 // 10
        path.write_bytes(whole[:at] + b"\xff\xd9" + bytes(48) + whole[at + 50 :])  # an end in the middle of the picture
        try:
            assert len(read_video(path).frames) == 24
        except BadVideo:
            seen += 1
    assert seen >= 12
    path.write_bytes(whole)
    assert len(read_video(path).frames) == 24


def test_files_that_were_written_to_a_pipe_are_read(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    """The sizes in such an AVI are not known, and the first fragment of such an MP4 may have its tables in the head."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    path = tmp_path / "walk.mp4"
    write_video(path, frames, "mpeg4")
    for name, options in (("avi", {}), ("mp4", {"movflags": "frag_keyframe"}), ("matroska", {})):
        pipe, out = Pipe(), tmp_path / f"piped.{name}"
        with av.open(str(path)) as source, av.open(pipe, "w", format=name, options=options) as copy:
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    copy.mux(packet)
            copy.close()
            whole = pipe.getvalue()
        out.write_bytes(whole)
        assert len(read_video(out).frames) == 24, name
        out.write_bytes(whole[: int(0.6 * len(whole))])
        refused(lambda out=out: read_video(out), f"{out}: ")


def test_avi_with_empty_chunks_is_whole(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    avi = tmp_path / "walk.avi"
    # a clock of half frames, as an H.264 stream that is copied gets it: every second chunk is empty
    write_video(avi, frames, "libx264", 2 * FPS, times=range(0, 48, 2))
    whole = avi.read_bytes()
    assert whole.count(b"00dc\0\0\0\0") >= 20
    assert len(read_video(avi).frames) == 24 and read_video(avi).fps == FPS
    for fraction in (0.6, 0.9):
        avi.write_bytes(whole[: int(fraction * len(whole))])
        refused(lambda: read_video(avi), "cut off")
    # a variable rate: chunks are empty while a frame is held
    times = [*range(12), *range(40, 52)]
    write_video(avi, frames, "mpeg4", times=times)
    read = read_video(avi)
    assert len(read.frames) == 24 and read.fps == pytest.approx(23 / 51 * FPS, rel=0.05)
    # a chunk that is truly missing: its name is no longer that of pictures
    write_video(avi, frames, "mpeg4")
    whole = avi.read_bytes()
    at = whole.index(b"00dc", whole.index(b"movi") + 4000)
    avi.write_bytes(whole[:at] + b"JUNK" + whole[at + 4 :])
    refused(lambda: read_video(avi), "1 of its frames are missing")


@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "libx264"), (".webm", "libvpx-vp9")])
@pytest.mark.parametrize("sound", [None, "libopus"])
def test_a_long_last_frame_is_no_truncation(
    frames: NDArray[np.uint8], tmp_path: Path, suffix: str, codec: str, sound: str | None
) -> None:
    plain, path = tmp_path / f"plain{suffix}", tmp_path / f"slides{suffix}"
    write_video(plain, frames[:4], codec)

    def hold(number: int, packet: Any) -> Any:
        if packet.pts >= 3 * 1000 // FPS:
            packet.duration = 15_000
        return packet

    remux(plain, path, hold)
    with av.open(str(path)) as container:
        assert container.duration > 15e6
    assert len(read_video(path).frames) == 4
    if sound:  # 15 seconds of sound over four pictures
        write_video(path, frames[:4], codec, sound=sound, seconds=15)
        assert len(read_video(path).frames) == 4


def test_a_cover_is_no_video(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    def as_cover(stream: Any) -> None:
        stream.disposition = av.stream.Disposition.attached_pic.value

    def mux(path: Path, first: str, second: str) -> None:
        """Streams `film` or `cover`, in this order; both are MPEG-4, as MP4 wants no PNG."""
        with av.open(str(path), "w") as container:
            streams = {}
            for name in (first, second):
                if not name:
                    continue
                streams[name] = container.add_stream("mjpeg" if name == "cover" else "libx264", rate=FPS)
                height, width = (30, 40) if name == "cover" else frames.shape[1:3]
                streams[name].height, streams[name].width = height, width
                streams[name].pix_fmt = "yuvj420p" if name == "cover" else "yuv420p"
                if name == "cover":
                    as_cover(streams[name])
            for name, stream in streams.items():
                for picture in frames if name == "film" else frames[:1, :30, :40]:
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                    container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
                container.mux(stream.encode(None))

    for first, second in (("film", "cover"), ("cover", "film")):
        path = tmp_path / f"{first}.mp4"
        mux(path, first, second)
        with av.open(str(path)) as container:
            assert len(container.streams.video) == 2
        read = read_video(path)
        assert read.frames.shape == (24, 48, 64, 3) and read.fps == FPS
    song = tmp_path / "song.mp4"
    mux(song, "cover", "")
    refused(lambda: read_video(song), str(song), "no video stream")


@pytest.mark.parametrize(
    "name", ["2024-01-01T10:20:30.mp4", "http:a.mp4", "file:a.mp4", "concat:a.mp4", "pipe:0.mp4", "a%03d.mp4"]
)
def test_any_name_is_that_of_a_file(
    frames: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_mp4(name, frames, 10)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    read = read_video(name)
    assert (read.frames.shape, read.fps, read.key) == (frames.shape, 10, name.removesuffix(".mp4"))
    assert np.array_equal(read_video(tmp_path / name).frames, read.frames)


def test_a_pattern_of_numbers_is_a_name_too(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    write_video(path, frames, "gif")
    path.rename(tmp_path / "a%03d.gif")
    assert len(read_video(tmp_path / "a%03d.gif").frames) == 24


@pytest.mark.parametrize(("suffix", "codec"), [(".webm", "libvpx-vp9"), (".mp4", "libx264"), (".mkv", "mpeg4")])
def test_the_rate_of_a_variable_rate_file(frames: NDArray[np.uint8], tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"screen{suffix}"
    times = [0, 1, 2, 3, 10, 11, 40, 41, 42, 43]  # in 1/30 seconds
    write_video(path, frames[:10], codec, 30, times=times)
    read = read_video(path)
    assert len(read.frames) == 10 and read.fps == pytest.approx(9 / 43 * 30, rel=2e-3)
    assert read_video(path, stride=3).fps == pytest.approx(3 / 43 * 30, rel=2e-3)


def test_the_rate_of_a_constant_rate_file_is_exact(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    for fps in (Fraction(30_000, 1001), Fraction(24), Fraction(8), Fraction(25, 2)):
        for count in (1, 2, 24):
            write_mp4(tmp_path / "walk.mp4", frames[:count], float(fps))
            with av.open(str(tmp_path / "walk.mp4")) as container:
                declared = float(container.streams.video[0].average_rate)
            assert read_video(tmp_path / "walk.mp4").fps == declared == pytest.approx(float(fps), rel=1e-6)
        remux(tmp_path / "walk.mp4", tmp_path / "walk.mkv")  # times in milliseconds
        assert read_video(tmp_path / "walk.mkv").fps == pytest.approx(float(fps), rel=1e-3)
    write_video(tmp_path / "walk.gif", frames, "gif", 30)  # 3, 3 and 4 hundredths of a second
    assert read_video(tmp_path / "walk.gif").fps == pytest.approx(30, rel=0.01)


def test_a_file_without_times_has_the_rate_that_it_declares(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    mp4, raw = tmp_path / "walk.mp4", tmp_path / "walk.m4v"
    write_video(mp4, frames, "mpeg4", 30)
    with av.open(str(mp4)) as source, av.open(str(raw), "w", format="m4v") as copy:
        stream = copy.add_stream("mpeg4", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in source.decode(video=0):
            copy.mux(stream.encode(frame))
        copy.mux(stream.encode(None))
    read = read_video(raw)
    assert len(read.frames) == 24 and read.fps == pytest.approx(30, rel=0.01)


def test_titles_may_be_in_any_encoding(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "walk.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Gruesse"
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture in frames[:4]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    avi = tmp_path / "walk.avi"
    remux(path, avi)
    whole = avi.read_bytes()
    assert b"ISFT" in whole
    at = whole.index(b"ISFT") + 8
    avi.write_bytes(whole[:at] + b"Gr\xfc\xdfe" + whole[at + 5 :])  # Latin-1
    assert len(read_video(avi).frames) == 4


def test_a_stream_that_was_joined_late_is_read(tmp_path: Path) -> None:
    path = tmp_path / "late.ts"
    write_video(path, moving_picture(48), "mpeg2video", 25, encoding={"g": "8", "bf": "2"})
    whole = read_video(path).frames
    data = path.read_bytes()
    path.write_bytes(data[len(data) * 4 // 10 // 188 * 188 :])
    read = read_video(path).frames
    assert 24 <= len(read) < 32 and np.array_equal(read[-16:], whole[-16:])


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".avi", "mpeg4"), (".gif", "gif")]
)
def test_data_after_the_end_of_a_video_is_ignored(
    frames: NDArray[np.uint8], tmp_path: Path, suffix: str, codec: str
) -> None:
    path = tmp_path / f"walk{suffix}"
    write_video(path, frames, codec)
    whole = path.read_bytes()
    for more in (b"\n", bytes(700), b"a remark of the program that made it"):
        path.write_bytes(whole + more)
        assert len(read_video(path).frames) == 24


def test_hostile_structures_are_refused(frames: NDArray[np.uint8], tmp_path: Path) -> None:
    mp4, avi, gif = (tmp_path / f"walk{suffix}" for suffix in (".mp4", ".avi", ".gif"))
    write_video(mp4, frames, "libx264")
    data = mp4.read_bytes()
    for depth in (5_000, 20):
        boxes = b""
        for _ in range(depth):
            boxes = struct.pack(">I4s", 8 + len(boxes), b"moov") + boxes
        mp4.write_bytes(data + boxes)
        refused(lambda: read_video(mp4), "boxes are nested too deeply")
    write_video(avi, frames, "mpeg4")
    data, lists = avi.read_bytes(), b""
    for _ in range(5_000):
        lists = struct.pack("<4sI4s", b"LIST", 4 + len(lists), b"rec ") + lists
    avi.write_bytes(data[:4] + struct.pack("<I", len(data) + len(lists) - 8) + data[8:] + lists)
    refused(lambda: read_video(avi), "lists are nested too deeply")
    write_video(gif, frames[:2], "gif")
    data = gif.read_bytes()
    picture = struct.pack("<BHHHHBB", 0x2C, 0, 0, 64, 48, 0, 60)  # codes of 60 bits, in parts of odd sizes
    gif.write_bytes(data[:-1] + picture + b"\x03abc\x01a\x02ab\x01a\x00;")
    refused(lambda: read_video(gif), str(gif))
