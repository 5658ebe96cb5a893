"""Samples new frames from a model and the frames given to it."""
