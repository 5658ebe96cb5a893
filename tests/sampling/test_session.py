"""Sessions: the frames of `predict_frames`, one action at a time, without end; strided windows and limited contexts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from far_scale.model import FAR, FARConfig
from far_scale.sampling import denoisers
from far_scale.sampling.cache import MultiLevelCache, first_window_frame
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.denoisers import CachedDenoiser, FinishedFrame, Schedule
from far_scale.sampling.noise import euler_sigmas
from far_scale.sampling.sampler import roll_out
from far_scale.sampling.session import Session
from far_scale.utils.errors import UserError
from harness.refusal import refused

SIZE, WINDOW = (4, 6), 4
LONG = {"context_patch": 2, "actions": 3}
CPU = torch.device("cpu")


def random_model(layers: int = 3, **shape: int) -> FAR:
    """A model whose every weight is random, so that every frame matters to every later one."""
    torch.manual_seed(0)
    model = FAR(FARConfig(layers=layers, heads=2, channels=4, window=WINDOW, **shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model.eval()


def latents(frames: int, clips: int = 2) -> Tensor:
    return torch.randn(clips, frames, 4, *SIZE, generator=torch.Generator().manual_seed(1))


def draw_actions(frames: int, clips: int = 2) -> Tensor:
    return torch.randint(0, 3, (clips, frames), generator=torch.Generator().manual_seed(2))


def test_the_window_slides_by_the_stride() -> None:
    firsts = [[first_window_frame(frame, WINDOW, stride) for frame in range(10)] for stride in (1, 2, 4)]
    assert firsts == [[0, 0, 0, 0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 2, 2, 4, 4, 6, 6], [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]]


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [LONG, {"actions": 3}, {"context_patch": 2, "labels": 3}], ids=str)
@pytest.mark.slow
def test_every_stride_with_the_cache_and_without_it(shape: dict[str, int], stride: int) -> None:
    """From nothing, inside the window and past it; guided, on frames that are not square."""
    model, new = random_model(**shape), 9
    for start in (0, 3, 9):
        classes = {"actions": draw_actions(start + new)} if "actions" in shape else {"labels": torch.tensor([2, 0])}
        sampling = SamplingConfig(new, 2, guidance=1.5, window_stride=stride, context_noise=0.1)
        cached, uncached = (roll_out(model, latents(start), replace(sampling, use_cache=c), **classes) for c in (1, 0))
        assert cached.abs().max() > 0.5
        torch.testing.assert_close(cached, uncached, rtol=0, atol=1e-4)


def test_a_stride_encodes_the_window_once_for_several_frames() -> None:
    """By the tokens that each pass takes: context frames, then the window's, then a step; or a frame, then a step."""
    model, passes = random_model(context_patch=2), []
    model.blocks[0].mlp.register_forward_hook(lambda _, inputs, __: passes.append(inputs[0].shape[:2].numel()))
    roll_out(model, latents(6, clips=1), SamplingConfig(3, 1, window_stride=2))
    fine, coarse = 24, 6
    assert passes == [4 * coarse, 2 * fine, fine, fine, fine, 2 * coarse, 2 * fine, fine]


def test_numbers_of_keys_are_rounded_up_under_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a graph serves all frames with as many keys."""
    model, classes = random_model(**LONG), draw_actions(12)
    sampling = SamplingConfig(10, 2, guidance=1.5, window_stride=2)
    plain = roll_out(model, latents(2), sampling, classes)
    monkeypatch.setattr(denoisers, "_KEY_BUCKET", {"cpu": 64})
    torch.testing.assert_close(roll_out(model, latents(2), sampling, classes), plain, rtol=0, atol=1e-5)


class NoHostReads(TorchDispatchMode):
    """Raises where the host reads a number from a tensor, which a graph's capture cannot do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [LONG, {"labels": 3}], ids=str)
def test_the_captured_passes_read_nothing_on_the_host(shape: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def run(denoiser: CachedDenoiser, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        passes.append(function.__name__)
        with NoHostReads():
            return function(*args)

    monkeypatch.setattr(CachedDenoiser, "_run", run)
    monkeypatch.setattr(denoisers, "_KEY_BUCKET", {"cpu": 64})
    session = Session(random_model(**shape), SamplingConfig(1, 2, guidance=1.5, window_stride=2), SIZE)
    for _ in range(8):
        session.step(torch.tensor([1]))
    denoised, appended = ["_denoise", "_denoise"], ["_append", "_denoise", "_denoise"]
    assert passes == denoised + 3 * appended + 2 * (denoised + appended)


def steps(session: Session, classes: Tensor | None, count: int) -> Tensor:
    """The next `count` frames, with the actions `[B, F]` of their index."""
    frames = []
    for _ in range(count):
        frames.append(session.step(None if classes is None else classes[:, session.frame]))
    return torch.stack(frames, 1)


@pytest.mark.parametrize("shape", [LONG, {"actions": 3}, {}], ids=str)
@pytest.mark.parametrize("given", [0, 3, 7])
def test_frames_are_those_of_predict_frames(shape: dict[str, int], given: int) -> None:
    model, classes = random_model(**shape), draw_actions(given + 8) if shape else None
    sampling = SamplingConfig(8, 2, guidance=1.5 if shape else 1.0, seed=3)
    session = Session(model, sampling, SIZE, clip_ids=(0, 1))
    session.start(latents(given), classes[:, :given] if classes is not None else None)
    assert torch.equal(steps(session, classes, 8), roll_out(model, latents(given), sampling, classes))
    assert session.frame == given + 8


@pytest.mark.parametrize("shape", [LONG, {"actions": 3}], ids=str)
def test_a_snapshot_brings_back_the_frames(shape: dict[str, int]) -> None:
    """Past the window and the context's limit, more than once, with other actions in between."""
    model, classes = random_model(**shape), draw_actions(30)
    session = Session(model, SamplingConfig(1, 2, window_stride=2, context_frames=3), SIZE, clip_ids=(0, 1))
    steps(session, classes, 9)
    snapshot = session.snapshot()
    expected = steps(session, classes, 8)
    for _ in range(2):
        session.restore(snapshot)
        assert session.frame == 9
        other = steps(session, (classes + 1) % 3, 6)
        assert not torch.allclose(other, expected[:, :6], atol=1e-3)
        session.restore(snapshot)
        assert torch.equal(steps(session, classes, 8), expected)


def test_settings_change_between_frames() -> None:
    model, classes = random_model(**LONG), draw_actions(12)
    session = Session(model, SamplingConfig(1, 3, guidance=1.5), SIZE, clip_ids=(0, 1))
    first = steps(session, classes, 5)
    session.sampling = replace(session.sampling, steps=1, grid="even", guidance=2.0)
    then = steps(session, classes, 1)
    again = roll_out(model, first, SamplingConfig(1, 1, guidance=2.0, grid="even"), classes[:, :6])
    torch.testing.assert_close(then, again, rtol=0, atol=1e-4)
    refused(
        lambda: setattr(session, "sampling", replace(session.sampling, guidance=1.0)), "from 2 to 1", "start another"
    )
    refused(lambda: setattr(session, "sampling", replace(session.sampling, window_stride=2)), "only steps, grid, seed")


def test_the_oldest_context_frames_are_dropped() -> None:
    """In a model of one layer, whose context keys depend on their own frame only, it is as if there had been no others.

    Frame 13 has the window from frame 10 on, and before it the context frames 6 to 9. Rotary positions are relative.
    """
    model, stride, limit = random_model(layers=1, **LONG), 2, 4
    history = [
        FinishedFrame(clean, clean, classes.repeat(2))
        for clean, classes in zip(latents(14, clips=1).unbind(1), draw_actions(14, clips=1).unbind(1), strict=True)
    ]
    schedule = Schedule(euler_sigmas(2), SamplingConfig(1, 2, guidance=1.5), CPU)

    def velocity(first: int, context_limit: int | None, begun: int) -> Tensor:
        """Of frame 13 after the frames from `first` on, of which the denoiser begins all from number `begun` on."""
        cache = MultiLevelCache(model.config, 2, SIZE, WINDOW, context_limit, CPU, torch.float32)
        denoiser = CachedDenoiser(model, schedule, 2, cache, SIZE, stride)
        for frame in range(begun, 14):
            denoiser.begin_frame(history[first:frame], frame - first, history[frame].classes)
        return denoiser.velocity(latents(1, clips=1)[:, 0], 0)

    with torch.no_grad():
        found = [velocity(0, limit, begun) for begun in (0, 13)]
        expected, other = velocity(6, None, 13), velocity(0, None, 13)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, other, atol=1e-3)


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    model, classes = random_model(**LONG), draw_actions(14)
    plain = roll_out(model, latents(4), SamplingConfig(10, 2), classes)
    limited = roll_out(model, latents(4), SamplingConfig(10, 2, context_frames=10), classes)
    none = roll_out(model, latents(4), SamplingConfig(10, 2, context_frames=0), classes)
    assert torch.equal(plain, limited)
    assert not torch.allclose(plain[:, -1], none[:, -1], atol=1e-3)


@pytest.mark.parametrize(("shape", "frames"), [(LONG, 2000), ({"actions": 3}, 300)], ids=str)
@pytest.mark.slow
def test_memory_stays_flat(shape: dict[str, int], frames: int) -> None:
    """As many tensors and bytes as after the first hundred frames."""
    session = Session(random_model(layers=1, **shape), SamplingConfig(1, 1, window_stride=2, context_frames=8), SIZE)

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if isinstance(x, Tensor)]
        return len(tensors), sum(x.untyped_storage().nbytes() for x in tensors)

    def walk(frames: int) -> None:
        for _ in range(frames):
            session.step(torch.tensor([session.frame % 3]))

    walk(100)
    before = held()
    walk(frames - 100)
    assert held() == before and session.frame == frames


def test_settings_that_do_not_fit_are_refused() -> None:
    model = random_model(**LONG)
    for settings, texts in (
        ({"window_stride": 0}, ("window_stride: 0", "from 1 to the model's window of 4")),
        ({"window_stride": 5}, ("window_stride: 5", "from 1 to the model's window of 4")),
        ({"context_frames": -1}, ("context_frames=-1", "0 or more")),
        ({"context_frames": 2, "use_cache": False}, ("context_frames=2", "needs the cache")),
    ):
        refused(lambda settings=settings: Session(model, SamplingConfig(1, 1, **settings), SIZE), *texts)
    session = Session(model, SamplingConfig(1, 1), SIZE)
    refused(lambda: session.step(), "actions: the model needs actions of shape [1]")
    refused(lambda: session.start(latents(2)), "[2, 2, 4, 4, 6]", "those of 1 clips")
    short = Session(random_model(), SamplingConfig(1, 1), SIZE, max_frames=2)
    steps(short, None, 2)
    refused(lambda: short.step(), "frame 2", "made for clips of 2 frames")
    video_dit = FAR(FARConfig(layers=1, heads=1, channels=4, window=4, causal=False))
    refused(lambda: Session(video_dit, SamplingConfig(1, 1), SIZE), "needs a causal model")


def test_the_even_grid_ends_at_zero_in_equal_steps() -> None:
    assert euler_sigmas(4, "even").tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert euler_sigmas(2)[1].item() == pytest.approx(0.001), "the official grid wastes its last step"
    with pytest.raises(UserError, match="window_stride"):
        SamplingConfig(1, 1, window_stride=9).check(random_model().config)
