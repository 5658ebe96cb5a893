#!/usr/bin/env python
"""Record episodes of the demo world: the command `far-scale record-demo`."""

from far_scale.cli.record_demo import main

if __name__ == "__main__":
    main()
