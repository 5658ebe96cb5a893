"""The attention operators as torch sees them, and the layers compiled and checkpointed around them."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from far_scale.model import FAR, FARConfig, layers
from far_scale.model.attention import causal_pair, frame_attention
from far_scale.model.layout import AttentionPlan, FrameGroup, FrameLayout
from far_scale.train.costs import forward_flops

LONG = FARConfig(layers=3, heads=2, patch=2, channels=8, window=8, context_patch=4, actions=4)
PACKS = [(8, 8), (12, 9, 3), (20,), (3, 4), (9, 9, 9, 10), (5, 5, 2), (300, 17)]
FORWARD = torch.ops.far_scale.frame_attention.default
BACKWARD = torch.ops.far_scale.frame_attention_backward.default


def trained_like(config: FARConfig) -> FAR:
    torch.manual_seed(0)
    model = FAR(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def outputs(model: FAR, clip_frames: tuple[int, ...]) -> list[torch.Tensor]:
    """The velocity and all gradients of one pack."""
    layout = model.config.layout(clip_frames, (8, 8))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(layout.frames, model.config.channels, 8, 8, generator=generator)
    timesteps = torch.rand(layout.frames, generator=generator) * 1000
    actions = torch.randint(0, 4, (layout.frames,), generator=generator) if model.config.actions else None
    model.zero_grad()
    velocity = model(latents, timesteps, actions, layout=layout)
    velocity.square().mean().backward()
    return [velocity.detach(), *(parameter.grad for parameter in model.parameters())]


LAYOUT = FrameLayout.of((6, 2), (2, 2), window=3, coarsening=2)
PLANS = {"pack": LAYOUT.plan, "window": LAYOUT.window_plan}


def arguments(plan: AttentionPlan, requires_grad: bool = False) -> tuple:
    """A pack with a context, for the operators."""
    generator = torch.Generator().manual_seed(0)
    sizes = plan.group.tokens, plan.keys, plan.keys
    tensors = [torch.randn(n, 2, 16, generator=generator, dtype=torch.float64) for n in sizes]
    return (*(x.requires_grad_(requires_grad) for x in tensors), plan.handle, "cpu")


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kernel", ["cpu", "dense"])
def test_the_operators_pass_torchs_checks(kernel: str, plan: AttentionPlan) -> None:
    """Schema, fake implementation (shapes, strides, dtypes), autograd registration, and tracing with dynamic sizes."""
    inputs = (*arguments(plan, requires_grad=True)[:-1], kernel)
    torch.library.opcheck(FORWARD, inputs)
    q, k, v, handle, _ = (x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    out, lse = FORWARD(q, k, v, handle, kernel)
    torch.library.opcheck(BACKWARD, (torch.ones_like(out), out, lse, q, k, v, handle, kernel))
    without = AttentionPlan(FrameGroup.of((3,), (2, 2)))
    x = q[:12]
    torch.library.opcheck(FORWARD, (x, x, x, without.handle, kernel))


def test_a_freed_plan_is_an_error() -> None:
    plan = AttentionPlan(FrameGroup.of((2,), (1, 2)))
    key = plan.handle
    q = torch.zeros(4, 1, 16)
    assert torch.ops.far_scale.frame_attention(q, q, q, key, "cpu")[0].shape == q.shape
    del plan  # without waiting for the garbage collector: packs come by the thousand
    with pytest.raises(RuntimeError, match="layout of this attention call was freed"):
        torch.ops.far_scale.frame_attention(q, q, q, key, "cpu")


def test_flops_count_attended_pairs() -> None:
    for name, pairs in (("pack", LAYOUT.attended_pairs), ("window", LAYOUT.window_pairs)):
        inputs = arguments(PLANS[name], requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out, _ = FORWARD(*inputs)
            forward = counter.get_total_flops()
            out.sum().backward()
        assert forward == 4 * pairs * 2 * 16
        assert counter.get_total_flops() - forward == 10 * pairs * 2 * 16


@pytest.mark.parametrize("clip_frames", [(8, 8), (12, 9, 3)])
def test_a_step_has_the_flops_that_torch_counts(clip_frames: tuple[int, ...]) -> None:
    """`forward_flops`, which MFU is made of, against torch's own count of every operator."""
    model = trained_like(LONG)
    layout = LONG.layout(clip_frames, (8, 8))
    frames = layout.frames
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(frames, 8, 8, 8), torch.zeros(frames), torch.zeros(frames, dtype=torch.int64), layout=layout)
    assert forward_flops(LONG, layout) == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", ["none", "attention-kept", "full"])
@pytest.mark.slow
def test_one_graph_for_all_layers_and_packs(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled (without code generation, which is what takes time), nothing breaks the graph, the numbers are the same,
    and packs of ever new clip lengths compile nothing more."""
    torch._dynamo.reset()
    compiled = torch.compile(layers._layer, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(layers, "_compiled_layer", lambda: compiled)
    model, graphs = trained_like(LONG), []
    # Each graph takes seconds to compile: only "none" has those of packs without any context.
    packs = [pack for pack in PACKS if checkpointing == "none" or max(pack) > LONG.window]
    for clip_frames in packs:
        model.configure_execution()
        plain = outputs(model, clip_frames)
        model.configure_execution(compiled=True, checkpointing=checkpointing)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for ours, expected in zip(outputs(model, clip_frames), plain, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    # Here, too, attention is computed again where that was asked for alone.
    calls = []
    forward = causal_pair.forward
    monkeypatch.setattr(causal_pair, "forward", lambda *given: calls.append(1) or forward(*given))
    outputs(model, PACKS[-1])
    assert len(calls) == LONG.layers * (2 if checkpointing == "full" else 1)
    # Without any context: the last layer is another one. With a context: the first layer's is a view, too.
    assert graphs == ([2, 3, 0, 0, 0, 0, 0] if packs == PACKS else [2, 0, 0, 0])
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.slow
def test_generated_code_gives_the_same() -> None:
    """The whole compiler once, on the smallest model."""
    torch._dynamo.reset()
    model = trained_like(FARConfig(layers=2, heads=1, patch=2, channels=8))
    plain = outputs(model, (3, 5))
    model.configure_execution(compiled=True)
    for ours, expected in zip(outputs(model, (3, 5)), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """Counts calls of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.linear = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is FORWARD
        self.linear += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


def test_checkpointing_recomputes_what_it_should() -> None:
    model, calls = trained_like(LONG), {}
    for checkpointing in ("none", "attention-kept", "full"):
        model.configure_execution(checkpointing=checkpointing)
        with Calls() as counted:
            outputs(model, (12, 9, 3))
        calls[checkpointing] = (counted.forward, counted.linear)
    assert calls["none"][0] == calls["attention-kept"][0] == LONG.layers
    assert calls["full"][0] == 2 * LONG.layers
    assert calls["none"][1] < calls["attention-kept"][1] == calls["full"][1]


@pytest.mark.parametrize("kernel", ["cpu", "dense"])
def test_an_empty_group_gets_empty_gradients(kernel: str) -> None:
    group = FrameGroup.of((0,), (2, 2))
    q, k, v = (torch.zeros(0, 2, 16, requires_grad=True) for _ in range(3))
    out = frame_attention(q, k, v, group, kernel=kernel)
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape] * 3
