"""Protocols: what is in recipes/protocols, what their hashes depend on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from far_scale.evaluation.protocol import Protocol, load_protocol
from harness.refusal import refused

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "protocols"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "base")
OFFICIAL = [name for name in NAMES if name.endswith("@official")]

TEXT = """
extends: base
clips: {source: some videos, count: 4, size: 64}
sampling: {given: 8, predicted: 8, steps: 2, batch: 4}
metrics: [lpips, psnr, ssim, fvd]
psnr: {}
ssim: {}
"""


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text.replace("extends: base", f"extends: {FOLDER / 'base.yaml'}"))
    return path


def changed(protocol: Protocol, key: str, value: Any) -> Protocol:
    """With another value of `section.key`, checked as a file is."""
    values = protocol.model_dump(mode="json")
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[last] = value
    return Protocol.model_validate(values)


@pytest.fixture
def protocol(tmp_path: Path) -> Protocol:
    return load_protocol(written(tmp_path, TEXT))


def test_all_protocols_exist() -> None:
    plain = {"vizdoom-8to8", "vizdoom-144to156", "ucf101-mcvd-64", "bair-2to14", "bair-2to28"}
    plain |= {f"ucf101-latte-{size}" for size in (128, 256)}
    plain |= {f"{world}-{frames}" for world in ("dmlab", "minecraft") for frames in ("144to156", "36to264")}
    assert {name for name in NAMES if name not in OFFICIAL} == plain
    assert {name.removesuffix("@official") for name in OFFICIAL} == {each for each in plain if "vizdoom" not in each}


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_loads_by_its_name(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name and protocol.about


def test_no_two_protocols_share_a_hash() -> None:
    assert len({load_protocol(name).hash() for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_protocol_differs_only_in_the_official_choices(name: str) -> None:
    official, plain = load_protocol(name), load_protocol(name.removesuffix("@official"))
    frames, sampling, clips = official.frames, official.sampling, official.clips
    assert (sampling.precision, sampling.autoencoder_precision) == ("bf16", "bf16")
    assert (frames.rounding, frames.codec) == ("down", "h264")
    assert frames.border == ("144to156" in name)  # anno_context is off in the other configs that give frames
    assert clips.resize == ("torch" if "ucf101" in name else "pillow")
    if sampling.given:
        assert frames.given == "decoded" and official.lpips is not None and official.lpips.range == "[0, 1]"
    assert official.published and not plain.published

    assert (plain.frames.codec, plain.frames.given, plain.frames.rounding) == ("none", "true", "nearest")
    same = {"precision", "autoencoder_precision"}
    assert sampling.model_dump(exclude=same) == plain.sampling.model_dump(exclude=same)
    assert clips.model_dump(exclude={"resize"}) == plain.clips.model_dump(exclude={"resize"})
    assert (official.metrics, official.fvd, official.psnr) == (plain.metrics, plain.fvd, plain.psnr)


@pytest.mark.parametrize(
    ("name", "count", "given", "frames", "trajectories", "seeds", "guidance"),
    [
        ("ucf101-latte-128", 2048, 0, 16, 1, 4, 2.0),
        ("ucf101-latte-256", 2048, 0, 16, 1, 4, 2.0),
        ("ucf101-mcvd-64", 256, 4, 16, 100, 1, 1.0),
        ("bair-2to14", 256, 2, 16, 100, 1, 1.0),
        ("bair-2to28", 256, 2, 30, 100, 1, 1.0),
        ("dmlab-144to156", 256, 144, 300, 1, 4, 1.5),
        ("dmlab-36to264", 256, 36, 300, 1, 4, -1.0),
        ("minecraft-144to156", 256, 144, 300, 1, 4, 1.5),
        ("minecraft-36to264", 256, 36, 300, 1, 4, 1.5),
    ],
)
def test_papers_protocols_have_the_papers_numbers(
    name: str, count: int, given: int, frames: int, trajectories: int, seeds: int, guidance: float
) -> None:
    protocol = load_protocol(name)
    sampling = protocol.sampling
    assert (protocol.clips.count, sampling.given, protocol.total_frames) == (count, given, frames)
    assert (sampling.trajectories, sampling.guidance, sampling.steps) == (trajectories, guidance, 50)
    assert sampling.seeds == ((0, 2, 4, 6) if seeds == 4 else (0,))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clips.count", 5),
        ("clips.every", 2),
        ("clips.per_class", 1),
        ("clips.seed", 1),
        ("clips.start", 1),
        ("clips.stride", 2),
        ("clips.short", "stride-1"),
        ("clips.size", 128),
        ("clips.resize", "torch"),
        ("clips.pixels", "decoded"),
        ("clips.fingerprint", "0" * 64),
        ("sampling.given", 7),
        ("sampling.predicted", 9),
        ("sampling.trajectories", 2),
        ("sampling.seeds", [0, 1]),
        ("sampling.steps", 3),
        ("sampling.guidance", 1.5),
        ("sampling.context_noise", 0.1),
        ("sampling.weights", "model"),
        ("sampling.precision", "bf16"),
        ("sampling.autoencoder_precision", "bf16"),
        ("sampling.batch", 5),
        ("frames.given", "decoded"),
        ("frames.rounding", "down"),
        ("frames.border", True),
        ("frames.codec", "h264"),
        ("fvd.network", "0" * 64),
        ("fvd.batch", 5),
        ("lpips.net", "vgg"),
        ("lpips.range", "[0, 1]"),
        ("lpips.network", "0" * 64),
        ("psnr.mean_of", "set"),
    ],
)
def test_what_changes_a_score_changes_the_hash(protocol: Protocol, key: str, value: Any) -> None:
    assert changed(protocol, key, value).hash() != protocol.hash()


def test_which_frames_fvd_sees_changes_the_hash(protocol: Protocol) -> None:
    longer = changed(protocol, "sampling.predicted", 12)
    assert changed(longer, "fvd.frames", "predicted").hash() != longer.hash()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "another"),
        ("about", "another"),
        ("clips.source", "another"),
        ("fvd.name", "mine"),
        ("lpips.name", "mine"),
        ("metrics", ["psnr"]),
        ("published", [{"model": "theirs", "psnr": 20.0}]),
    ],
)
def test_what_changes_no_score_leaves_the_hash(protocol: Protocol, key: str, value: Any) -> None:
    other = changed(protocol, key, value)
    assert other != protocol and other.hash() == protocol.hash()


def test_fewer_clips_make_another_protocol(protocol: Protocol) -> None:
    fewer = protocol.with_clips(count=2)
    assert fewer.clips.count == 2 and fewer.hash() != protocol.hash()
    assert fewer.with_clips(count=4).hash() == protocol.hash()


def test_published_scores_are_left_out_of_other_clips() -> None:
    official = load_protocol("dmlab-144to156@official")
    assert official.published and official.with_clips(fingerprint="0" * 64).published == official.published
    assert not official.with_clips(count=2).published and not official.with_clips(pixels="decoded").published


def test_fewer_metrics_make_no_other_protocol(protocol: Protocol) -> None:
    fewer = protocol.with_metrics(("fvd", "psnr"))
    assert fewer.metrics == ("psnr", "fvd") and fewer.hash() == protocol.hash()


def test_a_metric_without_its_section_is_refused(tmp_path: Path) -> None:
    protocol = load_protocol(written(tmp_path, TEXT.replace("psnr, ssim, ", "").replace("ssim: {}", "")))
    refused(lambda: protocol.with_metrics(("ssim",)), "--metrics ssim", "mine", "it has lpips, psnr, fvd")
    assert protocol.with_metrics(("psnr",)).metrics == ("psnr",)


def test_without_given_frames_only_fvd_is_allowed() -> None:
    refused(
        lambda: load_protocol("ucf101-latte-128").with_metrics(("lpips",)), "--metrics", "ucf101-latte-128", "only fvd"
    )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("count: 4", "cuont: 4", ("mine.yaml:3: clips.cuont: unknown key", "clips.count")),
        ("psnr: {}", "pnsr: {}", ("mine.yaml:6: pnsr: unknown key", "psnr")),
        ("count: 4, ", "", ("clips.count: this required key is missing",)),
        ("count: 4", "count: 0", ("mine.yaml:3: clips.count: must be greater than or equal to 1, got 0",)),
        ("steps: 2", "steps: '2'", ("mine.yaml:4: sampling.steps: must be a valid integer, got",)),
        ("steps: 2", "steps: 2, guidance: 0.5", ("mine.yaml:4: sampling.guidance: must be at least 1",)),
        ("steps: 2", "steps: 2, seeds: [1, 1]", ("mine.yaml:4: sampling.seeds: names a seed twice",)),
        ("steps: 2", "steps: 2, seeds: []", ("mine.yaml:4: sampling.seeds: ",)),
        (
            "[lpips, psnr",
            "[lpisp, psnr",
            ("mine.yaml:5: metrics: must be 'lpips', 'psnr', 'ssim' or 'fvd', got 'lpisp'",),
        ),
        ("psnr: {}", "", ("mine.yaml:5: metrics: psnr has no section; write `psnr:`",)),
        ("given: 8", "given: 0", ("mine.yaml:5: metrics: without given frames", "set it to [fvd]")),
        ("predicted: 8", "predicted: 0", ("mine.yaml:4: sampling.predicted: ",)),
        ("given: 8, predicted: 8", "given: 4, predicted: 4", ("fvd.frames: 8 frames, and I3D needs 9",)),
        ("psnr: {}", "psnr: {}\nfvd: {frames: predicted}", ("mine.yaml:7: fvd.frames: 8 frames, and I3D needs 9",)),
        (
            "size: 64}",
            "size: 72}\nframes: {codec: h264}",
            ("mine.yaml:3: clips.size: 72, and h264 needs a multiple of 16",),
        ),
        ("size: 64}", "size: 64, fingerprint: abc}", ("mine.yaml:3: clips.fingerprint: ",)),
        ("psnr: {}", "psnr: {mean_of: median}", ("mine.yaml:6: psnr.mean_of: must be 'frames', 'clips' or 'set'",)),
    ],
)
def test_impossible_values_are_refused_with_file_line_and_key(
    tmp_path: Path, before: str, after: str, words: tuple[str, ...]
) -> None:
    assert before in TEXT
    path = written(tmp_path, TEXT.replace(before, after, 1))
    refused(lambda: load_protocol(path), *words)


def test_all_errors_are_in_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT.replace("count: 4", "cuont: 4").replace("batch: 4", "batch: 0"))
    refused(lambda: load_protocol(path), "clips.cuont", "sampling.batch", "clips.count")


def test_a_missing_protocol_is_refused() -> None:
    refused(lambda: load_protocol("ucf101-latte-64"), "ucf101-latte-64", "vizdoom-8to8")


def test_the_base_file_is_no_protocol() -> None:
    refused(lambda: load_protocol("base"), "clips", "required key is missing")
