"""The sizes of FAR, from the official code (showlab/FAR, far/models/far_model.py: FAR_B, FAR_M, FAR_L and FAR_XL)."""

from __future__ import annotations

PRESETS: dict[str, tuple[int, int]] = {"B": (12, 12), "M": (12, 16), "L": (24, 16), "XL": (28, 18)}
"""A preset's (layers, heads). A head is always 64 wide, so the model's width is 64 x heads."""
