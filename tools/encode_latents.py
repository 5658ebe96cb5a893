#!/usr/bin/env python
"""Encode videos to a latent shard set: the command `far-scale encode-latents`."""

from far_scale.cli.encode_latents import main

if __name__ == "__main__":
    main()
