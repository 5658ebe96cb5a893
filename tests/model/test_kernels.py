"""Every attention kernel against the dense mask: the libraries' adapters over fakes of the libraries on a CPU, and the
libraries themselves on a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from far_scale.model.attention import (
    causal_pair,
    cpu,
    dense,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    flex,
    kernel,
    torch_varlen,
    xformers_blocks,
)
from far_scale.model.attention import selection as choice
from far_scale.model.attention.kernel import Kernel
from far_scale.model.attention.table import HEAD_DIM, Inputs, attention_with_gradients, table_rows
from far_scale.model.layout import AttentionPlan, FrameGroup, FrameLayout, Prefix, Spans
from harness import fake_libraries, plain_kernel
from harness.prepared import forget_layouts, nothing_is_made

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HEADS = 2


def long_order(
    clip_frames: tuple[int, ...], side: int, window: int, coarsening: int
) -> Callable[[torch.device], AttentionPlan]:
    """FAR-Long: what the window tokens see, of frames of `side` x `side` tokens."""
    return lambda device: FrameLayout.of(clip_frames, (side, side), window, coarsening).window_plan


def pack_order(
    clip_frames: tuple[int, ...], side: int, window: int, coarsening: int
) -> Callable[[torch.device], AttentionPlan]:
    """FAR-Long: what the tokens of context and window see."""
    return lambda device: FrameLayout.of(clip_frames, (side, side), window, coarsening).plan


def uniform_order(
    clip_frames: tuple[int, ...], grid: tuple[int, int], causal: bool = True
) -> Callable[[torch.device], AttentionPlan]:
    return lambda device: AttentionPlan(FrameGroup.of(clip_frames, grid, causal=causal))


def cached_order(keys: tuple[int, ...], side: int) -> Callable[[torch.device], AttentionPlan]:
    """Sampling: of every clip one new frame, and the keys that a cache holds."""
    group = FrameGroup.of((1,) * len(keys), (side, side))
    return lambda device: AttentionPlan(group, Prefix(None, group.clips, Spans(keys)))


def mixed_order(device: torch.device) -> AttentionPlan:
    """Frames of different sizes in one clip, single tokens among them."""
    frame_tokens = (1, 4, 4, 16, 2, 2, 9)
    return AttentionPlan(FrameGroup((4, 3), frame_tokens, torch.zeros(sum(frame_tokens), 3, dtype=torch.int64)))


ORDERS: dict[str, Callable[[torch.device], AttentionPlan]] = {
    "frames of 1": uniform_order((5, 1, 3), (1, 1)),
    "frames of 2": uniform_order((1, 4, 2), (1, 2)),
    "frames of 7": uniform_order((3, 3), (7, 1)),
    "frames of 64": uniform_order((2, 1, 3), (8, 8)),
    "one frame": uniform_order((1,), (3, 3)),
    "mixed frames": mixed_order,
    "long": long_order((7, 2), 4, window=3, coarsening=2),
    "long, all clips": long_order((5, 9, 6), 4, window=2, coarsening=4),
    "pack": pack_order((7, 2, 5, 3), 4, window=3, coarsening=2),
    "pack, all clips": pack_order((5, 9, 6), 4, window=2, coarsening=4),
    "pack without context": pack_order((2, 3), 4, window=3, coarsening=2),
    "cached": cached_order((30, 12), 3),
    "not causal": uniform_order((4, 4), (3, 3), causal=False),
    "not causal, mixed clips": uniform_order((5, 1, 3), (4, 4), causal=False),
}


@pytest.fixture(params=ORDERS)
def plan(request: pytest.FixtureRequest) -> AttentionPlan:
    return ORDERS[request.param](CPU)


def through_the_pair(of: Kernel, inputs: Inputs) -> list[Tensor]:
    """Output, log-sum-exp and all gradients by `causal_pair`."""
    plan, *tensors, dout = inputs
    out, lse = causal_pair.forward(of, *tensors, plan)
    return [out, lse, *causal_pair.backward(of, dout, *tensors, out, lse, plan)]


def by_the_mask(inputs: Inputs) -> list[Tensor]:
    """The same by the dense mask."""
    plan, *tensors, dout = inputs
    out, lse = dense.forward(*tensors, plan)
    return [out, lse, *dense.backward(dout, *tensors, out, lse, plan)]


def assert_equal(found: list[Tensor], exact: list[Tensor], within: float) -> None:
    for ours, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=within, check_dtype=False)


def test_the_plain_kernel_through_the_pair(plan: AttentionPlan) -> None:
    """The bookkeeping of layouts that only GPU kernels take in one call, in float64."""
    inputs = Inputs.draw(plan, HEADS, CPU, torch.float64)
    assert_equal(through_the_pair(plain_kernel, inputs), by_the_mask(inputs), within=2e-14)


def test_the_cpu_kernel_through_the_pair(plan: AttentionPlan) -> None:
    inputs = Inputs.draw(plan, HEADS, CPU, torch.float64)
    assert_equal(through_the_pair(cpu, inputs), by_the_mask(inputs), within=2e-14)


def test_the_plain_kernel_aligns_bottom_right() -> None:
    q, k, v = (torch.randn(9, HEADS, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    nine, four = Spans((9,)), Spans((4,))
    of_all, lse_of_all = plain_kernel.forward(q, k, v, nine, nine, causal=True)
    of_last, lse_of_last = plain_kernel.forward(q[5:], k, v, four, nine, causal=True)
    assert_equal([of_last, lse_of_last], [of_all[5:], lse_of_all[5:]], within=1e-14)


def clear_caches() -> None:
    for cached in (
        flash_attn_2._library, flash_attn_3._operators, flash_attn_4._library, xformers_blocks._library,
        kernel.import_failure, choice._choose_cached,
    ):  # fmt: skip
        cached.cache_clear()


@pytest.fixture
def fresh() -> Iterator[None]:
    """No library of before is remembered, nor a fake one afterwards."""
    clear_caches()
    yield
    clear_caches()


FAKES = {
    "flash-attn 2.5": flash_attn_2,
    "flash-attn 2.6": flash_attn_2,
    "flash-attn 2.7": flash_attn_2,
    "flash-attn 2.8": flash_attn_2,
    "flash-attn 3": flash_attn_3,
    "flash-attn 4": flash_attn_4,
    "xformers on 9.0": xformers_blocks,
    "xformers on 7.5": xformers_blocks,
    "torch": torch_varlen,
}


@pytest.fixture(params=FAKES)
def faked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Kernel:
    """An adapter over a fake of its library."""
    name = request.param
    if FAKES[name] is flash_attn_2:
        fake_libraries.flash_attn_2(monkeypatch, f"{name[-3:]}.3")
    elif FAKES[name] is flash_attn_3:
        if importlib.util.find_spec("flash_attn_3"):
            pytest.skip("the real operators of this name are here")
        fake_libraries.flash_attn_3(monkeypatch)
    elif FAKES[name] is flash_attn_4:
        fake_libraries.flash_attn_4(monkeypatch)
    elif FAKES[name] is xformers_blocks:
        fake_libraries.xformers(monkeypatch)
        capability = (9, 0) if name.endswith("9.0") else (7, 5)
        monkeypatch.setattr(xformers_blocks, "compute_capability", lambda device: capability)
    else:
        fake_torch(monkeypatch)
    return FAKES[name]


@pytest.mark.parametrize("order", ["mixed frames", "long", "cached", "not causal, mixed clips"])
def test_an_adapter_makes_nothing_after_prepare(faked: Kernel, order: str) -> None:
    forget_layouts()
    plan = ORDERS[order](CPU)
    causal_pair.prepare(faked, plan, CPU)
    with nothing_is_made():
        through_the_pair(faked, Inputs.draw(plan, HEADS, CPU, torch.float32))


def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators, which the CPU has not, with their log-sum-exp `[N, T]`."""

    def forward(q, k, v, starts, key_starts, longest, key_longest, dropout, causal, debug):
        assert dropout == 0 and debug is False
        sequences = starts, key_starts, longest, key_longest
        return *fake_libraries._forward(q, k, v, *sequences, None, causal), None, None, None

    def backward(dout, q, k, v, out, lse, starts, key_starts, longest, key_longest, dropout, causal, state, companion):
        assert dout.is_contiguous() and out.is_contiguous() and dropout == 0 and state.dtype == torch.uint64
        sequences = starts, key_starts, longest, key_longest
        return fake_libraries._backward(dout, q, k, v, out, lse, *sequences, q.shape[-1] ** -0.5, causal)

    monkeypatch.setattr(torch_varlen, "_forward", forward)
    monkeypatch.setattr(torch_varlen, "_backward", backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_through_the_pair(faked: Kernel, plan: AttentionPlan, dtype: torch.dtype) -> None:
    """float32: the dense mask's numbers. bfloat16: the plain kernel's but for a last bit, so no adapter loses any."""
    inputs = Inputs.draw(plan, HEADS, CPU, dtype)
    found = through_the_pair(faked, inputs)
    if dtype == torch.float32:
        assert_equal(found, by_the_mask(inputs), within=1e-5)
    else:
        eps = torch.finfo(dtype).eps
        for ours, plain in zip(found, through_the_pair(plain_kernel, inputs), strict=True):
            torch.testing.assert_close(ours, plain, rtol=eps, atol=2 * eps)
    assert found[1].dtype == torch.float32 and all(x.dtype == dtype for x in found[:1] + found[2:])


@pytest.mark.parametrize("causal", [False, True])
def test_an_adapter_takes_strided_tensors(faked: Kernel, causal: bool) -> None:
    """q, k, v as thirds of a fused projection, the output's gradient transposed and expanded."""
    queries = keys = Spans((5, 1, 7))
    if not causal:
        keys = Spans((2, 9, 2))
    fused = torch.randn(13, 3, HEADS, HEAD_DIM)
    q, k, v = fused.unbind(1)
    for dout in (torch.randn(HEAD_DIM, HEADS, 13).permute(2, 1, 0), torch.ones(()).expand(13, HEADS, HEAD_DIM)):
        out, lse = faked.forward(q, k, v, queries, keys, causal)
        exact, exact_lse = plain_kernel.forward(q, k, v, queries, keys, causal)
        merged = torch.randn(HEADS, HEAD_DIM, 13).permute(2, 0, 1), exact_lse + 1
        gradients = faked.backward(dout, q, k, v, *merged, queries, keys, causal)
        exact_gradients = plain_kernel.backward(dout, q, k, v, *merged, queries, keys, causal)
        assert_equal([out, lse, *gradients], [exact, exact_lse, *exact_gradients], within=1e-5)


def test_deterministic_backward(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Torch's setting of determinism is passed to the libraries; xFormers has another operator for it."""
    monkeypatch.setattr(xformers_blocks, "compute_capability", lambda device: (9, 0))
    noted = {
        flash_attn_2: fake_libraries.flash_attn_2(monkeypatch, "2.8.3"),
        xformers_blocks: fake_libraries.xformers(monkeypatch),
    }
    if not importlib.util.find_spec("flash_attn_3"):
        noted[flash_attn_3] = fake_libraries.flash_attn_3(monkeypatch)
    inputs = Inputs.draw(ORDERS["frames of 1"](CPU), HEADS, CPU, torch.bfloat16)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for adapter in noted:
                through_the_pair(adapter, inputs)
        finally:
            torch.use_deterministic_algorithms(False)
    assert noted.pop(xformers_blocks) == ["flashF", "flashB", "flashF", "cutlassB"]
    assert all(flags == [False, True] for flags in noted.values())


def test_torchs_operators_have_the_expected_signatures() -> None:
    """The positional arguments of PyTorch's operators, in this version too."""
    forward, backward = (
        [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
        for name in ("_flash_attention_forward", "_flash_attention_backward")
    )
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert forward[:10] == ["query", "key", "value", *lengths, "return_debug_mask"]
    inputs = ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert backward[:14] == [*inputs, *lengths, "rng_state", "unused"]


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: dict[str, str]) -> None:
    """A machine with a GPU of this compute capability and these packages."""
    for module in (kernel, flash_attn_4, xformers_blocks, choice):
        monkeypatch.setattr(module, "compute_capability", lambda device: capability)
    for module in (kernel, choice):
        monkeypatch.setattr(module, "installed_version", installed.get)


@pytest.mark.parametrize(
    ("adapter", "capability", "dtype", "head_dim", "reason"),
    [
        (flash_attn_3, (8, 0), torch.bfloat16, 64, "needs a GPU of compute capability 9.0, this one has 8.0"),
        (flash_attn_3, (10, 0), torch.bfloat16, 64, "needs a GPU of compute capability 9.0, this one has 10.0"),
        (flash_attn_3, (9, 0), torch.float32, 64, "takes bfloat16 and float16, not float32"),
        (flash_attn_3, (9, 0), torch.float16, 256, "takes heads of a multiple of 8 up to 192, not of 256"),
        (flash_attn_3, (9, 0), torch.float16, 64, "not installed"),
        (flash_attn_2, (7, 5), torch.float16, 64, "needs a GPU of compute capability 8.0 or higher, this one has 7.5"),
        (flash_attn_2, (8, 0), torch.float16, 60, "takes heads of a multiple of 8 up to 256, not of 60"),
        (flash_attn_2, (12, 0), torch.float16, 64, "needs flash-attn 2.5.7 or later, 2.4.2 is installed"),
        (flash_attn_4, (12, 0), torch.float16, 64, "needs a GPU of compute capability 9.0 to 11.9, this one has 12.0"),
        (flash_attn_4, (10, 0), torch.float16, 256, "takes heads of a multiple of 8 up to 128, not of 256"),
        (flash_attn_4, (9, 0), torch.float16, 256, "needs flash-attn-4 4.0.0b10 or later, 4.0.0b9 is installed"),
        (xformers_blocks, (7, 5), torch.bfloat16, 64, "takes bfloat16 from compute capability 8.0 on"),
        (xformers_blocks, (12, 0), torch.float32, 64, "needs a GPU of compute capability 7.5 to 9.0"),
        (xformers_blocks, (12, 0), torch.float16, 64, None),
        (xformers_blocks, (7, 5), torch.float16, 64, None),
        (xformers_blocks, (9, 0), torch.float32, 64, None),
        (torch_varlen, (12, 0), torch.float16, 64, None),
        (torch_varlen, (12, 0), torch.float32, 64, "takes bfloat16 and float16, not float32"),
        (flex, (8, 0), torch.float32, 64, None),
        (flex, (8, 0), torch.float32, 8, "takes heads from 16 on, not of 8"),
        (flex, (8, 0), torch.float64, 64, "takes float32, bfloat16 and float16, not float64"),
        (cpu, (8, 0), torch.float32, 64, "runs only on CPUs"),
    ],
)
def test_unusable_reason(
    adapter: Kernel,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    fresh: None,
) -> None:
    fake_libraries.xformers(monkeypatch)
    on(monkeypatch, capability, {"flash-attn": "2.4.2", "flash-attn-4": "4.0.0b9", "xformers": "0.0.35"})
    found = adapter.unusable_reason(GPU, dtype, head_dim)
    assert found is None if reason is None else str(found).startswith(reason)


def test_unusable_reason_on_a_cpu() -> None:
    for adapter in (flash_attn_2, flash_attn_3, flash_attn_4, torch_varlen, xformers_blocks):
        assert adapter.unusable_reason(CPU, torch.bfloat16, 64) == "runs only on NVIDIA GPUs"
    assert flex.unusable_reason(CPU, torch.float32, 64) == "FlexAttention has no backward on a CPU"
    assert cpu.unusable_reason(CPU, torch.int8, 64) == "takes float32, float64, bfloat16 and float16, not int8"


def test_xformers_built_for_another_torch(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """It is imported with a warning and fails at the first call only."""
    fake_libraries.xformers(monkeypatch)
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", SimpleNamespace(_built_with_cuda=False))
    on(monkeypatch, (9, 0), {"xformers": "0.0.35"})
    reason = xformers_blocks.unusable_reason(GPU, torch.bfloat16, 64)
    assert reason == f"the installed one was built for another torch than {torch.__version__}"


def test_a_library_that_does_not_import(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Built for another torch, mostly."""
    on(monkeypatch, (9, 0), {"flash-attn": "2.8.3"})

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10\nand more of it")

    monkeypatch.setattr(kernel.importlib, "import_module", broken)
    reason = flash_attn_2.unusable_reason(GPU, torch.bfloat16, 64)
    assert reason == "flash-attn 2.8.3 cannot be imported: undefined symbol: _ZN3c10"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_reference(plan: AttentionPlan) -> None:
    inputs = Inputs.draw(plan, HEADS, CPU, torch.float32)
    out = flex.attend(*inputs[1:4], plan.handle)
    torch.testing.assert_close(out, by_the_mask(inputs)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip_frames", [(5, 1, 3), (12, 4)])
def test_blocks_that_flex_skips(clip_frames: tuple[int, ...]) -> None:
    """A block is left out where the mask is all zero, and taken without looking where it is all one."""
    plan = long_order(clip_frames, 8, window=4, coarsening=2)(CPU)
    blocks = flex.block_mask(plan, CPU)
    mask = dense.mask(plan, CPU)
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 128, 0, -mask.shape[0] % 128))
    tiles = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    assert blocks.shape == (1, 1, *mask.shape)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), tiles.any(3).any(1))
    full = torch.zeros(blocks.full_kv_indices.shape[2:], dtype=torch.bool)
    for row, (count, listed) in enumerate(
        zip(blocks.full_kv_num_blocks[0, 0], blocks.full_kv_indices[0, 0], strict=True)
    ):
        full[row, listed[:count]] = True
    # A block that ends the prefix keys and begins the group's may be full by both; it is looked at all the same.
    assert not (full & ~tiles.all(3).all(1)).any()
    assert full.sum() >= tiles.all(3).all(1).sum() - len(full)
    assert flex.block_mask(plan, CPU) is blocks
    listed = (getattr(blocks, f"{kind}_{part}") for kind in ("kv", "full_kv") for part in ("num_blocks", "indices"))
    derived = BlockMask.from_kv_blocks(*listed)
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        assert torch.equal(getattr(blocks, name), getattr(derived, name))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_breaks_a_compiled_callers_graph() -> None:
    plan = ORDERS["long"](CPU)
    inputs = Inputs.draw(plan, HEADS, CPU, torch.float32)

    def caller(q, k, v, key):
        return flex.attend(q * 2, k, v, key) + 1

    compiled = torch.compile(caller, backend="eager")
    torch.testing.assert_close(compiled(*inputs[1:4], plan.handle), caller(*inputs[1:4], plan.handle))


def test_the_table() -> None:
    """On a CPU: a line for each kernel and dtype, with small errors where it runs and a reason where it does not."""
    lines = list(table_rows(CPU, [torch.float32], clips=1, frames=1, heads=1))
    by_name = {line.split()[0]: line for line in lines[2:]}
    assert list(by_name) == list(choice.KERNELS)
    assert "no: runs only on NVIDIA GPUs" in by_name["flash-attn-3"]
    assert all(float(error) < 1e-5 for error in by_name["cpu"].split()[3:5])


def test_the_table_when_a_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image\nand more of it")

    monkeypatch.setattr(cpu, "forward", failing)
    lines = [line for line in table_rows(CPU, [torch.float32], clips=1, frames=1, heads=1) if line.startswith("cpu ")]
    assert len(lines) == 1 and lines[0].endswith("fails: RuntimeError: no kernel image")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_cpu_kernel_in_every_precision(plan: AttentionPlan, dtype: torch.dtype) -> None:
    assert_as_precise_as_the_mask(cpu.NAME, plan, CPU, dtype)


def assert_as_precise_as_the_mask(name: str, plan: AttentionPlan, device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradients against the dense mask in float64.

    In bfloat16 and float16 the error (root of the mean square) is at most twice that of the dense mask in the same
    precision, and nowhere more than four roundings of the largest number, or of 1: where a token sees itself alone, its
    gradients of q and k are zero but made of terms of the inputs' size. In float32 kernels multiply with fewer digits.
    """
    found, plain = (attention_with_gradients(of, Inputs.draw(plan, HEADS, device, dtype)) for of in (name, dense.NAME))
    exact = attention_with_gradients(dense.NAME, Inputs.draw(plan, HEADS, device, torch.float64))
    roundings = 64 if dtype == torch.float32 else 4
    for ours, rounded, reference in zip(found, plain, exact, strict=True):
        assert ours.shape == reference.shape and ours.dtype == dtype
        if reference.numel():
            error, plain_error = ours.double() - reference, rounded.double() - reference
            assert error.abs().max() <= roundings * torch.finfo(dtype).eps * reference.abs().max().clamp(min=1)
            assert dtype == torch.float32 or error.square().mean() <= 4 * plain_error.square().mean()


# What follows needs a GPU.

GPU_KERNELS = [name for name in choice.KERNELS if name not in (cpu.NAME, dense.NAME)]
GPU_ORDERS = ORDERS | {
    "frames of 1, long clips": uniform_order((300, 7, 120), (1, 1)),
    "frames of 7, long clips": uniform_order((40, 1, 7), (7, 1)),
    "frames of 64, long clips": uniform_order((40, 1, 7), (8, 8)),
    "frames of 256": uniform_order((4, 1, 6), (16, 16)),
    "long, frames of 64": long_order((30, 3, 9, 4), 8, window=4, coarsening=4),
    "pack, frames of 64": pack_order((30, 3, 9, 4), 8, window=4, coarsening=4),
    "long, frames of 256": long_order((12, 9), 16, window=2, coarsening=4),
    "cached, frames of 64": cached_order((640, 1), 8),
}


def usable_or_skip(name: str, dtype: torch.dtype) -> None:
    reason = choice.unusable_reason(name, GPU, dtype, HEAD_DIM)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GPU_KERNELS)
@pytest.mark.parametrize("layout", GPU_ORDERS)
def test_on_a_gpu(name: str, layout: str, dtype: torch.dtype) -> None:
    usable_or_skip(name, dtype)
    torch.compiler.reset()  # so that many layouts in one process do not exhaust what flex may compile
    assert_as_precise_as_the_mask(name, GPU_ORDERS[layout](GPU), GPU, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_deterministic_on_a_gpu(name: str) -> None:
    """Twice the same, bit by bit, where torch is asked for determinism."""
    usable_or_skip(name, torch.bfloat16)
    inputs = Inputs.draw(long_order((20, 3, 9), 16, window=6, coarsening=4)(GPU), 12, GPU, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = attention_with_gradients(name, inputs), attention_with_gradients(name, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in GPU_KERNELS if name != flex.NAME])
def test_a_kernels_causal_call_on_a_gpu(name: str) -> None:
    """The kernel's own forward and backward, strided inputs, mixed lengths: log-sum-exp and merged gradients too."""
    usable_or_skip(name, torch.bfloat16)
    spans = Spans((64, 1, 200, 129))
    tokens = spans.starts[-1]
    drawn = torch.randn(tokens, 5, HEADS, HEAD_DIM, device=GPU).bfloat16()
    q, k, v, dout, other = drawn.unbind(1)
    out, lse = choice.get_kernel(name).forward(q, k, v, spans, spans, causal=True)
    exact, exact_lse = plain_kernel.forward(*(x.double() for x in (q, k, v)), spans, spans, causal=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-3)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3e-2)
    merged = other.contiguous(), (lse + 1).contiguous()
    gradients = choice.get_kernel(name).backward(dout, q, k, v, *merged, spans, spans, causal=True)
    inputs = (x.double() for x in (dout, q, k, v, *merged))
    for ours, reference in zip(gradients, plain_kernel.backward(*inputs, spans, spans, causal=True), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=2e-2, atol=2e-2)
