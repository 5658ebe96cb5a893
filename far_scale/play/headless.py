"""Walks without a browser: a list of actions, and recordings that are played again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from far_scale.data.demo.world import DemoWorld
from far_scale.play.recording import Recording, write_video
from far_scale.play.walk import MAX_RECORDED_FRAMES, Walk
from far_scale.play.world import StartKind, World
from far_scale.utils.errors import UserError
from far_scale.utils.io import write_json


def open_walk(world: World, seed: int, start: StartKind | None = None) -> Walk:
    """Begin a walk, with an engine where it starts in a maze.

    Raises:
        UserError: the engine cannot be started.
    """
    start = start or world.start
    return Walk(world, start, seed, start_engine(world, seed, start))


def start_engine(world: World, seed: int, start: StartKind) -> DemoWorld | None:
    """A game in the maze of `seed`, where a walk starts in one."""
    if start != "maze":
        return None
    if not world.is_demo:
        raise UserError("a walk that starts in a maze needs a model of the demo world; give that model")
    return DemoWorld.of_seed(seed)


def parse_actions(text: str, inputs: list[str]) -> list[int]:
    """Parse `ACTION[:COUNT],...`, such as `forward:8,left,3:2`, with actions by name or number.

    Raises:
        UserError: an unknown action, or a count that is not a number.
    """
    actions: list[int] = []
    for part in text.split(","):
        name, colon, count = part.strip().partition(":")
        number = inputs.index(name) if name in inputs else int(name) if name.isdecimal() else -1
        if not 0 <= number < len(inputs):
            known = ", ".join(inputs[:8]) + (", ..." if len(inputs) > 8 else "")
            raise UserError(f"--headless {text}: {name!r} is no action; this model has {known}")
        if colon and not (count.isdecimal() and 1 <= int(count) <= MAX_RECORDED_FRAMES):
            raise UserError(f"--headless {text}: {part.strip()!r}: the count must be from 1 to {MAX_RECORDED_FRAMES}")
        actions += [number] * (int(count) if colon else 1)
        if len(actions) > MAX_RECORDED_FRAMES:
            raise UserError(f"--headless {text}: more than {MAX_RECORDED_FRAMES} actions; give fewer")
    return actions


def play_actions(world: World, seed: int, actions: list[int], steps: int, guidance: float, out: Path) -> Recording:
    """Walk by a list of actions; writes the MP4 `out`, and the recording as JSON beside it.

    Raises:
        UserError: settings that do not fit the model, or a file that cannot be written.
    """
    recording = _render(open_walk(world, seed), [(action, steps, guidance) for action in actions], out)
    write_json(out.with_suffix(".json"), recording.model_dump())
    return recording


def replay(world: World, recording: Recording, out: Path) -> Recording:
    """Make the frames of a recording again and write them as an MP4; returns the new recording.

    Raises:
        UserError: the recording is of other weights, or of given frames that are not at hand.
    """
    if recording.weights != world.weights:
        raise UserError(
            f"the recording is of weights {recording.weights[:12]}, and the model's are {world.weights[:12]}; give "
            "the model that it was made with"
        )
    if recording.actions and max(recording.actions) >= len(world.inputs):
        raise UserError(f"the recording has action {max(recording.actions)}, and the model {len(world.inputs)} of them")
    if recording.start == "recorded" and not world.episodes:
        raise UserError("the walk starts from recorded frames; name the same ones by --start")
    walk = open_walk(world, recording.seed, recording.start)
    if walk.recording().given_sha256 != recording.given_sha256:
        walk.close()
        raise UserError(
            "the given frames are not those of the recording; name the same ones by --start, on the same machine"
        )
    return _render(walk, recording.inputs(), out)


def _render(walk: Walk, inputs: Iterable[tuple[int, int, float]], out: Path) -> Recording:
    try:
        for action, steps, guidance in tqdm(list(inputs), desc="walk", unit="frame"):
            walk.act(action, steps, guidance)
        write_video(out, walk.pictures())
        return walk.recording()
    finally:
        walk.close()
