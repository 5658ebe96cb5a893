"""What a finished run came to: its model on held-out episodes, beside its loss curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from far_scale.data.video.videos import find_videos
from far_scale.files import sha256, write_json
from far_scale.recipe import load_recipe
from far_scale.sampling.curve import loss_curve
from far_scale.sampling.evaluate import evaluate, load_for_sampling

EPISODES = 32
FRAMES_IN_ALL = 1280  # predicted at most, so that long clips take minutes on two cores, too: of these, fewer episodes
PICTURES = ("samples.mp4", "samples.png", "loss.png")


def report_run(run: str | Path, model_dir: str | Path, videos: str | Path, out: str | Path) -> dict[str, Any]:
    """Evaluate `model_dir` by the `sample` section of the run's recipe and draw the run's loss curve.

    Nothing is done again where `out` holds the report of these very weights, settings and episodes.

    Args:
        run: the run directory, with recipe.yaml and log.jsonl.
        model_dir: the model exported from it.
        videos: held-out episodes; the first frames of each are given, the rest of a clip is predicted.
        out: folder for samples.mp4, samples.png, samples.safetensors, loss.png and metrics.json.

    Returns:
        What metrics.json holds: see `evaluate`, and `made_from`, what the report was made from.

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
    weights = sorted(Path(model_dir).glob("*.safetensors"))
    made_from = {
        **settings,
        "weights": [sha256(path) for path in weights],
        "videos": [path.name for path in find_videos(videos)],
    }
    metrics = out / "metrics.json"
    if metrics.exists() and all((out / name).exists() for name in PICTURES):
        report = json.loads(metrics.read_text())
        if report.get("made_from") == made_from:
            return report

    loss_curve(out / "loss.png", run / "log.jsonl")
    model, card = load_for_sampling(model_dir)
    report = evaluate(model, card, videos, **settings, out=out)
    report["made_from"] = made_from
    write_json(metrics, report)
    return report
