"""Frame-block causal attention, `frame_attention`, and the kernels it runs on.

A *kernel* is a module with two functions, `forward` and `backward`, over token sequences that lie end to end
(`Spans`); `causal_pair` makes frame-block causality of any of them, and `dense` is the oracle they are tested against.
"""

from far_scale.model.attention.earlier import Earlier
from far_scale.model.attention.frame_attention import frame_attention

__all__ = ["Earlier", "frame_attention"]
