"""frame_attention against the dense oracle: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch

from far_scale.layout import FrameLayout, Spans
from far_scale.model.attention import cpu, frame_attention, torch_varlen
from far_scale.model.attention.causal_pair import CausalPair
from far_scale.model.attention.dense import dense_attention

GRIDS = {1: (1, 1), 2: (1, 2), 7: (7, 1), 64: (8, 8)}
CLIPS = [(1,), (5,), (3, 3), (1, 4, 2), (40,), (40, 1, 7)]
HEADS, HEAD_DIM = 2, 64


def tensors(layout: FrameLayout, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """q, k, v and the output's gradient, each `[T, N, D]`."""
    generator = torch.Generator().manual_seed(layout.tokens)
    drawn = [torch.randn(layout.tokens, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [x.to(device, dtype).requires_grad_(index < 3) for index, x in enumerate(drawn)]


def run(attention, layout: FrameLayout, q, k, v, dout) -> list[torch.Tensor]:
    """The output and the gradients of q, k, v."""
    out = attention(q, k, v, layout)
    return [out, *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("tokens", GRIDS)
@pytest.mark.parametrize("clip_frames", CLIPS)
def test_causal_pair_equals_the_oracle_in_float64(tokens: int, clip_frames: tuple[int, ...]) -> None:
    if tokens == 64 and sum(clip_frames) > 8:
        clip_frames = tuple(min(count, 12) for count in clip_frames)  # the oracle's mask grows with the square
    layout = FrameLayout.window(clip_frames, GRIDS[tokens])
    inputs = tensors(layout, torch.float64)
    for ours, oracle in zip(run(frame_attention, layout, *inputs), run(dense_attention, layout, *inputs), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=2e-14)


def test_forty_frames_of_64_tokens_in_float32() -> None:
    layout = FrameLayout.window((40,), (8, 8))
    inputs = tensors(layout, torch.float32)
    for ours, oracle in zip(run(frame_attention, layout, *inputs), run(dense_attention, layout, *inputs), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=2e-5)


def test_frames_of_different_sizes_in_one_clip() -> None:
    """What long clips will need: coarse frames before fine ones, single-token frames among them."""
    frame_tokens = (1, 4, 4, 16, 2, 2, 9)
    layout = FrameLayout((4, 3), frame_tokens, torch.zeros(sum(frame_tokens), 3, dtype=torch.int64))
    inputs = tensors(layout, torch.float64)
    for ours, oracle in zip(run(frame_attention, layout, *inputs), run(dense_attention, layout, *inputs), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=2e-14)


def test_strided_views_are_taken_as_they_are() -> None:
    """q, k, v come as thirds of one fused projection, not contiguous."""
    layout = FrameLayout.window((3, 2), (2, 4))
    fused = torch.randn(layout.tokens, 3, HEADS, HEAD_DIM, dtype=torch.float64)
    q, k, v = fused.unbind(1)
    torch.testing.assert_close(frame_attention(q, k, v, layout), dense_attention(q, k, v, layout), rtol=0, atol=1e-14)


def test_bfloat16_errs_no_more_than_twice_the_plain_kernel() -> None:
    """The merge of two calls may not lose precision beyond the kernel's own."""
    layout = FrameLayout.window((6,), (8, 8))
    exact_inputs = tensors(layout, torch.float64)
    inputs = tensors(layout, torch.bfloat16)
    plain_spans = Spans((layout.tokens,))
    plain, _ = cpu.forward(*inputs[:3], plain_spans, causal=False)
    plain_exact, _ = cpu.forward(*exact_inputs[:3], plain_spans, causal=False)
    allowed = 2 * (plain.double() - plain_exact).abs().max()
    error = (frame_attention(*inputs[:3], layout).double() - dense_attention(*exact_inputs[:3], layout)).abs()
    # Early frames average over fewer keys, so their values (and roundings) are larger: compare where all keys are seen.
    assert error[-64:].max() <= allowed


def test_attended_pairs_count_the_mask() -> None:
    for clip_frames in CLIPS:
        layout = FrameLayout.window(clip_frames, (1, 3))
        assert layout.attended_pairs == int(layout.mask(torch.device("cpu")).sum())


def test_the_same_layout_is_made_once() -> None:
    assert FrameLayout.window([3, 2], (2, 2)) is FrameLayout.window((3, 2), (2, 2))


def test_wrong_shapes_are_named() -> None:
    layout = FrameLayout.window((2,), (2, 2))
    x = torch.zeros(7, 1, 64)
    with pytest.raises(ValueError, match=r"T = 8 tokens, got \[7, 1, 64\]"):
        frame_attention(x, x, x, layout)
    with pytest.raises(ValueError, match="at least one frame"):
        FrameLayout.window((2, 0), (2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", GRIDS)
@pytest.mark.parametrize("clip_frames", CLIPS)
def test_varlen_flash_on_a_gpu(dtype: torch.dtype, tokens: int, clip_frames: tuple[int, ...]) -> None:
    """PyTorch's varlen flash operators, forward and backward, against the oracle in float64."""
    layout = FrameLayout.window(clip_frames, GRIDS[tokens])
    inputs = tensors(layout, dtype, "cuda")
    exact_inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    assert frame_attention(*inputs[:3], layout).grad_fn.name().startswith("CausalPair")
    rounding = torch.finfo(dtype).eps
    for ours, exact in zip(
        run(lambda q, k, v, at: CausalPair.apply(q, k, v, at, torch_varlen), layout, *inputs),
        run(dense_attention, layout, *exact_inputs),
        strict=True,
    ):
        assert (ours.double() - exact).abs().max() <= 4 * rounding * exact.abs().max()
