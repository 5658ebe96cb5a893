"""far_scale: training of frame-autoregressive video models (FAR), from one laptop to a SLURM cluster."""

__version__ = "0.1.0"
