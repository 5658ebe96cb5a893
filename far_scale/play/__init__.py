"""A page in the browser on which one walks through a trained world, beside the real engine."""
