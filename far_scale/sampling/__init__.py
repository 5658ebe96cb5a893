"""From context frames and a model directory to new frames, and how good they are."""
