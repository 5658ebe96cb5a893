#!/usr/bin/env python
"""Export a training run's checkpoint: the command `far-scale export-checkpoint`."""

from far_scale.cli.export_checkpoint import main

if __name__ == "__main__":
    main()
