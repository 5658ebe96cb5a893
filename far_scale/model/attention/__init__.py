"""Frame-block causal attention, `frame_attention`, and the kernels it runs on.

A *kernel* is a module with two functions, `forward` and `backward`, over concatenated token sequences
(`Spans`). `causal_pair` builds frame-block causality from any of them, `operators` defines torch operators for that,
`sharded_operators` those for packs that several ranks share, `selection` chooses the kernel, and `dense` is the
reference that all are tested against. `prepare` makes all that they keep of a pack's layout on a device, ahead of the
first call.

    python -m far_scale.model.attention     kernels that are installed and usable here, their errors and times
"""

from far_scale.model.attention.operators import PrefixKV, attend, frame_attention
from far_scale.model.attention.selection import choose_kernel
from far_scale.model.attention.sharded_operators import attend_sharded, prepare

__all__ = ["PrefixKV", "attend", "attend_sharded", "choose_kernel", "frame_attention", "prepare"]
