"""Between checkpoints and model directories."""
