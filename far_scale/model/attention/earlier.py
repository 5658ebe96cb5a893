"""What queries see beside their own group."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from far_scale.model.layout import Prefix


class Earlier(NamedTuple):
    """Keys and values that come before a group: its clips' contexts, or what a cache holds.

    Attributes:
        k, v: `[S, N, D]`, of one clip after another; S may be 0.
        prefix: which queries see which of them; None where S is 0.
    """

    k: Tensor
    v: Tensor
    prefix: Prefix | None
