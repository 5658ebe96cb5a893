"""frame_attention against the dense reference: outputs and all gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from far_scale.model.attention import PrefixKV, cpu, frame_attention
from far_scale.model.layout import FrameGroup, FrameLayout, Spans

dense_attention = partial(frame_attention, kernel="dense")

GRIDS = {1: (1, 1), 2: (1, 2), 7: (7, 1), 64: (8, 8)}
CLIPS = [(1,), (5,), (3, 3), (1, 4, 2), (40,), (40, 1, 7)]
HEADS, HEAD_DIM = 2, 64


def tensors(group: FrameGroup, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """q, k, v and the output's gradient, each `[T, N, D]`."""
    generator = torch.Generator().manual_seed(group.tokens)
    drawn = [torch.randn(group.tokens, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [x.to(device, dtype).requires_grad_(index < 3) for index, x in enumerate(drawn)]


def run(attention, group: FrameGroup, q, k, v, dout) -> list[torch.Tensor]:
    """The output and the gradients of q, k, v."""
    out = attention(q, k, v, group)
    return [out, *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("tokens", GRIDS)
@pytest.mark.parametrize("clip_frames", CLIPS)
def test_causal_pair_equals_the_reference_in_float64(tokens: int, clip_frames: tuple[int, ...]) -> None:
    if tokens == 64 and sum(clip_frames) > 8:
        clip_frames = tuple(min(count, 12) for count in clip_frames)  # the reference's mask grows with the square
    group = FrameGroup.of(clip_frames, GRIDS[tokens])
    inputs = tensors(group, torch.float64)
    for ours, reference in zip(run(frame_attention, group, *inputs), run(dense_attention, group, *inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=2e-14)


@pytest.mark.slow
def test_forty_frames_of_64_tokens_in_float32() -> None:
    group = FrameGroup.of((40,), (8, 8))
    inputs = tensors(group, torch.float32)
    for ours, reference in zip(run(frame_attention, group, *inputs), run(dense_attention, group, *inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=2e-5)


def test_frames_of_different_sizes_in_one_clip() -> None:
    """What long clips will need: coarse frames before fine ones, single-token frames among them."""
    frame_tokens = (1, 4, 4, 16, 2, 2, 9)
    group = FrameGroup((4, 3), frame_tokens, torch.zeros(sum(frame_tokens), 3, dtype=torch.int64))
    inputs = tensors(group, torch.float64)
    for ours, reference in zip(run(frame_attention, group, *inputs), run(dense_attention, group, *inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=2e-14)


def test_strided_views_are_taken_as_they_are() -> None:
    """q, k, v come as thirds of one fused projection, not contiguous."""
    group = FrameGroup.of((3, 2), (2, 4))
    fused = torch.randn(group.tokens, 3, HEADS, HEAD_DIM, dtype=torch.float64)
    q, k, v = fused.unbind(1)
    torch.testing.assert_close(frame_attention(q, k, v, group), dense_attention(q, k, v, group), rtol=0, atol=1e-14)


def test_bfloat16_errs_no_more_than_twice_the_plain_kernel() -> None:
    """The merge of two calls may not lose precision beyond the kernel's own."""
    group = FrameGroup.of((6,), (8, 8))
    exact_inputs = tensors(group, torch.float64)
    inputs = tensors(group, torch.bfloat16)
    plain_spans = Spans((group.tokens,))
    plain, _ = cpu.forward(*inputs[:3], plain_spans, plain_spans, causal=False)
    plain_exact, _ = cpu.forward(*exact_inputs[:3], plain_spans, plain_spans, causal=False)
    allowed = 2 * (plain.double() - plain_exact).abs().max()
    error = (frame_attention(*inputs[:3], group).double() - dense_attention(*exact_inputs[:3], group)).abs()
    # Early frames average over fewer keys, so their values (and roundings) are larger: compare where all keys are seen.
    assert error[-64:].max() <= allowed


LONG_CLIPS = [(9,), (2,), (9, 30), (9, 3, 30, 4), (1, 2)]


def long_tensors(layout: FrameLayout) -> list[torch.Tensor]:
    """q, k, v of the window, k and v of the context, and the output's gradient."""
    generator = torch.Generator().manual_seed(layout.tokens)
    sizes = [layout.window.tokens] * 3 + [layout.context.tokens] * 2 + [layout.window.tokens]
    return [torch.randn(size, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64) for size in sizes]


def run_long(attention, layout: FrameLayout, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The window's output and the gradients of its q, k, v and of the context's k and v."""
    *inputs, dout = tensors
    q, k, v, context_k, context_v = inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(q, k, v, layout.window, PrefixKV(context_k, context_v, layout.prefix))
    # The reference does not touch an empty context, so its gradient must be asked for as zeros.
    return [out, *torch.autograd.grad(out, inputs, dout, materialize_grads=True)]


def by_frame_order(layout: FrameLayout, q, k, v, context_k, context_v) -> torch.Tensor:
    """The window's output by definition: one clip after another, one frame after another, softmax over all it sees."""
    out, window_start, context_start = [], 0, 0
    for frames, coarse in zip(layout.window.clip_frames, layout.context.clip_frames, strict=True):
        fine_tokens, coarse_tokens = layout.window.frame_tokens[0], 4
        past = slice(context_start, context_start + coarse * coarse_tokens)
        for frame in range(frames):
            now = slice(window_start + frame * fine_tokens, window_start + (frame + 1) * fine_tokens)
            seen = slice(window_start, now.stop)
            keys, values = torch.cat([context_k[past], k[seen]]), torch.cat([context_v[past], v[seen]])
            weights = (torch.einsum("qnd,knd->nqk", q[now], keys) / HEAD_DIM**0.5).softmax(-1)
            out.append(torch.einsum("nqk,knd->qnd", weights, values))
        window_start, context_start = window_start + frames * fine_tokens, past.stop
    return torch.cat(out)


@pytest.mark.parametrize("clip_frames", LONG_CLIPS)
def test_a_window_sees_its_context_and_itself(clip_frames: tuple[int, ...]) -> None:
    """float64: the kernels, the dense mask and the definition give the same, forward; the first two backward too."""
    layout = FrameLayout.of(clip_frames, (8, 8), window=4, coarsening=4)
    assert layout.tokens == sum(64 * min(n, 4) + 4 * max(0, n - 4) for n in clip_frames)
    tensors = long_tensors(layout)
    kernels, dense = run_long(frame_attention, layout, *tensors), run_long(dense_attention, layout, *tensors)
    torch.testing.assert_close(kernels[0], by_frame_order(layout, *tensors[:-1]), rtol=0, atol=2e-14)
    for ours, reference in zip(kernels, dense, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=2e-14)


def test_long_layouts() -> None:
    """Clips of 9 and 3 frames, a window of 4 frames of 4 x 4 tokens, context tokens twice as wide and high."""
    layout = FrameLayout.of((9, 3), (4, 4), window=4, coarsening=2)
    device = torch.device("cpu")
    assert layout.window.clip_frames == (4, 3) and layout.context.clip_frames == (5, 0)
    assert layout.window_rows(device).tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert layout.context_rows(device).tolist() == [0, 1, 2, 3, 4]
    assert layout.window.positions[:16, 0].unique().tolist() == [5] and layout.window.positions[64, 0] == 0
    assert layout.context.positions[:4].tolist() == [[0, 0, 0], [0, 0, 2], [0, 2, 0], [0, 2, 2]]
    plan = [4] * 5 + [16] * 4  # tokens of the first clip's frames, in the order of time
    pairs = sum(n * sum(plan[: i + 1]) for i, n in enumerate(plan)) + sum(16 * 16 * i for i in (1, 2, 3))
    assert layout.attended_pairs == pairs
    with pytest.raises(ValueError, match="longer than the window of 4"):
        FrameLayout.of((5,), (4, 4), window=4)
    with pytest.raises(ValueError, match="does not divide by coarsening 3"):
        FrameLayout.of((5,), (4, 4), window=4, coarsening=3)


def test_attended_pairs_count_the_mask() -> None:
    for clip_frames in CLIPS:
        group = FrameGroup.of(clip_frames, (1, 3))
        assert group.pairs == int(group.mask(torch.device("cpu")).sum())


def test_the_same_layout_is_made_once() -> None:
    assert FrameLayout.of([3, 2], (2, 2), window=4) is FrameLayout.of((3, 2), (2, 2), window=4)


def test_wrong_shapes_are_named() -> None:
    group = FrameGroup.of((2,), (2, 2))
    x = torch.zeros(7, 1, 64)
    with pytest.raises(ValueError, match=r"T = 8 tokens, got \[7, 1, 64\]"):
        frame_attention(x, x, x, group)
    with pytest.raises(ValueError, match="at least one frame"):
        FrameLayout.of((2, 0), (2, 2), window=4)
