"""Aggregates the batches of an evaluation into scores: best samples, means, intervals, Frechet distances.

shape letters   N clips   S samples (trajectories) of a clip   P predicted frames
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from far_scale.evaluation.batches import BASELINES, ClipBatch, Evaluation, read_arrays
from far_scale.evaluation.metrics import Arrays
from far_scale.evaluation.protocol import Protocol
from far_scale.evaluation.rollouts.psnr_ssim import psnr
from far_scale.evaluation.score_statistics import (
    MIN_CLIPS_TO_EXTRAPOLATE,
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    frechet_infinity,
    over_seeds,
)
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, write_json

SCORES_FILE = "scores.json"
PER_CLIP_FILE = "per_clip.npz"
Float = NDArray[np.float64]


@dataclass
class _SystemResults:
    """The metrics of one system, one entry per seed."""

    paired: list[dict[str, list[Float]]] = field(default_factory=list)  # seed -> mse, ssim, lpips -> [S, P] a clip
    fvd: list[float] = field(default_factory=list)
    infinity: list[float] = field(default_factory=list)


def write_scores(evaluation: Evaluation, guidance: float) -> dict[str, Any]:
    """Aggregate all batches into scores.json and per_clip.npz; returns the content of scores.json.

    Batches are read one by one; memory holds a few numbers per frame, and the features.

    Args:
        guidance: that the model sampled with.

    Raises:
        UserError: batches are missing.
    """
    if missing := evaluation.missing(evaluation.batches()):
        names = ", ".join(batch.name for batch in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{evaluation.out}: {len(missing)} of {len(evaluation.batches())} batches are missing ({names}); run the "
            "same command again to compute them (with --task, all tasks), then merge"
        )
    protocol, systems = evaluation.protocol, {"prediction": _SystemResults()}
    baselines = list(_read_batches(evaluation, None))
    real = _real_features(baselines)
    for seed in protocol.sampling.seeds:
        _add_seed(systems["prediction"], list(_read_batches(evaluation, seed)), "", real)
    for name in BASELINES:
        if any(key.startswith(f"{name}/") for key in baselines[0]):
            systems[name] = _SystemResults()
            _add_seed(systems[name], baselines, f"{name}/", real)

    scores: dict[str, Any] = {name: None for name in ("prediction", *BASELINES)}
    per_clip: dict[str, Any] = {"keys": np.array(evaluation.clips.keys), "given": protocol.sampling.given}
    for name, system in systems.items():
        scores[name], frames = _score_system(system, protocol)
        per_clip |= {f"{name}/{metric}": values for metric, values in frames.items()}
    result = {
        **evaluation.settings(),
        "guidance": guidance,
        "scores": scores.pop("prediction"),
        **scores,
        "settings": protocol.model_dump(mode="json"),
    }
    with atomic_write(evaluation.out / PER_CLIP_FILE) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **per_clip)
    write_json(evaluation.out / SCORES_FILE, result)
    return result


def seconds_by_kind(evaluation: Evaluation) -> dict[str, float]:
    """Seconds that all processes together spent on baselines and on samples."""
    seconds = {"baselines": 0.0, "samples": 0.0}
    for batch in evaluation.batches():
        arrays = read_arrays(evaluation.batch_file(batch))
        if arrays is not None:
            seconds["baselines" if batch.seed is None else "samples"] += float(arrays["seconds"])
    return seconds


def _read_batches(evaluation: Evaluation, seed: int | None) -> Iterator[Arrays]:
    """The arrays of a seed's batches, or of the baselines', in the order of the clips."""
    for number in range(evaluation.batch_count):
        path = evaluation.batch_file(ClipBatch(number, seed))
        arrays = read_arrays(path)
        if arrays is None:
            raise UserError(f"{path}: was removed; run the same command again")
        yield arrays


def _real_features(baselines: list[Arrays]) -> torch.Tensor | None:
    """`[N, 400]` features of the true clips; None without FVD, or if the truth differs between samples."""
    if "real_logits" not in baselines[0]:
        return None
    return torch.from_numpy(np.concatenate([arrays["real_logits"][:, 0] for arrays in baselines]))


def _add_seed(system: _SystemResults, batches: list[Arrays], prefix: str, real: torch.Tensor | None) -> None:
    """Add one seed's batches to a system."""
    paired: dict[str, list[Float]] = {}
    for metric in ("mse", "ssim", "lpips"):
        if prefix + metric in batches[0]:
            paired[metric] = [clip for arrays in batches for clip in arrays[prefix + metric].astype(np.float64)]
    system.paired.append(paired)
    if f"{prefix}logits" not in batches[0]:
        return
    logits = torch.from_numpy(np.concatenate([arrays[f"{prefix}logits"] for arrays in batches]))  # [N, S, 400]
    reals = None
    if real is None:
        reals = torch.from_numpy(np.concatenate([arrays[f"{prefix}real_logits"] for arrays in batches]))
    distances, extrapolated = [], []
    for trajectory in range(logits.shape[1]):
        generated = logits[:, trajectory]
        true = real if reals is None else reals[:, trajectory]
        assert true is not None
        distances.append(frechet_distance(FeatureStatistics.of(generated), FeatureStatistics.of(true)))
        if len(generated) >= MIN_CLIPS_TO_EXTRAPOLATE:
            extrapolated.append(frechet_infinity(generated, true, seed=0))
    system.fvd.append(float(np.mean(distances)))
    if extrapolated:
        system.infinity.append(float(np.mean(extrapolated)))


def _score_system(system: _SystemResults, protocol: Protocol) -> tuple[dict[str, Any], dict[str, Float]]:
    """A system's scores, and its paired metrics by clip and frame, `[N, P]`, means over the seeds."""
    scores: dict[str, Any] = {}
    frames: dict[str, Float] = {}
    for metric in protocol.metrics:
        if metric == "fvd":
            if system.fvd:
                spread = over_seeds(system.fvd)
                scores["fvd"] = {"mean": spread.mean, "std": spread.std, "seeds": len(system.fvd)}
                if system.infinity:
                    scores["fvd"]["infinity"] = over_seeds(system.infinity).mean
            continue
        stored = "mse" if metric == "psnr" else metric
        values, by_frame = zip(
            *(_best_samples(paired[stored], metric, protocol) for paired in system.paired if stored in paired),
            strict=True,
        )
        clips, frames[metric] = np.mean(values, axis=0), np.mean(by_frame, axis=0)
        scores[metric] = _mean_with_interval(clips, metric, protocol)
    return scores, frames


def _best_samples(clips: list[Float], metric: str, protocol: Protocol) -> tuple[Float, Float]:
    """One seed's score of each clip by its best sample, `[N]`, and that sample's scores by frame, `[N, P]`."""
    sample_score, frame_scores, lower_is_better = _reductions(metric, protocol)
    values, frames = [], []
    for stored in clips:  # [S, P]
        scores = np.array([sample_score(sample) for sample in stored])
        best = int(scores.argmin() if lower_is_better else scores.argmax())
        values.append(scores[best])
        frames.append(frame_scores(stored[best]))
    return np.array(values), np.array(frames)


def _reductions(metric: str, protocol: Protocol) -> tuple[Callable[[Float], float], Callable[[Float], Float], bool]:
    """Functions from a sample's stored values `[P]` to its score and to its scores by frame; whether low is best."""
    if metric != "psnr":
        return (lambda sample: float(sample.mean())), (lambda sample: sample), metric == "lpips"
    assert protocol.psnr is not None
    by_frame = np.vectorize(psnr, otypes=[np.float64])
    if protocol.psnr.mean_of == "frames":
        return (lambda sample: float(by_frame(sample).mean())), by_frame, False
    if protocol.psnr.mean_of == "clips":
        return (lambda sample: psnr(float(sample.mean()))), by_frame, False
    return (lambda sample: float(sample.mean())), by_frame, True  # the mean of MSEs becomes a PSNR later


def _mean_with_interval(clips: Float, metric: str, protocol: Protocol) -> dict[str, Any]:
    """Mean over clips `[N]` and its 95% bootstrap interval (null for a single clip)."""
    mean = float(clips.mean())
    interval = list(bootstrap_interval(clips)) if len(clips) > 1 else None
    if metric == "psnr" and protocol.psnr is not None and protocol.psnr.mean_of == "set":
        mean = psnr(mean)
        interval = None if interval is None else [psnr(interval[1]), psnr(interval[0])]
    return {"mean": mean, "ci95": interval}
