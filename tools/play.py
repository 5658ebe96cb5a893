#!/usr/bin/env python
"""Walk through a learned world in the browser: the command `far-scale play`."""

from far_scale.cli.play import main

if __name__ == "__main__":
    main()
