"""Training of autoencoders of either kind: recipe, frames, losses, checkpoints and export."""

from far_scale.autoencoder.training.export import psnr
from far_scale.autoencoder.training.frames import read_frames, to_pixels
from far_scale.autoencoder.training.loop import TrainingPaths, train_autoencoder
from far_scale.autoencoder.training.recipe import AutoencoderRecipe, load_autoencoder_recipe

__all__ = [
    "AutoencoderRecipe",
    "TrainingPaths",
    "load_autoencoder_recipe",
    "psnr",
    "read_frames",
    "to_pixels",
    "train_autoencoder",
]
