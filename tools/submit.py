#!/usr/bin/env python
"""Submit a training to SLURM: the command `far-scale submit`."""

from far_scale.cli.submit import main

if __name__ == "__main__":
    main()
