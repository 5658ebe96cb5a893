"""The recipe of an autoencoder training: sections, reading and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, ValidationError

from far_scale.config.reference import explain
from far_scale.config.schema import Count, Fraction, Section
from far_scale.config.yaml_loader import Document, read_document
from far_scale.utils.errors import UserError

_MIN_DISCRIMINATOR_SIZE = 24  # pixels; on smaller frames the patch discriminator has no output

Seed = Annotated[int, Field(ge=0, le=2**64)]
Seeds = Annotated[tuple[Seed, Seed], Field(strict=False)]
Weight = Annotated[float, Field(ge=0)]


class CompactModel(Section):
    """Sizes of the compact autoencoder, see `CompactConfig`."""

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
    """FAR's autoencoder: a preset, or any other configuration of the same class."""

    kind: Literal["dc_ae"]
    """Which autoencoder: this one, or compact."""
    preset: Literal["f8c32", "f16c32", "f32c32"] | None = None
    """FAR's configuration for 64, 128 or 256 pixels."""
    config: str | None = None
    """Instead of a preset: the config.json of a diffusers `AutoencoderDC`; its weights are not used."""


class EpisodeData(Section):
    """Recorded episodes of the demo world; seeds are [first, end), the end excluded."""

    frames: Count
    """Frames of an episode."""
    train_seeds: Seeds
    """Seeds of the episodes to train on."""
    heldout_seeds: Seeds
    """Seeds of the episodes for the PSNR."""


class VideoData(Section):
    """Videos and the clips taken from them: `train.batch` / `clip_frames` videos per step, each once per epoch."""

    videos: str
    """A folder of videos, one video, or a list of them (.csv, .jsonl); a relative path starts at the working folder."""
    split: str | None = None
    """One of UCF-101's lists, such as trainlist01.txt: take only these videos of the folder."""
    heldout_videos: str | None = None
    """As data.videos, for the PSNR; without it none is measured."""
    heldout_split: str | None = None
    """As data.split, for data.heldout_videos."""
    size: Count
    """Height and width of the frames, a multiple of the autoencoder's pixels per latent position; the shorter side is
    resized to it."""
    crop: Literal["random", "center"] = "random"
    """How the resized frames are cropped to a square; those for the PSNR always at the centre."""
    flip: bool = False
    """Whether half of the clips are mirrored."""
    clip_frames: Count = 4
    """Frames of a clip."""
    frame_stride: Count = 2
    """Take every n-th frame; adjacent frames where a video is too short."""


class LossSection(Section):
    """Weights of the losses; the defaults are those of the compact autoencoder."""

    squared: Weight = 1.0
    """Of the mean squared error of pixels in [-1, 1]."""
    absolute: Weight = 0.05
    """Of their mean absolute error, which keeps edges sharp."""
    perceptual: Weight = 0.0
    """Of the LPIPS distance; off without train.perceptual_weights."""
    discriminator: Weight = 0.0
    """Of the adversarial loss, times the ratio of the gradient norms of the losses above and of it."""


class TrainSection(Section):
    """The optimization: AdamW without weight decay."""

    steps: Count
    """Optimizer steps."""
    batch: Count
    """Frames of a step over all ranks; the number of ranks must divide it."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate, of the discriminator too."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.99)
    """AdamW's, of the discriminator too."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine decay to 1% of the peak, or constant."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    ema_decay: Fraction = 0.0
    """Of the EMA of the weights, which is exported; 0 exports the weights themselves."""
    loss: LossSection = LossSection()
    discriminator_start: Annotated[int, Field(ge=0)] = 0
    """Steps before the discriminator starts; from then on the encoder is frozen."""
    perceptual_weights: str | None = None
    """Path of a file with the weights of VGG16 and LPIPS, or of a folder with both files; see
    far_scale/autoencoder/lpips_network.py for which these are."""
    latent_noise: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the latents in training, in units of each channel's std; makes the decoder robust."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of autoencoder and discriminator in training (autocast); weights are float32."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; the last two are kept."""
    log_every: Count = 20
    """Steps between lines of the log."""


ModelT = TypeVar("ModelT", CompactModel, DCAEModel)
DataT = TypeVar("DataT", EpisodeData, VideoData)


class AutoencoderRecipe(Section, Generic[ModelT, DataT]):
    """The recipe of an autoencoder training."""

    name: str
    """The autoencoder's name in recipes and manifests."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of weights, batches and noise."""
    model: ModelT
    data: DataT
    train: TrainSection


_RECIPE_TYPES: dict[tuple[bool, bool], type[AutoencoderRecipe[Any, Any]]] = {  # by (is DC-AE, has videos)
    (False, False): AutoencoderRecipe[CompactModel, EpisodeData],
    (False, True): AutoencoderRecipe[CompactModel, VideoData],
    (True, False): AutoencoderRecipe[DCAEModel, EpisodeData],
    (True, True): AutoencoderRecipe[DCAEModel, VideoData],
}


def load_autoencoder_recipe(path: str | Path, overrides: list[str] | None = None) -> AutoencoderRecipe[Any, Any]:
    """Read an autoencoder's recipe; `model.kind` and `data.videos` select the keys of model and data.

    Raises:
        UserError: no such recipe, unknown keys, wrong types, or values that contradict each other.
    """
    document = read_document(path, overrides or [])
    model = document.values.setdefault("model", {})
    is_dc_ae = isinstance(model, dict) and model.get("kind", "compact") != "compact"
    data = document.values.get("data")
    has_videos = isinstance(data, dict) and "videos" in data
    recipe_type = _RECIPE_TYPES[is_dc_ae, has_videos]
    try:
        recipe = recipe_type.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, document, recipe_type) from None
    _check(recipe, document)
    return recipe


def _check(recipe: AutoencoderRecipe[Any, Any], document: Document) -> None:
    """Raise UserError where values contradict each other."""

    def refuse(key: str, problem: str) -> UserError:
        return UserError(f"{document.location(tuple(key.split('.')))}: {key}: {problem}")

    model, data, train = recipe.model, recipe.data, recipe.train
    if isinstance(model, DCAEModel) and (model.preset is None) == (model.config is None):
        raise refuse("model.preset", "set either this, to f8c32, f16c32 or f32c32, or model.config")
    if isinstance(data, EpisodeData):
        seeds = {key: range(*getattr(data, key)) for key in ("train_seeds", "heldout_seeds")}
        for key, span in seeds.items():
            if not span or span[0] < 0:
                raise refuse(f"data.{key}", f"no seeds from {span.start} to before {span.stop}; write [first, end]")
        if set(seeds["train_seeds"]) & set(seeds["heldout_seeds"]):
            raise refuse("data.heldout_seeds", "some are in data.train_seeds, too; held-out episodes must be others")
    else:
        if train.batch % data.clip_frames:
            raise refuse(
                "train.batch",
                f"{train.batch} frames are not a whole number of clips of data.clip_frames {data.clip_frames}",
            )
        if train.loss.discriminator > 0 and data.size < _MIN_DISCRIMINATOR_SIZE:
            raise refuse(
                "data.size",
                f"{data.size} is too small; the discriminator needs at least {_MIN_DISCRIMINATOR_SIZE}",
            )
    if train.loss.squared == 0 and train.loss.absolute == 0:
        raise refuse("train.loss", "squared and absolute are both 0; set one, as a loss of the pixels is needed")
