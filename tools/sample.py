#!/usr/bin/env python
"""Predict how videos continue: the command `far-scale sample`."""

from far_scale.cli.sample import main

if __name__ == "__main__":
    main()
