#!/usr/bin/env python
"""Start a new run from a checkpoint of another: the command `far-scale fork-run`."""

from far_scale.cli.fork_run import main

if __name__ == "__main__":
    main()
