"""Which attention kernels a benchmark runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from far_scale.model.attention import choice, dense
from far_scale.model.layers import HEAD_DIM
from far_scale.utils.errors import UserError

ALL = "all"
KERNELS = tuple(name for name in choice.KERNELS if name != dense.NAME)


def usable(requested: Sequence[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The requested kernels, or all usable ones, best first.

    Raises:
        UserError: an unknown or unusable kernel, or none is usable.
    """
    reasons = {name: choice.why_not(name, device, dtype, HEAD_DIM) for name in KERNELS}
    for name in requested or ():
        if name not in KERNELS:
            raise UserError(f"--kernels {name}: there are {', '.join(KERNELS)}")
        if reasons[name] is not None:
            raise UserError(f"--kernels {name}: {reasons[name]}")
    kernels = list(requested or (name for name in KERNELS if reasons[name] is None))
    if not kernels:
        raise UserError(f"no attention kernel takes {dtype} on {device.type}: python -m far_scale.model.attention")
    return kernels
