"""The sum of the packs' gradients is right in each dtype of the reduction, and gradients are read once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from far_scale.train.pack_gradients import PackGradients

SHAPES = ((3, 4), (5,), (2, 2))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packs", [1, 2, 3])
def test_the_sum_is_that_of_float32_rounded_once(packs: int, dtype: torch.dtype) -> None:
    """In the second step as in the first; a parameter without a gradient counts as 0, and so does padding."""
    weights, numbers = parameters(), torch.Generator().manual_seed(packs)
    sums = PackGradients(weights, 24, dtype, packs)
    for absent in ([], [0, 1], [1]):
        expected = torch.zeros(24)
        for pack in range(packs):
            given = [torch.randn(shape, generator=numbers).bfloat16() for shape in SHAPES]
            for index, (weight, gradient) in enumerate(zip(weights, given, strict=True)):
                if index in absent and pack != 1:  # in some packs only, or in none
                    gradient.zero_()
                else:
                    weight.grad = gradient
            expected[:21] += torch.cat([gradient.flatten().float() for gradient in given])
            sums.add()
            assert all(weight.grad is None for weight in weights), "their memory is free for the next pack"
        assert sums.flat.dtype == dtype and torch.equal(sums.flat, expected.to(dtype))
        sums.clear()


def test_small_addends_are_not_lost() -> None:
    """256 packs of 1 and two of 1/2: a sum in bf16 stops at 256, since 257 is no bf16."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    sums = PackGradients([weight], 1, torch.bfloat16, packs=260)
    for gradient in [1.0] * 256 + [0.5] * 4:
        weight.grad = torch.tensor([gradient], dtype=torch.bfloat16)
        sums.add()
    assert sums.flat.item() == 258


def test_one_pack_takes_no_float32_buffer() -> None:
    assert PackGradients(parameters(), 24, torch.bfloat16, packs=1).sums is None
    in_float32 = PackGradients(parameters(), 24, torch.float32, packs=2)
    assert in_float32.sums is in_float32.flat
