"""Time of sampling from nothing, frame after frame, both codes with their caches."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch
from measure import Row, interleaved, timed
from official import OfficialCode
from pairs import Clips, random_pair
from parity import largest, roll_out_noise

from far_scale.model import FARConfig
from far_scale.sampling.sampler import roll_out


def sample(
    code: OfficialCode,
    layers: int,
    heads: int,
    frame_counts: Sequence[int],
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    minutes: float,
) -> Iterator[dict[str, list[Row]]]:
    """The table of times, after each of its rows.

    FAR has a window of all frames here, since the official one looks back at all of them.
    """
    rows: list[Row] = []
    for frames in frame_counts:
        for name, window, context_patch in (("FAR", frames, 0), ("FAR-Long", 16, 4)):
            config = FARConfig(layers, heads, window=window, context_patch=context_patch, actions=4)
            rows.append(time_row(code, name, config, frames, steps, device, dtype, repeats, minutes))
            yield {f"Seconds of sampling, {steps} steps a frame, batch 1, both with cache, medians": rows}


def time_row(
    code: OfficialCode,
    name: str,
    config: FARConfig,
    frames: int,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    minutes: float,
) -> Row:
    """Both sides in turn, after two frames each that do not count."""
    pair = random_pair(code, config, device, dtype)
    pair.theirs.eval()
    pair.ours.eval()
    clips = Clips.random(config, 1, frames, device)
    none, noise = clips.latents[:, :0], roll_out_noise(1, 0, frames, clips.latents.shape[2:]).to(device)
    assert clips.actions is not None
    actions = clips.actions
    found = {}

    def official(count: int) -> None:
        conditions = {"action": actions[:, :count]}
        found["official"] = code.roll_out(pair.theirs, none, noise[:, :count], steps, conditions=conditions)

    def ours(count: int) -> None:
        found["ours"] = roll_out(pair.ours, none, count, steps, actions=actions[:, :count], seed=0, cache=True)

    official(min(2, frames))
    ours(min(2, frames))
    seconds = interleaved(
        {
            "official": lambda: {"seconds": timed(lambda: official(frames), device)},
            "ours": lambda: {"seconds": timed(lambda: ours(frames), device)},
        },
        repeats,
        minutes,
        f"{name}, {frames} frames",
    )
    theirs, own = (statistics.median(seconds[side]["seconds"]) for side in ("official", "ours"))
    return {
        "model": name,
        "frames": frames,
        "official": theirs,
        "ours": own,
        "ratio": theirs / own,
        "largest difference": largest(found["official"], found["ours"]),
        "repeats": len(seconds["ours"]["seconds"]),
        "seconds": seconds,
    }
