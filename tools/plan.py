#!/usr/bin/env python
"""Plan a training on a cluster: the command `far-scale plan`."""

from far_scale.cli.plan import main

if __name__ == "__main__":
    main()
