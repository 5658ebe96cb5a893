"""Autoencoders: frames in pixels to frame latents and back. `load` gives a trained one by name or path."""

from far_scale.autoencoder.loading import WEIGHTS, load, network_of
from far_scale.autoencoder.network import AutoencoderNetwork
from far_scale.autoencoder.trained import Autoencoder

__all__ = ["WEIGHTS", "Autoencoder", "AutoencoderNetwork", "load", "network_of"]
