"""The recording of a walk: a JSON file from which its frames can be made again, and an MP4 of them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, ValidationError

import far_scale
from far_scale.data.shards.records import Count, Positive
from far_scale.data.video.videos import write_mp4
from far_scale.evaluation.rollouts.video_grid import GridSpec, VideoGrid
from far_scale.play.world import Pixels, StartKind
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_text
from far_scale.utils.rng import MAX_SEED
from far_scale.utils.strict_model import Digest, StrictModel, first_problem

FORMAT: Final = "far_scale.play/1"


class RecordedFrame(NamedTuple):
    """A frame of a walk: what it was made by, its PNG files, and the SHA-256 of all frames of the model up to it."""

    action: int
    steps: int
    guidance: float
    dream: bytes
    engine: bytes | None
    chain: str


class Settings(StrictModel):
    """Euler steps and guidance of the frames from action number `first` on."""

    first: Count
    steps: Positive
    guidance: float


class Recording(StrictModel):
    """What a walk's frames are made from.

    Attributes:
        far_scale: the version that made it.
        weights: SHA-256 of the model's weights.
        threads, device: of the computation; others round differently.
        seed: of the noise and, for the start "maze", of the maze.
        start: what the walk starts from.
        given, given_sha256: number and SHA-256 of the given frames.
        actions: one a frame: an action, a label, or 0 for a model without conditions.
        settings: where steps or guidance changed.
        frames_sha256: of the model's frames, each chained to the one before; empty without frames.
    """

    format: Literal["far_scale.play/1"] = FORMAT
    far_scale: str
    weights: Digest
    threads: Positive
    device: str
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    start: StartKind
    given: Count
    given_sha256: Digest | None
    actions: list[Count]
    settings: list[Settings]
    frames_sha256: str

    @staticmethod
    def of(
        frames: Sequence[RecordedFrame],
        *,
        weights: str,
        threads: int,
        device: str,
        seed: int,
        start: StartKind,
        given: int,
        given_sha256: str | None,
    ) -> Recording:
        """The recording of these frames."""
        changes: list[Settings] = []
        for number, frame in enumerate(frames):
            if not changes or (changes[-1].steps, changes[-1].guidance) != (frame.steps, frame.guidance):
                changes.append(Settings(first=number, steps=frame.steps, guidance=frame.guidance))
        return Recording(
            far_scale=far_scale.__version__,
            weights=weights,
            threads=threads,
            device=device,
            seed=seed,
            start=start,
            given=given,
            given_sha256=given_sha256,
            actions=[frame.action for frame in frames],
            settings=changes,
            frames_sha256=frames[-1].chain if frames else "",
        )

    def inputs(self) -> Iterator[tuple[int, int, float]]:
        """Action, steps and guidance of each frame."""
        changes = {change.first: change for change in self.settings}
        current = self.settings[0] if self.settings else None
        for number, action in enumerate(self.actions):
            current = changes.get(number, current)
            assert current is not None  # checked when it was read
            yield action, current.steps, current.guidance


def read_recording(path: Path) -> Recording:
    """Read a recording's JSON file.

    Raises:
        UserError: it is missing or no recording.
    """
    try:
        recording = Recording.model_validate_json(read_text(path, "recording of a walk"))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; give a JSON file that far-scale play has saved") from None
    if recording.actions and (not recording.settings or recording.settings[0].first):
        raise UserError(f"{path}: settings: the first must have first = 0; give a file that far-scale play has saved")
    return recording


class Pictures(NamedTuple):
    """The frames of a walk's video.

    Attributes:
        frames: of the model and of the engine, as pixels or PNG files; the given ones first.
        given: number of given frames.
        window: of the model.
        size: height and width in pixels.
        fps: frames a second.
    """

    frames: Sequence[tuple[Pixels | bytes, Pixels | bytes | None]]
    given: int
    window: int
    size: tuple[int, int]
    fps: float


def write_video(path: Path, pictures: Pictures) -> None:
    """Write the frames as an MP4, those of the engine above those of the model.

    Raises:
        UserError: there are no frames, or the file cannot be written.
    """
    frames, given, window, size, fps = pictures
    has_engine = any(engine is not None for _, engine in frames)
    grid = VideoGrid(GridSpec(1, len(frames), given, window, size, truth=has_engine))

    def draw() -> Iterator[Pixels]:
        for index, (dream, engine) in enumerate(frames):
            yield grid.picture(index, None if engine is None else _pixels(engine)[None], _pixels(dream)[None])

    write_mp4(path, draw(), fps)


def _pixels(picture: Pixels | bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(picture))) if isinstance(picture, bytes) else picture
