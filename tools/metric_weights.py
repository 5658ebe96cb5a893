#!/usr/bin/env python
"""Get the networks of FVD and LPIPS: the command `far-scale metric-weights`."""

from far_scale.cli.metric_weights import main

if __name__ == "__main__":
    main()
