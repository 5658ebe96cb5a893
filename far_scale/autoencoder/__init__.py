"""Autoencoders: frames in pixels to frame latents and back. `load` gives a trained one by name or path."""

from far_scale.autoencoder.loading import SHIPPED_WEIGHTS, build_network, load
from far_scale.autoencoder.network import Autoencoder, AutoencoderNetwork

__all__ = ["SHIPPED_WEIGHTS", "Autoencoder", "AutoencoderNetwork", "build_network", "load"]
