"""The card of a model directory: README.md with front matter, as the Hugging Face hub reads and shows it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from far_scale.autoencoder.loading import SHIPPED_WEIGHTS
from far_scale.config.recipe import load_recipe
from far_scale.config.schema import Shards, shard_urls
from far_scale.convert.model_dir import (
    CARD_FILE,
    CARD_MARK,
    ModelMetadata,
    TrainingMetadata,
    empty_model,
    is_generated_card,
    read_config,
)
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.evaluation.pipeline import describe_weights
from far_scale.evaluation.report import describe_settings
from far_scale.evaluation.results import read_scores
from far_scale.evaluation.tables import LEGEND, comparison_notes, score_rows, scores_table
from far_scale.model import FARConfig
from far_scale.model.hub import is_repository
from far_scale.model.model_files import stored_dtypes
from far_scale.model.presets import describe
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write
from far_scale.utils.urls import is_remote

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_HYPER_PARAMETERS: dict[str, tuple[str, ...] | None] = {
    "objective": None,
    "optimizer": None,
    "data": ("frames", "frame_stride", "lanes", "clips_per_pack", "tokens_per_pack", "scaling"),
    "train": ("steps", "precision"),
}
"""The recipe's sections and keys in a card: all of a section, or some; none of them holds a path."""
_STAGE_KEYS = ("steps", "frames", "clips_per_pack", "tokens_per_pack", "window", "learning_rate_scale")
_PREDICTED = 8  # frames, by the card's command
_CITATION = """@article{gu2025long,
  title   = {Long-Context Autoregressive Video Modeling with Next-Frame Prediction},
  author  = {Gu, Yuchao and Mao, Weijia and Shou, Mike Zheng},
  journal = {arXiv preprint arXiv:2503.19325},
  year    = {2025}
}"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the model directory's own metadata.

    Attributes:
        license: the hub's identifier of the weights' licence.
        name: what the card's commands load, a repository of the hub or a path; None for the model directory's path.
        trained_on: sentences about the training data.
        run: the run directory that the model was exported from, for its hyper-parameters.
        scores: folders that evaluations of this model wrote.
    """

    license: str
    name: str | None = None
    trained_on: str | None = None
    run: Path | None = None
    scores: tuple[Path, ...] = ()


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write README.md into a model directory, and return its path; an older card is replaced.

    Raises:
        UserError: `folder` is no model directory or lacks what sampling needs; README.md is not a card of ours; a run
            or scores of another model; or an invalid licence.
    """
    config, metadata = read_config(folder)
    path = folder / CARD_FILE
    if path.exists() and not is_generated_card(path):
        raise UserError(f"{path}: was not written by tools/model_card.py, or was edited; move it away first")
    if _LICENSE.fullmatch(facts.license) is None:
        raise UserError(f"--license {facts.license}: is no identifier of the hub, as in apache-2.0, cc-by-4.0 or other")
    name = facts.name or (folder.resolve().name if folder.is_absolute() else str(folder))
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(config, facts.license), sort_keys=False)}---\n{CARD_MARK}",
        f"# {Path(name).name}",
        *_introduction(folder, config, metadata),
        "## Training",
        *_training(folder, metadata, facts),
        *(["## Scores"] if facts.scores else []),
        *(part for out in facts.scores for part in _scores(folder, metadata, out)),
        "## Sampling",
        *_sampling(name, config, metadata),
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
    ]
    with atomic_write(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _front_matter(config: FARConfig, license: str) -> dict[str, Any]:
    tags = ["far", "video-generation", "video-prediction", "autoregressive"]
    tags += ["world-model"] * bool(config.actions) + ["long-context"] * bool(config.context_patch)
    return {"license": license, "library_name": "far_scale", "pipeline_tag": "image-to-video", "tags": tags}


def _introduction(folder: Path, config: FARConfig, metadata: ModelMetadata) -> Iterator[str]:
    if config.causal:
        kind = (
            "A FAR model ([arXiv 2503.19325](https://arxiv.org/abs/2503.19325)): a transformer that predicts the next"
        )
        kind += " frame of a video from all earlier ones"
    else:
        kind = "A video diffusion transformer, which denoises all frames of a clip together"
    yield f"{kind}, by flow matching in the latents of an autoencoder. Trained with far_scale."
    parameters = sum(math.prod(tensor.shape) for tensor in empty_model(config).parameters())
    dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored_dtypes(folder)))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    frames = f"the last {config.window} frames" if config.causal else f"clips of at most {config.window} frames"
    if config.context_patch:
        frames += f" finely, all earlier ones in patches of {config.context_patch} x {config.context_patch}"
    rows = {
        "model": describe(config),
        "parameters": f"{parameters / 1e6:,.1f} million",
        "weights": f"{dtypes}, {size / 1e6:,.1f} MB",
        "condition": _condition(config, metadata),
        "sees": frames,
        "frame latents": " x ".join(map(str, metadata.latent_shape)) + " (channels, height, width)",
        "frames per second": "of several videos"
        if metadata.fps is None
        else f"{metadata.fps / metadata.frame_stride:g}",
        "autoencoder": f"`{metadata.autoencoder.name}`, SHA-256 {metadata.autoencoder.weight_hash[:12]}",
    }
    yield "| | |\n|---|---|\n" + "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())


def _condition(config: FARConfig, metadata: ModelMetadata) -> str:
    if config.actions:
        return f"one of {config.actions} actions for every frame"
    if not config.labels:
        return "none"
    names = metadata.classes or ()
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"one of {config.labels} labels for a clip" + (f": {listed}" if names else "")


def _training(folder: Path, metadata: ModelMetadata, facts: CardFacts) -> Iterator[str]:
    recipe = None if facts.run is None else load_recipe(facts.run / "recipe.yaml")
    sentences = [facts.trained_on] if facts.trained_on else []
    if recipe is not None:
        sentences += _data_facts(recipe.data.shards)
    if sentences:
        yield " ".join(sentences)
    training = metadata.training
    stride = "" if metadata.frame_stride == 1 else f", frame stride {metadata.frame_stride}"
    if not isinstance(training, TrainingMetadata):
        yield f"Imported from `{training.imported_from}` (SHA-256 {training.sha256[:12]}){stride}."
    else:
        kind = "the EMA of the weights" if training.weights == "ema" else "the weights"
        yield (
            f"{kind[0].upper()}{kind[1:]} after {training.step:,} steps{stride}, recipe {training.recipe_hash[:12]}, "
            f"far_scale {training.far_scale}."
        )
    if recipe is not None:
        if not isinstance(training, TrainingMetadata) or recipe.hash() != training.recipe_hash:
            raise UserError(
                f"{facts.run}: {folder} was trained by another recipe; name its own run, or leave --run out"
            )
        values = recipe.model_dump(mode="json")
        chosen: dict[str, Any] = {
            section: {key: value for key, value in values[section].items() if keys is None or key in keys}
            for section, keys in _HYPER_PARAMETERS.items()
        }
        if values["curriculum"]:
            chosen["curriculum"] = [
                {key: stage[key] for key in _STAGE_KEYS if stage[key] is not None} for stage in values["curriculum"]
            ]
        yield f"```yaml\n{yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None)}```"


def _data_facts(shards: Shards) -> Iterator[str]:
    """The sizes of the shard sets that can be read here."""
    for location in shard_urls(shards):
        if not is_remote(location) and (Path(location) / MANIFEST_NAME).is_file():
            manifest = Manifest.read(location)
            yield f"A shard set of {manifest.samples:,} videos with {manifest.frames:,} frames."


def _scores(folder: Path, metadata: ModelMetadata, out: Path) -> Iterator[str]:
    scores = read_scores(out)
    if scores.weights.sha256 != describe_weights(folder, folder, metadata)["sha256"]:
        raise UserError(
            f"{out}: these are scores of other weights than those in {folder}; evaluate it, or leave them out"
        )
    yield f"**{scores.protocol}** (hash {scores.protocol_hash[:12]}, {scores.n} clips): {scores.settings.about}"
    yield scores_table(score_rows(scores), scores.settings.metrics).markdown().rstrip("\n")
    yield "\n".join([LEGEND, "", *(f"- {line}" for line in describe_settings(scores))])
    yield " ".join(comparison_notes([scores]))


def _sampling(name: str, config: FARConfig, metadata: ModelMetadata) -> Iterator[str]:
    extra = "'.[hub]'" if is_repository(name) else "."
    autoencoder = metadata.autoencoder.name
    if (SHIPPED_WEIGHTS / f"{autoencoder}.safetensors").is_file():
        needs = f"The autoencoder `{autoencoder}` ships with it."
    else:
        needs = f"The autoencoder `{autoencoder}` is found by its name in the folder `autoencoders`."
    videos = "a video, a folder of videos, or a shard set"
    if config.actions:
        videos = "a folder of episodes with actions (.npz), or a shard set"
    elif config.labels:
        videos = "a shard set with labels"
    yield (
        f"Install far_scale from its source (`pip install {extra}`). {needs} CONTEXT is {videos}, with more than "
        f"{_PREDICTED} frames each. It is computed in bfloat16 on a GPU, and in float32 without one."
    )
    yield f"```bash\nfar-scale sample {name} --context CONTEXT --frames {_PREDICTED} --out samples.mp4\n```"
    yield f'```python\nfrom far_scale.model import FAR\n\nmodel = FAR.from_pretrained("{name}")\n```'


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
