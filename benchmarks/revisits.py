"""What a FAR-Long remembers: its error where the player comes back to a place, with its context and without.

    python benchmarks/revisits.py models/demo-maze --videos EPISODES

Held-out episodes of the demo world are cut at every 16th frame: the frames before the cut are given, the next 8 are
predicted from the actions, once as usual and once without coarse context, when the model sees its window only. Where
the player stood at each frame is found by the engine, which takes the recorded actions again. A predicted frame
*revisits* a place if a given frame was seen from there, and no frame of the window was; it is *new* if no earlier frame
was.

The ratio of both errors has a 95% bootstrap interval over clips: a draw takes the same clips of both sides.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import Row, environment, print_table, write_result
from numpy.typing import NDArray
from options import count
from revisits_plot import draw
from tqdm import tqdm

from far_scale.data.demo.explorer import TURN
from far_scale.data.demo.maze import CELL
from far_scale.data.demo.world import TURNS_OF_A_CIRCLE, DemoWorld
from far_scale.data.video.find import find_videos
from far_scale.data.video.videos import read_video
from far_scale.evaluation.metric_networks import LPIPS
from far_scale.evaluation.rollouts.episodes import EpisodeSelection, decode_frame, load_episodes
from far_scale.evaluation.rollouts.rollout import EPISODES_PER_BATCH, Rollout
from far_scale.evaluation.rollouts.runner import load_autoencoder, load_for_sampling
from far_scale.evaluation.rollouts.video_grid import to_uint8
from far_scale.evaluation.score_statistics import bootstrap_ratio
from far_scale.evaluation.weights import load_lpips
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.sampler import predict_frames
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError

DISTANCE = CELL / 8  # within which two poses are the same place, if they look the same way; a step is a fifth of a cell
GAPS = (9, 17, 33, 65, 129, 300)  # edges of the groups by how long ago a place was seen last

Poses = NDArray[np.float64]
"""x, y in map units and the angle in degrees of each frame, `[F, 3]`."""


class Side(NamedTuple):
    """The predicted frames of N clips: F of them, from all cuts.

    Attributes:
        lpips: `[N, F]` from the truth.
        repeated: `[N, F]`, of the last given frame from the truth.
        pixels: uint8 `[N, F, h, w, 3]`.
        truth: uint8 `[N, F, h, w, 3]`.
    """

    lpips: NDArray[np.float64]
    repeated: NDArray[np.float64]
    pixels: NDArray[np.uint8]
    truth: NDArray[np.uint8]


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="LPIPS at revisited places, with context and without.")
    parser.add_argument("model_dir", type=Path, help="model directory of a FAR-Long of the demo world")
    parser.add_argument("--videos", type=Path, required=True, help="held-out episodes of tools/record_demo.py")
    parser.add_argument("--episodes", type=count, default=32, help="default: %(default)s")
    parser.add_argument("--length", type=count, default=300, help="frames of each that are used (default: %(default)s)")
    parser.add_argument("--first", type=count, default=60, help="first cut (default: %(default)s)")
    parser.add_argument("--every", type=count, default=16, help="frames between cuts (default: %(default)s)")
    parser.add_argument("--frames", type=count, default=8, help="predicted at each cut (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=4, help="Euler steps, even grid (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="X.png", help="also draw the result")
    args = parser.parse_args()

    model, metadata = load_for_sampling(args.model_dir)
    if not model.config.context_patch:
        raise UserError(f"{args.model_dir}: a model without coarse context remembers nothing beyond its window")
    if args.length < args.first + args.frames:
        raise UserError(f"--length {args.length}: too short for the first cut at {args.first} and {args.frames} frames")
    cuts = range(args.first, args.length - args.frames + 1, args.every)
    files = find_videos(args.videos)[: args.episodes]
    poses = [_poses(file, args.length) for file in files]
    kinds = [[revisits(pose, cut, args.frames, model.config.window) for cut in cuts] for pose in poses]
    gaps = np.stack([np.concatenate([gap for gap, _ in clip]) for clip in kinds])
    new = np.stack([np.concatenate([is_new for _, is_new in clip]) for clip in kinds])

    sampling, lpips = SamplingConfig(args.frames, args.steps, grid="even"), load_lpips("alex")
    selection = EpisodeSelection(args.length - args.frames, args.frames, len(files), conditioned=True)
    autoencoder = load_autoencoder(metadata, next(model.parameters()).device)
    episodes = load_episodes(args.videos, model.config, metadata, autoencoder, selection)
    rollout = Rollout(model, metadata, autoencoder, episodes, sampling)
    remembering, forgetting = (
        _side(replace(rollout, sampling=settings), cuts, lpips)
        for settings in (sampling, replace(sampling, context_frames=0))
    )

    selections = {"revisited": gaps > 0, "new": new, "all": np.ones_like(new)}
    of_gaps = {
        f"last seen {low} to {high - 1} frames ago": (low <= gaps) & (gaps < high)
        for low, high in itertools.pairwise(GAPS)
    }
    rows = [
        comparison(name, chosen, remembering, forgetting)
        for name, chosen in (selections | of_gaps).items()
        if chosen.any()
    ]
    facts = environment(
        next(model.parameters()).device,
        {
            "model": args.model_dir.name,
            "given, predicted": f"{cuts[0]} to {cuts[-1]}, {args.frames}",
            "window": str(model.config.window),
            "steps": f"{args.steps} even",
            "same place": f"within {DISTANCE:g} map units (a cell has {CELL}), one of {TURNS_OF_A_CIRCLE} directions",
        },
    )
    title = "LPIPS of predicted frames, with coarse context and without"
    print_table(title, rows)
    print(f"\n{write_result(args.out, 'revisits', facts, {title: rows})}")
    if args.plot:
        draw(args.plot, rows[len(selections) :], gaps, remembering.truth, remembering.pixels, forgetting.pixels)


def poses_of(seed: int, actions: Sequence[int]) -> Poses:
    """Where the player of the maze of `seed` stands at each frame, when it takes these actions.

    Args:
        actions: that led to each frame; the first is not taken.
    """
    with DemoWorld.of_seed(seed) as world:
        poses = [world.variables[:3]]
        for action in actions[1:]:
            world.move(action)
            poses.append(world.variables[:3])
    return np.stack(poses)


def revisits(poses: Poses, given: int, frames: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What kind of place the `frames` frames after the `given` ones show.

    Returns:
        `[frames]`: how many frames ago a given frame last saw the place, 0 unless the frame revisits it; and whether no
        earlier frame saw it.
    """
    gaps, new = np.zeros(frames, np.int64), np.zeros(frames, bool)
    for number, frame in enumerate(range(given, given + frames)):
        earlier = poses[:frame] - poses[frame]
        turned = np.abs((earlier[:, 2] + 180) % 360 - 180)
        (same,) = np.nonzero((np.hypot(earlier[:, 0], earlier[:, 1]) <= DISTANCE) & (turned <= TURN / 2))
        new[number] = not len(same)
        if (before := same[same < given]).size and same[-1] < frame - window:
            gaps[number] = frame - before[-1]
    return gaps, new


def comparison(name: str, chosen: NDArray[np.bool_], remembering: Side, forgetting: Side) -> Row:
    """A row: mean LPIPS of the chosen frames, all of them `[N, F]`, and the ratio of both sides."""
    clips = chosen.any(1)
    sums = [np.where(chosen, side.lpips, 0).sum(1)[clips] for side in (remembering, forgetting)]
    interval = bootstrap_ratio(*sums) if len(sums[0]) > 1 else None
    return {
        "frames that show a place": name,
        "frames": int(chosen.sum()),
        "clips": int(clips.sum()),
        "with context": float(remembering.lpips[chosen].mean()),
        "without": float(forgetting.lpips[chosen].mean()),
        "ratio": float(sums[0].sum() / sums[1].sum()),
        "ratio from": None if interval is None else interval.low,
        "to": None if interval is None else interval.high,
        "last given frame": float(remembering.repeated[chosen].mean()),
    }


def _poses(file: Path, length: int) -> Poses:
    video = read_video(file)
    with np.load(file, allow_pickle=False) as arrays:
        if video.actions is None or "seed" not in arrays or len(video.frames) < length:
            raise UserError(
                f"{file}: needs actions, the maze's seed and {length} frames; record it by tools/record_demo.py "
                f"--frames {length}"
            )
        seed = int(arrays["seed"])
    return poses_of(seed, video.actions[:length].tolist())


def _side(rollout: Rollout, cuts: Sequence[int], lpips: LPIPS) -> Side:
    clips = len(rollout.episodes.keys)
    batches = [slice(first, min(first + EPISODES_PER_BATCH, clips)) for first in range(0, clips, EPISODES_PER_BATCH)]
    parts = [_batch(rollout, batch, cuts, lpips) for batch in tqdm(batches, desc="predict", unit="batch")]
    return Side(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _batch(rollout: Rollout, clips: slice, cuts: Sequence[int], lpips: LPIPS) -> Side:
    episodes, frames = rollout.episodes, rollout.sampling.frames
    assert episodes.actions is not None
    columns: list[tuple[NDArray[Any], ...]] = []
    for cut in cuts:
        predicted = predict_frames(
            rollout.model,
            episodes.context[clips, :cut],
            rollout.sampling,
            episodes.actions[clips, : cut + frames],
            clip_ids=range(len(episodes.keys))[clips],
        )
        last = episodes.truth.frame(clips, cut - 1)
        for index, latents in enumerate(predicted, start=cut):
            pixels = decode_frame(rollout.autoencoder, rollout.metadata.scaling.restore(latents)).clamp(0, 1)
            truth = episodes.truth.frame(clips, index)
            of_model, of_last = (lpips(each, truth).double().numpy() for each in (pixels, last))
            columns.append((of_model, of_last, to_uint8(pixels), to_uint8(truth)))
    return Side(*(np.stack(column, axis=1) for column in zip(*columns, strict=True)))


if __name__ == "__main__":
    main()
