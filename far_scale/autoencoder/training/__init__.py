"""Training of autoencoders of either kind: recipe, frames, losses, checkpoints and what is exported."""

from far_scale.autoencoder.training.export import psnr
from far_scale.autoencoder.training.frames import read_frames, to_pixels
from far_scale.autoencoder.training.recipe import AutoencoderRecipe, load_autoencoder_recipe
from far_scale.autoencoder.training.training import Places, train_autoencoder

__all__ = [
    "AutoencoderRecipe",
    "Places",
    "load_autoencoder_recipe",
    "psnr",
    "read_frames",
    "to_pixels",
    "train_autoencoder",
]
