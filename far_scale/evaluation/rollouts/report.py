"""What a finished run came to: its model on held-out episodes, beside its loss curve."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import far_scale
from far_scale.config.recipe import Recipe, load_recipe
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.video.find import find_videos
from far_scale.evaluation.rollouts.curve import loss_curve
from far_scale.evaluation.rollouts.evaluate import evaluate, load_for_sampling
from far_scale.model import FAR
from far_scale.train.checkpoint.folders import CHECKSUMS, fingerprint, step_folder
from far_scale.utils.errors import print_warning
from far_scale.utils.io import check_writable, parse_json, sha256, write_json

EPISODES = 32
FRAMES_IN_ALL = 1280  # predicted at most, so that long clips take minutes on two cores, too: of these, fewer episodes
FILES = ("samples.mp4", "samples.png", "samples.safetensors", "loss.png")


def report_run(run: str | Path, model_dir: str | Path, videos: str | Path, out: str | Path) -> dict[str, Any]:
    """Evaluate `model_dir` by the `sample` section of the run's recipe and draw the run's loss curve.

    Nothing is done again where `out` holds the report of this very content: model, settings, episodes and log.

    Args:
        run: the run directory, with recipe.yaml and log.jsonl.
        model_dir: the model exported from it.
        videos: held-out episodes, a video, a folder of them or a shard set; the first frames of each are given, the
            rest of a clip is predicted.
        out: folder for samples.mp4, samples.png, samples.safetensors, loss.png and metrics.json.

    Returns:
        What metrics.json holds: see `evaluate`, and `made_from`, what the report was made from, and `files`, the
        SHA-256 of those beside it.

    Raises:
        UserError: a file that is missing or does not fit the model.
    """
    run, out = Path(run), Path(out)
    recipe = load_recipe(run / "recipe.yaml")
    frames = recipe.sample_frames()
    settings: dict[str, Any] = {
        "given": recipe.sample.given,
        "frames": frames,
        "steps": recipe.sample.steps,
        "guidance": recipe.sample.guidance,
        "seed": recipe.seed,
        "episodes": max(1, min(EPISODES, FRAMES_IN_ALL // frames)),
    }
    if recipe.sample.context_noise:
        settings["context_noise"] = recipe.sample.context_noise
    made_from = {
        **settings,
        "far_scale": far_scale.__version__,
        "model": {path.name: sha256(path) for path in sorted(Path(model_dir).glob("*")) if path.is_file()},
        "log": _digest(run / "log.jsonl"),
        **_source(Path(videos), settings["episodes"]),
    }
    metrics = out / "metrics.json"
    if (report := _made_before(metrics)) is not None and report["made_from"] == made_from:
        return report

    for name in (*FILES, metrics.name):
        check_writable(out / name)
    loss_curve(out / "loss.png", run / "log.jsonl")
    model, card = load_for_sampling(model_dir)
    for difference in _not_of_run(run, model, card, recipe):
        print_warning(f"{model_dir}: not exported from {run} as it is now: {difference}")
    report = evaluate(model, card, videos, **settings, out=out)
    report["made_from"] = made_from
    report["files"] = {name: sha256(out / name) for name in FILES}
    write_json(metrics, report)
    return report


def _made_before(metrics: Path) -> dict[str, Any] | None:
    """The report of metrics.json, if the files beside it are still those that were written with it."""
    try:
        report = parse_json(metrics.read_text())
        files = {name: _digest(metrics.with_name(name)) for name in FILES}
        return report if report["files"] == files and "made_from" in report else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _source(videos: Path, episodes: int) -> dict[str, Any]:
    """The content of the episodes that are sampled from."""
    if (videos / MANIFEST_NAME).is_file():
        return {"shards": Manifest.read(videos).fingerprint()}
    return {"videos": [[path.name, sha256(path)] for path in find_videos(videos)[:episodes]]}


def _not_of_run(run: Path, model: FAR, card: ModelMetadata, recipe: Recipe) -> list[str]:
    """In which a model's metadata are not what the run's recipe says, each with both values."""
    shapes = [stage.latent_shape or recipe.data.latent_shape for stage in recipe.curriculum] or [
        recipe.data.latent_shape
    ]
    windows = {stage.window for stage in recipe.curriculum if stage.window}
    theirs, ours = asdict(model.config), asdict(recipe.far_config())
    pairs = [(f"model.{key}", theirs[key], ours[key]) for key in ours if key != "window" or theirs[key] not in windows]
    pairs.append(("data.autoencoder", card.autoencoder.name, recipe.data.autoencoder))
    if card.latent_shape not in shapes:
        pairs.append(("data.latent_shape", list(card.latent_shape), list(shapes[0])))
    pairs.append(("data.frame_stride", card.frame_stride, recipe.data.frame_stride))
    pairs.append(("data.scaling", card.scaling.kind, recipe.data.scaling))
    lines = [f"{key} {own}, the recipe has {wanted}" for key, own, wanted in pairs if own != wanted]
    if isinstance(card.training, TrainingMetadata):
        if not lines and card.training.recipe_hash != recipe.hash():
            lines.append("it was trained by another recipe")
        folder = step_folder(run, card.training.step)
        if not lines and (folder / CHECKSUMS).is_file() and card.training.checkpoint != fingerprint(folder):
            lines.append(f"{folder} is not the checkpoint that it was exported from")
    return lines


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None
