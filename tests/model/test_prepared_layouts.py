"""A prepared layout: a forward and its backward make nothing more for the device, and compute the same."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

from far_scale.config.schema import ObjectiveSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.model import FAR, FARConfig
from far_scale.model.attention import cpu, dense, flex, prepare
from far_scale.model.layout import FrameLayout
from far_scale.model.sharded_layout import SequenceRank
from far_scale.train.flow_matching import NoisyPack, add_noise, pack_loss
from harness.prepared import forget_layouts, nothing_is_made

CPU = torch.device("cpu")
MODELS = {
    "FAR": (FARConfig(layers=2, heads=1, channels=4, window=5, labels=3), (5, 1, 3)),
    "FAR-Long": (FARConfig(layers=2, heads=1, channels=4, window=3, context_patch=2, actions=3), (7, 2, 4)),
    "FAR-Long, no short clip": (FARConfig(layers=2, heads=1, channels=4, window=3, context_patch=2), (7, 5)),
    "Video DiT": (FARConfig(layers=2, heads=1, channels=4, window=5, causal=False), (5, 1, 3)),
}


def draw_pack(config: FARConfig, clip_frames: tuple[int, ...], shard: SequenceRank | None) -> NoisyPack:
    """With a layout that nothing was made for."""
    forget_layouts()
    draw, frames = torch.Generator().manual_seed(0), sum(clip_frames)
    latents = torch.randn(frames, 4, 4, 4, generator=draw)
    actions = torch.randint(3, (frames,), generator=draw) if config.actions else None
    labels = torch.randint(3, (len(clip_frames),), generator=draw) if config.labels else None
    noisy = add_noise(Pack(latents, actions, labels, clip_frames, (), 0, 0, {}), ObjectiveSection(), config, 0)
    return noisy if shard is None else noisy.shard(shard)


def loss_and_gradients(model: FAR, noisy: NoisyPack, backward: bool) -> list[Tensor]:
    velocity = model(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
    loss = pack_loss(velocity, noisy)
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True) if backward else []
    return [velocity.detach(), loss.detach(), *gradients]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shard", [None, SequenceRank(0, 1)], ids=["whole", "sharded"])
@pytest.mark.parametrize("kernel", [cpu.NAME, dense.NAME, flex.NAME])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_makes_nothing_after_prepare(
    name: str, kernel: str, shard: SequenceRank | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, clip_frames = MODELS[name]
    model = FAR(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    monkeypatch.setattr(model, "kernel", lambda: kernel)
    backward = kernel != flex.NAME  # it has none on a CPU
    with torch.set_grad_enabled(backward):
        lazily = loss_and_gradients(model, draw_pack(config, clip_frames, shard), backward)
        noisy = draw_pack(config, clip_frames, shard)
        with pytest.raises(AssertionError, match="is made only now"), nothing_is_made():
            loss_and_gradients(model, noisy, backward)
        noisy = draw_pack(config, clip_frames, shard)
        tensors = prepare(noisy.layout, CPU, kernel)
        # Of the other two, one computes row numbers on the CPU in each call, and one is PyTorch's own code.
        with nothing_is_made(copies=kernel != dense.NAME):
            prepared = loss_and_gradients(model, noisy, backward)
    assert all(torch.equal(x, y) for x, y in zip(lazily, prepared, strict=True))
    again = prepare(noisy.layout, CPU, kernel)
    assert len(again) == len(tensors) and all(x is y for x, y in zip(tensors, again, strict=True))


def test_threads_share_no_layouts() -> None:
    """Else a stream could read what another one still copies."""
    arguments = (7, 3), (4, 4), 4, 2
    mine, theirs = FrameLayout.of(*arguments), []
    thread = threading.Thread(target=lambda: theirs.extend(FrameLayout.of(*arguments) for _ in range(2)))
    thread.start()
    thread.join()
    assert FrameLayout.of(*arguments) is mine and theirs[0] is theirs[1] and theirs[0] is not mine


def test_a_thread_keeps_a_limited_number_of_layouts() -> None:
    made = []
    for frames in range(1, 41):
        one = FrameLayout.of((frames, 1), (2, 2), window=50)
        prepare(one, CPU, cpu.NAME)
        made.append(weakref.ref(one))
    del one
    gc.collect()
    assert [reference() is not None for reference in made] == [False] * 8 + [True] * 32
