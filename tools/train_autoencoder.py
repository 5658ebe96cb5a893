#!/usr/bin/env python
"""Train an autoencoder: the command `far-scale train-autoencoder`."""

from far_scale.cli.train_autoencoder import main

if __name__ == "__main__":
    main()
