"""The recipe of an autoencoder's training: its sections, and how one is read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, ValidationError

from far_scale.config.reference import explain
from far_scale.config.schema import Count, Fraction, Section
from far_scale.config.yaml_loader import Document, read_document
from far_scale.utils.errors import UserError

_SMALLEST_JUDGED = 24  # pixels a side: of smaller pictures the patch discriminator has nothing left to say

Seed = Annotated[int, Field(ge=0, le=2**64)]
Seeds = Annotated[tuple[Seed, Seed], Field(strict=False)]
Weight = Annotated[float, Field(ge=0)]


class CompactModel(Section):
    """The sizes of the compact autoencoder, see `CompactConfig`."""

    kind: Literal["compact"] = "compact"
    """Which autoencoder: this one, or dc_ae."""
    channels: Count = 32
    """Latent channels."""
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Features at a quarter of the resolution."""
    encoder_depth: Count = 1
    """Residual blocks at each of the encoder's two resolutions."""
    decoder_depth: Count = 2
    """Residual blocks at each of the decoder's two resolutions."""


class DCAEModel(Section):
    """FAR's own autoencoder: a preset, or any other configuration of the same class."""

    kind: Literal["dc_ae"]
    """Which autoencoder: this one, or compact."""
    preset: Literal["f8c32", "f16c32", "f32c32"] | None = None
    """FAR's configuration for 64, 128 or 256 pixels."""
    config: str | None = None
    """In place of a preset: the config.json of an `AutoencoderDC` of diffusers; its weights are not taken."""


class EpisodeData(Section):
    """Episodes of the demo world that are recorded, from the first seed to before the second one."""

    frames: Count
    """Frames of an episode."""
    train_seeds: Seeds
    """Seeds of the episodes to train on."""
    heldout_seeds: Seeds
    """Seeds of the episodes that the PSNR is measured on."""


class VideoData(Section):
    """Videos, and what is cut out of them: `train.batch` / `clip_frames` videos a step, each once an epoch."""

    videos: str
    """A folder of videos, one video, or a list of them (.csv, .jsonl); a relative path starts at the working folder."""
    split: str | None = None
    """One of UCF-101's lists, such as trainlist01.txt: take only these videos of the folder."""
    heldout_videos: str | None = None
    """The same as data.videos, of the videos that the PSNR is measured on; without them none is measured."""
    heldout_split: str | None = None
    """The same as data.split, of data.heldout_videos."""
    size: Count
    """Height and width of the frames, a multiple of the autoencoder's pixels a latent position: the shorter side is
    scaled to it."""
    crop: Literal["random", "center"] = "random"
    """Where the square is cut out of the scaled frames; those for the PSNR are always cut out of the centre."""
    flip: bool = False
    """Whether half of the clips are mirrored."""
    clip_frames: Count = 4
    """Frames that are taken of a video at a time."""
    frame_stride: Count = 2
    """Take every n-th frame; all of them, where a video is too short for it."""


class LossSection(Section):
    """What each loss counts. Not set: what the compact autoencoder is trained with."""

    squared: Weight = 1.0
    """Of the mean squared error of pixels in [-1, 1]."""
    absolute: Weight = 0.05
    """Of their mean absolute error, which keeps edges crisp."""
    perceptual: Weight = 0.0
    """Of the LPIPS distance; it takes train.perceptual_weights, without which it is left out."""
    discriminator: Weight = 0.0
    """Of the patch discriminator's judgement, times the ratio of the gradients of the losses above to its own."""


class TrainSection(Section):
    """The optimisation: AdamW without decay."""

    steps: Count
    """Optimizer steps."""
    batch: Count
    """Frames of a step, over all ranks, which must divide them."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate, of the discriminator too."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.99)
    """AdamW's, of the discriminator too."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate after the warm-up: a cosine down to a hundredth, or as it is."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    ema_decay: Fraction = 0.0
    """Of the running average of the weights, which is what is exported; 0 for the weights themselves."""
    loss: LossSection = LossSection()
    discriminator_start: Annotated[int, Field(ge=0)] = 0
    """Steps before the discriminator joins; from then on the encoder is left as it is."""
    perceptual_weights: str | None = None
    """Path of a file of VGG16's and LPIPS's weights, or of a folder of both files; see
    far_scale/autoencoder/training/perceptual.py for which these are."""
    latent_noise: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the latents in training, in units of each channel's deviation; the decoder learns to bear it."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of autoencoder and discriminator in training (autocast); weights are float32."""
    checkpoint_every: Count = 500
    """Steps between checkpoints, of which the last two are kept."""
    log_every: Count = 20
    """Steps between lines of the log."""


ModelT = TypeVar("ModelT", CompactModel, DCAEModel)
DataT = TypeVar("DataT", EpisodeData, VideoData)


class AutoencoderRecipe(Section, Generic[ModelT, DataT]):
    """All that the training of an autoencoder is told."""

    name: str
    """What recipes and manifests will call the autoencoder."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of weights, batches and noise."""
    model: ModelT
    data: DataT
    train: TrainSection


_KINDS: dict[tuple[bool, bool], type[AutoencoderRecipe[Any, Any]]] = {  # by whether DC-AE, and whether videos
    (False, False): AutoencoderRecipe[CompactModel, EpisodeData],
    (False, True): AutoencoderRecipe[CompactModel, VideoData],
    (True, False): AutoencoderRecipe[DCAEModel, EpisodeData],
    (True, True): AutoencoderRecipe[DCAEModel, VideoData],
}


def load_autoencoder_recipe(path: str | Path, overrides: list[str] | None = None) -> AutoencoderRecipe[Any, Any]:
    """Read an autoencoder's recipe: `model.kind` says which keys model has, and `data.videos` which ones data has.

    Raises:
        UserError: not there, unknown keys, wrong types, or values that do not go together.
    """
    document = read_document(path, overrides or [])
    model = document.values.setdefault("model", {})
    dc_ae = isinstance(model, dict) and model.get("kind", "compact") != "compact"
    data = document.values.get("data")
    videos = isinstance(data, dict) and "videos" in data
    kind = _KINDS[dc_ae, videos]
    try:
        recipe = kind.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, document, kind) from None
    _check(recipe, document)
    return recipe


def _check(recipe: AutoencoderRecipe[Any, Any], document: Document) -> None:
    """Raise UserError where values do not go together."""

    def refuse(key: str, problem: str) -> UserError:
        return UserError(f"{document.location(tuple(key.split('.')))}: {key}: {problem}")

    model, data, train = recipe.model, recipe.data, recipe.train
    if isinstance(model, DCAEModel) and (model.preset is None) == (model.config is None):
        raise refuse("model.preset", "set either this, to f8c32, f16c32 or f32c32, or model.config")
    if isinstance(data, EpisodeData):
        seeds = {key: range(*getattr(data, key)) for key in ("train_seeds", "heldout_seeds")}
        for key, own in seeds.items():
            if not own or own[0] < 0:
                raise refuse(f"data.{key}", f"no seeds from {own.start} to before {own.stop}; write [first, end]")
        if set(seeds["train_seeds"]) & set(seeds["heldout_seeds"]):
            raise refuse("data.heldout_seeds", "some are in data.train_seeds too; held-out episodes must be others")
    else:
        if train.batch % data.clip_frames:
            raise refuse(
                "train.batch",
                f"{train.batch} frames are no whole number of clips of data.clip_frames {data.clip_frames}",
            )
        if train.loss.discriminator > 0 and data.size < _SMALLEST_JUDGED:
            raise refuse(
                "data.size", f"{data.size} is too small for the discriminator, which takes {_SMALLEST_JUDGED} and more"
            )
    if train.loss.squared == 0 and train.loss.absolute == 0:
        raise refuse("train.loss", "squared and absolute are both 0; the pixels themselves must count, so set one")
