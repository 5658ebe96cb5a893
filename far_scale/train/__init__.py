"""Training: `python -m far_scale.train RECIPE [key=value ...]`."""
