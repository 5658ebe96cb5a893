"""Training of autoencoders of either kind: recipe, frames, losses, checkpoints and what is exported."""

from far_scale.train.autoencoder.export import psnr
from far_scale.train.autoencoder.frames import read_frames, to_pixels
from far_scale.train.autoencoder.recipe import AutoencoderRecipe, load_autoencoder_recipe
from far_scale.train.autoencoder.training import Places, train_autoencoder

__all__ = [
    "AutoencoderRecipe",
    "Places",
    "load_autoencoder_recipe",
    "psnr",
    "read_frames",
    "to_pixels",
    "train_autoencoder",
]
