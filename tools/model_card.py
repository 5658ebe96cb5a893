#!/usr/bin/env python
"""Write a model directory's card: the command `far-scale model-card`."""

from far_scale.cli.model_card import main

if __name__ == "__main__":
    main()
