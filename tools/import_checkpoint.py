#!/usr/bin/env python
"""Import official weights: the command `far-scale import-checkpoint`."""

from far_scale.cli.import_checkpoint import main

if __name__ == "__main__":
    main()
