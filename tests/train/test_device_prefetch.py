"""Packs on their way to the device: the right batches, and no step makes the host wait for the GPU."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from far_scale.config.schema import ObjectiveSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.model import FAR, FARConfig
from far_scale.model.attention import cpu, dense, prepare
from far_scale.model.attention.selection import KERNELS, unusable_reason
from far_scale.model.layers import HEAD_DIM
from far_scale.model.sharded_layout import SequenceRank, ShardedLayout
from far_scale.train.device_prefetch import DevicePrefetch
from far_scale.train.flow_matching import add_noise, pack_loss
from far_scale.utils.errors import UserError
from harness.prepared import nothing_is_made

CONFIG = FARConfig(layers=2, heads=1, channels=4, window=4, patch=1, context_patch=2, actions=3)
OBJECTIVE = ObjectiveSection()


def packs_of_steps(steps: int, lanes: int = 2) -> Iterator[list[Pack]]:
    for step in range(steps):
        yield [pack(step, lane) for lane in range(lanes)]
    raise UserError("shard-000003.tar: damaged")


def packs_of_new_layouts(steps: int) -> Iterator[list[Pack]]:
    """One pack a step, of a layout that no step before had, though with as many tokens, so that nothing is compiled."""
    for step, clip_frames in zip(range(steps), itertools.permutations((9, 7, 5, 3, 2)), strict=False):
        yield [pack(step, 0, clip_frames)]


def pack(step: int, lane: int, clip_frames: tuple[int, ...] = (7, 3)) -> Pack:
    frames = sum(clip_frames)
    generator = torch.Generator().manual_seed(10 * step + lane)
    latents = torch.randn(frames, 4, 4, 4, generator=generator)
    actions = torch.randint(0, 3, (frames,), generator=generator)
    return Pack(latents, actions, None, clip_frames, ("a@0", "b@0"), lane, step, {})


def test_batches_are_the_packs_with_their_noise_in_order() -> None:
    with DevicePrefetch(packs_of_steps(3), OBJECTIVE, CONFIG, 5, torch.device("cpu"), "cpu") as batches:
        for step in range(3):
            batch = next(batches)
            assert [(made.step, made.lane) for made in batch.packs] == [(step, 0), (step, 1)]
            for lane, noisy in enumerate(batch.noisy):
                expected = add_noise(pack(step, lane), OBJECTIVE, CONFIG, 5)
                for ours, plain in zip(noisy.tensors(), expected.tensors(), strict=True):
                    assert torch.equal(ours, plain)
        with pytest.raises(UserError, match="damaged"):
            next(batches)


def test_the_thread_ends_with_the_prefetch() -> None:
    with DevicePrefetch(packs_of_steps(9), OBJECTIVE, CONFIG, 5, torch.device("cpu"), "cpu") as batches:
        next(batches)
        assert any(thread.name.startswith("device-prefetch") for thread in threading.enumerate())
    assert not any(thread.name.startswith("device-prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("shard", [None, SequenceRank(0, 1)], ids=["whole", "sharded"])
def test_layouts_come_prepared(shard: SequenceRank | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that the thread had before, which it hands out again."""
    model, layouts = FAR(CONFIG), []
    monkeypatch.setattr(model, "kernel", lambda: dense.NAME)
    packs = itertools.chain(packs_of_new_layouts(2), packs_of_new_layouts(2))
    with DevicePrefetch(packs, OBJECTIVE, CONFIG, 5, torch.device("cpu"), dense.NAME, shard) as batches:
        for batch in (next(batches) for _ in range(4)):
            (noisy,) = batch.noisy
            with nothing_is_made(copies=False):
                velocity = model(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
                pack_loss(velocity, noisy).backward()
            assert isinstance(noisy.layout, ShardedLayout) == (shard is not None)
            layouts.append(noisy.whole_layout)
    assert layouts[0] is layouts[2] is not layouts[1] and layouts[1] is layouts[3]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_makes_the_host_wait_for_the_gpu(compiled: bool) -> None:
    """After the first steps, which load and compile, any synchronisation raises: in a step, and in the prefetch thread,
    which makes the next step's layout meanwhile. Every step has a new layout."""
    device = torch.device("cuda")
    model = FAR(CONFIG).to(device, torch.bfloat16).train()
    model.configure_execution(compiled=compiled)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with DevicePrefetch(packs_of_new_layouts(21), OBJECTIVE, CONFIG, 5, device, model.kernel()) as batches:
        for step in range(20):
            batch = next(batches)
            torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")
            try:
                for noisy in batch.noisy:
                    velocity = model(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
                    pack_loss(velocity, noisy).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                adam.step()
                adam.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != cpu.NAME])
def test_batches_on_a_gpu_are_those_of_the_host(kernel: str) -> None:
    device = torch.device("cuda")
    if (reason := unusable_reason(kernel, device, torch.bfloat16, HEAD_DIM)) is not None:
        pytest.skip(f"{kernel}: {reason}")
    with DevicePrefetch(packs_of_steps(4), OBJECTIVE, CONFIG, 5, device, kernel) as batches:
        for step in range(4):
            for lane, noisy in enumerate(next(batches).noisy):
                expected = add_noise(pack(step, lane), OBJECTIVE, CONFIG, 5)
                found = noisy.tensors() + prepare(noisy.layout, device, kernel)
                plain = expected.tensors() + prepare(expected.layout, torch.device("cpu"), kernel)
                for ours, on_host in zip(found, plain, strict=True):
                    assert ours.device.type == "cuda"
                    assert torch.equal(ours.cpu(), on_host)
