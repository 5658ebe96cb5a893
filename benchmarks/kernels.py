"""Which attention kernels a benchmark runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from far_scale.model.attention import dense, selection
from far_scale.model.layers import HEAD_DIM
from far_scale.utils.errors import UserError

ALL = "all"
KERNELS = tuple(name for name in selection.KERNELS if name != dense.NAME)


def usable(asked: Sequence[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernels asked for, or all that are usable here, best first.

    Raises:
        UserError: there is no such kernel, it is not usable here, or none is.
    """
    reasons = {name: selection.unusable_reason(name, device, dtype, HEAD_DIM) for name in KERNELS}
    for name in asked or ():
        if name not in KERNELS:
            raise UserError(f"--kernels {name}: there are {', '.join(KERNELS)}")
        if reasons[name] is not None:
            raise UserError(f"--kernels {name}: {reasons[name]}")
    found = list(asked or (name for name in KERNELS if reasons[name] is None))
    if not found:
        raise UserError(f"no attention kernel takes {dtype} on {device.type}: python -m far_scale.model.attention")
    return found
