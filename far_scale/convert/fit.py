"""Whether tensors are those of a model: said by naming the ones that are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from far_scale.model import FAR, FARConfig
from far_scale.utils.errors import UserError

SHOWN = 3  # tensors named of each kind; of the others it is said how many they are


def empty_model(config: FARConfig) -> FAR:
    """The model without memory for its weights, for its tensors' names and shapes, or to be assigned later."""
    with torch.device("meta"):
        return FAR(config)


def check_fit(where: str, expected: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], mend: str) -> None:
    """Check that `state` holds the tensors of `expected`, by name and shape, and no others.

    Args:
        where: what holds them, for the error.
        mend: how to mend it, for the error.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    kinds = {
        "misses": [name for name in expected if name not in state],
        "has unexpected": [name for name in state if name not in expected],
        "has in another shape": [
            f"{name} ({list(state[name].shape)} in place of {list(shape)})"
            for name, shape in expected.items()
            if name in state and list(state[name].shape) != list(shape)
        ],
    }
    problems = [
        f"{kind} tensors: {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if names[SHOWN:] else "")
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise UserError(f"{where} {'; '.join(problems)}; {mend}")
