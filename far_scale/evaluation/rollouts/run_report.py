"""The report of a finished run: its model on held-out episodes, and its loss curve."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import far_scale
from far_scale.config.recipe import Recipe, load_recipe
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.video.videos import find_videos
from far_scale.evaluation.rollouts.loss_curve import draw_loss_curve
from far_scale.evaluation.rollouts.runner import evaluate_rollout, load_for_sampling
from far_scale.model import FAR
from far_scale.sampling.config import SamplingConfig
from far_scale.train.checkpoint.folders import CHECKSUMS, fingerprint
from far_scale.train.run_dir import step_folder
from far_scale.utils.errors import print_warning
from far_scale.utils.io import check_writable, parse_json, sha256, write_json

EPISODES = 32
MAX_PREDICTED_FRAMES = 1280  # over all episodes, so that long clips, too, take only minutes on two cores
REPORT_FILES = ("samples.mp4", "samples.png", "samples.safetensors", "loss.png")


def report_run(run: str | Path, model_dir: str | Path, videos: str | Path, out: str | Path) -> dict[str, Any]:
    """Evaluate `model_dir` by the `sample` section of the run's recipe and draw the run's loss curve.

    An existing report in `out` is kept if it is of the same model, settings, episodes and log.

    Args:
        run: the run directory, with recipe.yaml and log.jsonl.
        model_dir: the model exported from it.
        videos: held-out episodes, a video, a folder of them or a shard set; the first frames of each are given, the
            rest of a clip is predicted.
        out: folder for samples.mp4, samples.png, samples.safetensors, loss.png and metrics.json.

    Returns:
        The content of metrics.json: that of `evaluate_rollout`, `made_from` (what the report was made from) and
        `files` (the SHA-256 of the other files).

    Raises:
        UserError: a file that is missing or does not fit the model.
    """
    run, out = Path(run), Path(out)
    recipe = load_recipe(run / "recipe.yaml")
    given, sampling = (
        recipe.sample.given,
        SamplingConfig.from_section(recipe.sample, recipe.sample_frames(), recipe.seed),
    )
    episodes = max(1, min(EPISODES, MAX_PREDICTED_FRAMES // sampling.frames))
    settings: dict[str, Any] = {
        "given": given,
        "frames": sampling.frames,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "seed": sampling.seed,
        "episodes": episodes,
    }
    if sampling.context_noise:
        settings["context_noise"] = sampling.context_noise
    made_from = {
        **settings,
        "far_scale": far_scale.__version__,
        "model": {path.name: sha256(path) for path in sorted(Path(model_dir).glob("*")) if path.is_file()},
        "log": _digest(run / "log.jsonl"),
        **_episodes_content(Path(videos), episodes),
    }
    metrics = out / "metrics.json"
    if (report := _existing_report(metrics)) is not None and report["made_from"] == made_from:
        return report

    for name in (*REPORT_FILES, metrics.name):
        check_writable(out / name)
    draw_loss_curve(out / "loss.png", run / "log.jsonl")
    model, metadata = load_for_sampling(model_dir)
    for difference in _differences_from_run(run, model, metadata, recipe):
        print_warning(f"{model_dir}: not exported from {run} as it is now: {difference}")
    report = evaluate_rollout(model, metadata, videos, sampling=sampling, given=given, episodes=episodes, out=out)
    report["made_from"] = made_from
    report["files"] = {name: sha256(out / name) for name in REPORT_FILES}
    write_json(metrics, report)
    return report


def _existing_report(metrics: Path) -> dict[str, Any] | None:
    """The report in metrics.json, if the other files are unchanged since it was written."""
    try:
        report = parse_json(metrics.read_text())
        files = {name: _digest(metrics.with_name(name)) for name in REPORT_FILES}
        return report if report["files"] == files and "made_from" in report else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _episodes_content(videos: Path, episodes: int) -> dict[str, Any]:
    """Hashes of the episodes that are sampled from."""
    if (videos / MANIFEST_NAME).is_file():
        return {"shards": Manifest.read(videos).fingerprint()}
    return {"videos": [[path.name, sha256(path)] for path in find_videos(videos)[:episodes]]}


def _differences_from_run(run: Path, model: FAR, metadata: ModelMetadata, recipe: Recipe) -> list[str]:
    """Where a model's metadata differ from the run's recipe, a line each with both values."""
    shapes = [stage.latent_shape or recipe.data.latent_shape for stage in recipe.curriculum] or [
        recipe.data.latent_shape
    ]
    windows = {stage.window for stage in recipe.curriculum if stage.window}
    of_model, of_recipe = asdict(model.config), asdict(recipe.far_config())
    pairs = [
        (f"model.{key}", of_model[key], value)
        for key, value in of_recipe.items()
        if key != "window" or of_model[key] not in windows
    ]
    pairs.append(("data.autoencoder", metadata.autoencoder.name, recipe.data.autoencoder))
    if metadata.latent_shape not in shapes:
        pairs.append(("data.latent_shape", list(metadata.latent_shape), list(shapes[0])))
    pairs.append(("data.frame_stride", metadata.frame_stride, recipe.data.frame_stride))
    if recipe.data.scaling != "start":
        pairs.append(("data.scaling", metadata.scaling.kind, recipe.data.scaling))
    lines = [f"{key} {found}, the recipe has {expected}" for key, found, expected in pairs if found != expected]
    if isinstance(metadata.training, TrainingMetadata):
        if not lines and metadata.training.recipe_hash != recipe.hash():
            lines.append("it was trained by another recipe")
        folder = step_folder(run, metadata.training.step)
        if not lines and (folder / CHECKSUMS).is_file() and metadata.training.checkpoint != fingerprint(folder):
            lines.append(f"{folder} is not the checkpoint that it was exported from")
    return lines


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None
