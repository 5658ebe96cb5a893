"""The sizes of FAR.

B, M, L and XL are those of the official code (showlab/FAR, far/models/far_model.py and far_long_model.py; the latter
has only B and M). 1.3B, 3B and 7B are ours, for clusters, without published results. Parameters in millions, without a
condition, at 32 channels and patch 1; with a context, in context patches of 4:

                    B    M    L   XL   1.3B     3B     7B
    window only   130  230  457  674  1,367  3,034  7,166
    with context  158  280  557  822  1,668  3,703  8,744

With a context the official model has less than 1.6 million more, which its computation never reads.
"""

from __future__ import annotations

from far_scale.model.far import FARConfig

PRESETS: dict[str, tuple[int, int]] = {
    "B": (12, 12),
    "M": (12, 16),
    "L": (24, 16),
    "XL": (28, 18),
    "1.3B": (32, 24),
    "3B": (40, 32),
    "7B": (42, 48),
}
"""(layers, heads) of each preset. A head has 64 dimensions, so the model's width is 64 x heads."""


def describe(config: FARConfig) -> str:
    """A model's shape in one line, for users."""
    sizes = {size: name for name, size in PRESETS.items()}
    name = sizes.get((config.layers, config.heads))
    context = f", context patches of {config.context_patch}" if config.context_patch else ""
    condition = (config.actions and f"{config.actions} actions") or (config.labels and f"{config.labels} labels")
    return (
        f"FAR{f'-{name}' if name else ''}{'-Long' if config.context_patch else ''}, {config.layers} layers of "
        f"{config.heads} heads, {config.channels} channels, patch {config.patch}, window {config.window}{context}, "
        f"{condition or 'no condition'}"
    )
