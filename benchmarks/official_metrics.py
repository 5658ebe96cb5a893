"""The official code's metrics and ours on the same samples: the same scores, lossless and through an MP4.

    python benchmarks/official_metrics.py --official PATH_TO_A_CLONE --samples OUT_OF_TOOLS_EVALUATE --given 8

See benchmarks/README.md for what is compared and how.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Row, commit, environment, print_table, write_result
from numpy.typing import NDArray
from official_evaluation import OfficialEvaluation
from options import count
from torch import Tensor

from far_scale.evaluation.codec import through_h264, with_border
from far_scale.evaluation.metrics import Arrays, Metrics
from far_scale.evaluation.protocol import METRICS, Protocol, load_protocol
from far_scale.evaluation.score_statistics import FeatureStatistics, frechet_distance
from far_scale.evaluation.weights import load_i3d, load_lpips
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError

PROTOCOL = "ucf101-mcvd-64@official"  # metrics as officially; given frames, border and codec are set here
ALLOWED = 1e-4
VERSIONS = ("av", "imageio", "imageio-ffmpeg", "lpips", "pytorchvideo", "scipy", "torchmetrics")

Pixels = NDArray[np.uint8]


@command_line
def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    samples, truth = read_samples(args.samples, args.clips)
    frames = truth.shape[1]
    if not 0 < args.given < frames:
        raise UserError(f"--given {args.given}: clips have {frames} frames; give 1 to {frames - 1}")
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    shape = {"clips": str(len(truth)), "samples of a clip": str(samples.shape[1]), "frames": str(frames)}
    more = {"official commit": commit(args.official, "far"), "given": str(args.given), **shape, **versions}
    facts = environment(torch.device("cpu"), more)

    with tempfile.TemporaryDirectory() as folder:
        official = OfficialEvaluation(args.official, Path(folder), load_lpips(), load_i3d(), frames)
        lossless = tensors(samples), tensors(spread(truth, samples))
        rows = compare(
            "lossless", official, *lossless, our_scores(samples, truth, args.given, through_mp4=False), args.given
        )
        videos = Path(folder) / "videos"
        for number, (sample, true) in enumerate(zip(*lossless, strict=True)):
            official.write(videos, f"{number:05d}", sample, true, args.given, border=True)
        pair = official.read(videos, samples.shape[1])
        ours = our_scores(samples, truth, args.given, through_mp4=True)
        rows += compare("border and MP4", official, *pair, ours, args.given)
        pixels = [compare_pixels(*pair, samples, spread(truth, samples), args.given)]

    tables = {"Scores": rows, "Frames after the MP4": pixels}
    path = write_result(args.out, "official-metrics-cpu", facts, tables)
    for title, table in tables.items():
        print_table(title, table)
    print(f"\nwritten: {path} and .json", flush=True)
    if not all(row["holds"] for row in rows):
        sys.exit("the two codes differ by more than is allowed")


def compare(
    way: str, official: OfficialEvaluation, sample: Tensor, truth: Tensor, ours: dict[str, float], given: int
) -> list[Row]:
    """A row a metric: the official code's score of `[N, S, F, 3, h, w]` from 0 to 1, and ours."""
    theirs = official.scores(sample.contiguous(), truth.contiguous(), given, METRICS)
    rows: list[Row] = []
    for metric in METRICS:
        difference = abs(ours[metric] / theirs[metric] - 1)
        numbers: Row = {"official": f"{theirs[metric]:.6g}", "ours": f"{ours[metric]:.6g}"}
        limits: Row = {"difference / official": difference, "allowed": ALLOWED, "holds": difference <= ALLOWED}
        rows.append({"way": way, "metric": metric, **numbers, **limits})
    return rows


def our_scores(samples: Pixels, truth: Pixels, given: int, through_mp4: bool) -> dict[str, float]:
    """far_scale's scores of samples `[N, S, F, h, w, 3]`, with the official choices."""
    protocol = official_choices(given, truth.shape[1] - given, through_mp4)
    metrics = Metrics(protocol, torch.device("cpu"))
    arrays = metrics.compute(samples, truth)
    real = arrays if through_mp4 else metrics.real_logits(truth)
    psnr = -10 * np.log10(arrays["mse"])
    return {
        "lpips": float(arrays["lpips"].mean(2).min(1).mean()),
        "psnr": float(psnr.mean(2).max(1).mean()),
        "ssim": float(arrays["ssim"].mean(2).max(1).mean()),
        "fvd": float(np.mean([fvd(arrays, real, number) for number in range(samples.shape[1])])),
    }


def fvd(arrays: Arrays, real: Arrays, number: int) -> float:
    """Of the clips' samples `number`."""
    logits, others = arrays["logits"][:, number], real["real_logits"]
    others = others[:, min(number, others.shape[1] - 1)]
    statistics = [FeatureStatistics.of(torch.from_numpy(features)) for features in (logits, others)]
    return frechet_distance(*statistics)


def official_choices(given: int, predicted: int, through_mp4: bool) -> Protocol:
    values = load_protocol(PROTOCOL).model_dump(mode="json")
    values["sampling"] |= {"given": given, "predicted": predicted}
    values["frames"] |= {"border": through_mp4, "codec": "h264" if through_mp4 else "none"}
    return Protocol.model_validate(values)


def compare_pixels(sample: Tensor, true: Tensor, samples: Pixels, truth: Pixels, given: int) -> Row:
    """How far the official writer's and reader's frames `[N, S, F, 3, h, w]` are from those of far_scale's codec."""
    away = []
    for number in range(len(samples)):
        both = [np.stack([with_border(each, given) for each in videos[number]]) for videos in (samples, truth)]
        ours = through_h264(*(videos.reshape(-1, *videos.shape[2:]) for videos in both))
        for theirs, mine, before in zip((sample, true), ours, both, strict=True):
            decoded = (theirs[number] * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy().reshape(mine.shape)
            away.append((np.abs(decoded.astype(int) - mine), np.abs(mine.astype(int) - before.reshape(mine.shape))))
    return {
        "largest difference, of 255": max(int(codes.max()) for codes, _ in away),
        "mean difference": float(np.mean([codes.mean() for codes, _ in away])),
        "mean error of the MP4 itself": float(np.mean([lossy.mean() for _, lossy in away])),
    }


def read_samples(folder: Path, clips: int | None) -> tuple[Pixels, Pixels]:
    """Samples `[N, S, F, h, w, 3]` and truth `[N, F, h, w, 3]` that tools/evaluate.py kept."""
    paths = sorted((folder / "samples").glob("*.npz"))[:clips]
    if len(paths) < 2:
        raise UserError(f"{folder}: {len(paths)} files samples/*.npz, and FVD needs 2; name the --out of an evaluation")
    files = [np.load(path) for path in paths]
    samples = [file["frames"] if file["frames"].ndim == 5 else file["frames"][None] for file in files]
    return np.stack(samples), np.stack([file["truth"] for file in files])


def spread(truth: Pixels, samples: Pixels) -> Pixels:
    """Truth `[N, F, ...]` as often as there are samples: `[N, S, F, ...]`."""
    return np.repeat(truth[:, None], samples.shape[1], axis=1)


def tensors(frames: Pixels) -> Tensor:
    """`[..., h, w, 3]` to float32 `[..., 3, h, w]` from 0 to 1."""
    return torch.from_numpy(frames).movedim(-1, -3).float() / 255


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the official FAR code's metrics with ours.")
    parser.add_argument("--official", type=Path, required=True, help="clone of github.com/showlab/FAR")
    parser.add_argument("--samples", type=Path, required=True, help="folder that tools/evaluate.py wrote")
    parser.add_argument("--given", type=count, required=True, help="frames of a clip that were given")
    parser.add_argument("--clips", type=count, help="no more than these (default: all)")
    parser.add_argument("--threads", type=count, help="torch threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
