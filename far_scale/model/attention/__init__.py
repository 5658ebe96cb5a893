"""Frame-block causal attention, `frame_attention`, and the kernels it runs on.

A *kernel* is a module with two functions, `forward` and `backward`, over token sequences that lie end to end
(`Spans`); `causal_pair` makes frame-block causality of any of them, `operators` makes torch operators of that, `choice`
says which kernel is used where, and `dense` is the oracle that all are tested against.

    python -m far_scale.model.attention     what is installed, usable, right and how fast here
"""

from far_scale.model.attention.operators import PrefixKV, attend, frame_attention
from far_scale.model.attention.selection import choose_kernel

__all__ = ["PrefixKV", "attend", "choose_kernel", "frame_attention"]
