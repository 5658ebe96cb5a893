"""The operator with the exchange as torch sees it, on one rank; distributed/test_sequence_parallel.py has several."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from far_scale.model import FAR, FARConfig, layers
from far_scale.model.attention import attend, attend_sharded
from far_scale.model.attention.exchange import to_heads
from far_scale.model.layout import AttentionPlan, FrameLayout
from far_scale.model.sharded_layout import SequenceRank, ShardedLayout, ShardedPlan

ALONE = SequenceRank(0, 1)
CPU = torch.device("cpu")
LONG = FARConfig(layers=2, heads=1, patch=2, channels=8, window=8, context_patch=4, actions=4)
plans: list[AttentionPlan] = []  # alive until the backward, which looks them up
FORWARD = torch.ops.far_scale.sharded_attention.default


def arguments(dtype: torch.dtype = torch.float64, requires_grad: bool = False, last: bool = False) -> list:
    """A pack's; with `last` of a layer where the context gives only keys and values."""
    layout = FrameLayout.of((6, 2), (2, 2), window=3, coarsening=2)
    generator = torch.Generator().manual_seed(0)
    sharded = ShardedLayout(layout, ALONE)
    plan = sharded.window_plan if last else sharded.plan
    sizes = plan.group.tokens, plan.keys, plan.keys
    tensors = [torch.randn(n, 2, 16, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]
    plans.append(plan)
    return [*(x.requires_grad_(requires_grad) for x in tensors), plan.handle, "cpu"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operator_is_as_registered(dtype: torch.dtype) -> None:
    """Shapes, strides and dtypes without data, no aliases; also where the context gives only keys and values."""
    checks = ("test_schema", "test_faketensor")
    for last in (False, True):
        inputs = arguments(dtype, last=last)
        torch.library.opcheck(FORWARD, inputs, test_utils=checks)
        out, lse = FORWARD(*inputs)
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        backward = torch.ops.far_scale.sharded_attention_backward.default
        torch.library.opcheck(backward, (torch.ones_like(out), out, lse, *inputs), test_utils=checks)


@pytest.mark.parametrize("last", [False, True])
def test_one_rank_alone_gets_what_it_gets_without_an_exchange(last: bool) -> None:
    results = []
    for attention in (attend_sharded, attend):
        *leaves, handle, kernel = arguments(requires_grad=True, last=last)
        plan = AttentionPlan.find(handle)
        assert isinstance(plan, ShardedPlan)
        out = attention(*leaves, plan.whole.handle if attention is attend else handle, kernel)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


def test_fewer_heads_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 heads cannot be shared by 3 ranks"):
        to_heads([torch.zeros(4, 2, 16)], [[(4, 0, 0)]], SequenceRank(0, 3))


def test_the_handle_of_another_plan_is_refused() -> None:
    layout = FrameLayout.of((2,), (1, 2), window=2)
    q = torch.zeros(4, 1, 16)
    with pytest.raises(AssertionError, match="handle of a sharded plan"):
        attend_sharded(q, q, q, layout.window_plan.handle, "cpu")


@pytest.mark.slow
def test_nothing_breaks_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without code generation, with attention kept, for packs of other lengths without a new graph."""
    torch._dynamo.reset()
    compiled = torch.compile(layers._layer, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(layers, "_compiled_layer", lambda: compiled)
    torch.manual_seed(0)
    model = FAR(LONG).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    results, graphs = [], []
    for options in ({}, {"compiled": True, "checkpointing": "attention-kept"}):
        model.configure_execution(**options)
        for clip_frames in ((12, 9, 3), (10, 17)):
            layout = LONG.layout(clip_frames, (8, 8))
            draw = torch.Generator().manual_seed(1)
            latents = torch.randn(layout.frames, 8, 8, 8, generator=draw)
            actions = torch.randint(0, 4, (layout.frames,), generator=draw)
            model.zero_grad()
            sharded = ShardedLayout(layout, ALONE) if options else layout
            out = model(latents, torch.ones(layout.frames), actions, layout=sharded)
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] < graphs[2] == graphs[3]
    for plain, ours in zip(results[:2], results[2:], strict=True):
        for expected, found in zip(plain, ours, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
