"""The units of an evaluation as scores: best samples, means, intervals, Frechet distances.

shape letters   N clips   S samples (trajectories) of a clip   P predicted frames   seeds stand first
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
    """What was measured of one kind of prediction; an entry a seed, of arrays over all clips."""

    paired: list[dict[str, list[Float]]] = field(default_factory=list)  # seed -> mse, ssim, lpips -> [S, P] a clip
    fvd: list[float] = field(default_factory=list)
    infinity: list[float] = field(default_factory=list)


def write_scores(evaluation: Evaluation, guidance: float) -> dict[str, Any]:
    """Merge all units into scores.json and per_clip.npz; returns what scores.json says.

    Units are read one after the other; what stays in memory are a few numbers a frame, and the features.

    Args:
        guidance: what the model sampled with.

    Raises:
        UserError: units are missing.
    """
    if missing := evaluation.missing(evaluation.units()):
        names = ", ".join(unit.name for unit in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{evaluation.out}: {len(missing)} of {len(evaluation.units())} units are missing ({names}); run the same "
            "command again to compute them (with --task, all tasks), then merge"
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
    with atomic_write(evaluation.out / PER_CLIP_FILE) as beside, open(beside, "wb") as file:
        np.savez_compressed(file, **per_clip)
    write_json(evaluation.out / SCORES_FILE, result)
    return result


def seconds_by_kind(evaluation: Evaluation) -> dict[str, float]:
    """Seconds that the units took, of all processes together: baselines, and samples."""
    taken = {"baselines": 0.0, "samples": 0.0}
    for unit in evaluation.units():
        arrays = read_arrays(evaluation.unit_file(unit))
        if arrays is not None:
            taken["baselines" if unit.seed is None else "samples"] += float(arrays["seconds"])
    return taken


def _read_batches(evaluation: Evaluation, seed: int | None) -> Iterator[Arrays]:
    """The units of a seed, or the baselines, in the order of the clips."""
    for number in range(evaluation.batches):
        unit = ClipBatch(number, seed)
        arrays = read_arrays(evaluation.unit_file(unit))
        if arrays is None:
            raise UserError(f"{evaluation.unit_file(unit)}: was removed; run the same command again")
        yield arrays


def _real_features(baselines: list[Arrays]) -> torch.Tensor | None:
    """`[N, 400]` features of the true clips; None where they differ from sample to sample, or FVD is not computed."""
    if "real_logits" not in baselines[0]:
        return None
    return torch.from_numpy(np.concatenate([arrays["real_logits"][:, 0] for arrays in baselines]))


def _add_seed(system: _SystemResults, units: list[Arrays], prefix: str, real: torch.Tensor | None) -> None:
    """Add one seed's units to a system."""
    paired: dict[str, list[Float]] = {}
    for metric in ("mse", "ssim", "lpips"):
        if prefix + metric in units[0]:
            paired[metric] = [clip for arrays in units for clip in arrays[prefix + metric].astype(np.float64)]
    system.paired.append(paired)
    if f"{prefix}logits" not in units[0]:
        return
    logits = torch.from_numpy(np.concatenate([arrays[f"{prefix}logits"] for arrays in units]))  # [N, S, 400]
    reals = None
    if real is None:
        reals = torch.from_numpy(np.concatenate([arrays[f"{prefix}real_logits"] for arrays in units]))
    distances, extrapolated = [], []
    for number in range(logits.shape[1]):
        ours = logits[:, number]
        theirs = real if reals is None else reals[:, number]
        assert theirs is not None
        distances.append(frechet_distance(FeatureStatistics.of(ours), FeatureStatistics.of(theirs)))
        if len(ours) >= MIN_CLIPS_TO_EXTRAPOLATE:
            extrapolated.append(frechet_infinity(ours, theirs, seed=0))
    system.fvd.append(float(np.mean(distances)))
    if extrapolated:
        system.infinity.append(float(np.mean(extrapolated)))


def _score_system(system: _SystemResults, protocol: Protocol) -> tuple[dict[str, Any], dict[str, Float]]:
    """The scores of a system, and of its paired metrics the values `[N, P]` by clip and frame, means over the seeds."""
    found: dict[str, Any] = {}
    frames: dict[str, Float] = {}
    for metric in protocol.metrics:
        if metric == "fvd":
            if system.fvd:
                spread = over_seeds(system.fvd)
                found["fvd"] = {"mean": spread.mean, "std": spread.std, "seeds": len(system.fvd)}
                if system.infinity:
                    found["fvd"]["infinity"] = over_seeds(system.infinity).mean
            continue
        stored = "mse" if metric == "psnr" else metric
        values, by_frame = zip(
            *(_best_samples(paired[stored], metric, protocol) for paired in system.paired if stored in paired),
            strict=True,
        )
        clips, frames[metric] = np.mean(values, axis=0), np.mean(by_frame, axis=0)
        found[metric] = _mean_with_interval(clips, metric, protocol)
    return found, frames


def _best_samples(clips: list[Float], metric: str, protocol: Protocol) -> tuple[Float, Float]:
    """Of one seed: each clip's value by its best sample, `[N]`, and this sample's values by frame, `[N, P]`."""
    of_sample, of_frame, lower_is_better = _reductions(metric, protocol)
    values, frames = [], []
    for stored in clips:  # [S, P]
        each = np.array([of_sample(sample) for sample in stored])
        best = int(each.argmin() if lower_is_better else each.argmax())
        values.append(each[best])
        frames.append(of_frame(stored[best]))
    return np.array(values), np.array(frames)


def _reductions(metric: str, protocol: Protocol) -> tuple[Callable[[Float], float], Callable[[Float], Float], bool]:
    """How a sample's stored values `[P]` become its value and its values by frame, and which sample is the best."""
    if metric != "psnr":
        return (lambda sample: float(sample.mean())), (lambda sample: sample), metric == "lpips"
    assert protocol.psnr is not None
    by_frame = np.vectorize(psnr, otypes=[np.float64])
    if protocol.psnr.mean_of == "frames":
        return (lambda sample: float(by_frame(sample).mean())), by_frame, False
    if protocol.psnr.mean_of == "clips":
        return (lambda sample: psnr(float(sample.mean()))), by_frame, False
    return (lambda sample: float(sample.mean())), by_frame, True  # the squared error, whose mean becomes a PSNR


def _mean_with_interval(clips: Float, metric: str, protocol: Protocol) -> dict[str, Any]:
    """Mean over clips `[N]` and its 95% bootstrap interval (null for a single clip)."""
    mean = float(clips.mean())
    interval = list(bootstrap_interval(clips)) if len(clips) > 1 else None
    if metric == "psnr" and protocol.psnr is not None and protocol.psnr.mean_of == "set":
        mean = psnr(mean)
        interval = None if interval is None else [psnr(interval[1]), psnr(interval[0])]
    return {"mean": mean, "ci95": interval}
