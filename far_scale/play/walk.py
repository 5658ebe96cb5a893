"""One walk: an input makes a frame of the model and, in the demo world, one of the real engine."""

from __future__ import annotations

import hashlib
import io
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from far_scale.data.demo.explorer import LEFT
from far_scale.data.demo.world import TURNS_OF_A_CIRCLE, DemoWorld
from far_scale.play.recording import Pictures, RecordedFrame, Recording
from far_scale.play.world import Given, Pixels, StartKind, World
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.session import Session, Snapshot
from far_scale.utils.errors import UserError

MAX_STEPS_BACK = 64
HISTORY_BYTES = 256 * 2**20  # of the snapshots of one walk
MAX_KEPT_FRAMES = 1_024  # latents, to which a walk goes back when guidance begins or ends
MAX_RECORDED_FRAMES = 5_000  # of one walk; later frames are shown and not recorded


@dataclass(frozen=True)
class ShownFrame:
    """A frame as it is shown.

    Attributes:
        index: in the clip, given frames included.
        dream, engine: PNG files; None where there is none.
        model_ms, decoder_ms, engine_ms: milliseconds that it took; 0 for a frame that is shown again.
        cache_bytes: of the session.
        recorded: frames in the recording.
        steps_back: how many steps back are possible.
    """

    index: int
    dream: bytes | None
    engine: bytes | None
    model_ms: float
    decoder_ms: float
    engine_ms: float
    cache_bytes: int
    recorded: int
    steps_back: int


class Walk:
    """A walk through a world; it runs in one thread at a time.

    Attributes:
        seed: of the noise and, where the walk starts in a maze, of the maze.
        engine_problem: why the engine no longer runs, or None.
    """

    def __init__(self, world: World, start: StartKind, seed: int, engine: DemoWorld | None) -> None:
        """
        Args:
            start: what it starts from.
            engine: a game in the maze of `seed`, for `start` "maze"; the walk closes it.
        """
        self.seed = seed
        self.engine_problem: str | None = None
        self._world, self._start, self._engine = world, start, engine
        self._given: Given | None = None
        self._given_frames: list[tuple[Pixels, Pixels | None]] | None = None
        self.reset()

    def reset(self) -> ShownFrame:
        """Go back to the start, with an empty recording; returns the last given frame."""
        world = self._world
        # A maze's given frames are made once; afterwards its engine stands where the walk begins.
        self._engine_is_behind = self._given is not None
        if self._given is None:
            self._given = world.given(self._start, self.seed, self._engine)
        given = self._given
        self._frames: deque[tuple[Tensor, int]] = deque(maxlen=MAX_KEPT_FRAMES)  # latents [C, H, W] and class
        if given is not None:
            classes = [0] * given.latents.shape[1] if given.classes is None else given.classes[0].tolist()
            self._frames.extend(zip(given.latents[0], classes, strict=True))
        self._index = (0 if given is None else given.latents.shape[1]) - 1
        self._session = self._new_session(world.sampling(self.seed, steps=1, guidance=1.0))
        self._history: deque[tuple[Session, Snapshot]] = deque()
        self._recorded: list[RecordedFrame] = []
        self._actions: list[int] = []
        self._shown: deque[tuple[bytes | None, bytes | None]] = deque(maxlen=MAX_STEPS_BACK + 1)
        dream = None if given is None else to_png(world.decode(given.latents[0, -1:])[0])
        self._shown.append((dream, None if given is None or given.engine is None else to_png(given.engine[-1])))
        return self._show()

    @property
    def last_class(self) -> int:
        """The action or label of the newest frame; 0 without frames."""
        return self._frames[-1][1] if self._frames else 0

    def now(self) -> ShownFrame:
        """The newest frame, again."""
        return self._show()

    def act(self, action: int, steps: int, guidance: float) -> ShownFrame:
        """Make the next frame.

        Args:
            action: the action, or the label; not read by a model without conditions.
            steps: Euler steps.
            guidance: as `SamplingConfig.guidance`.

        Raises:
            UserError: settings that do not fit the model, or a frame that is not finite; the walk is as before.
        """
        world, session = self._world, self._session
        sampling = world.sampling(self.seed, steps, guidance)
        before = session.snapshot()
        started = time.perf_counter()
        try:
            if sampling != session.sampling:
                if guidance == session.sampling.guidance or min(guidance, session.sampling.guidance) > 1:
                    session.sampling = sampling
                else:  # the cache of the other guidance has other rows
                    session = self._new_session(sampling)
            classes = None if world.condition == "none" else torch.tensor([action])
            latents = session.step(classes).cpu()
        except UserError:
            self._session.restore(before)
            raise
        decoding = time.perf_counter()
        pixels = world.decode(latents)[0]
        moving = time.perf_counter()
        self._actions.append(action)
        engine = self._move_engine()
        done = time.perf_counter()
        dream_png, engine_png = to_png(pixels), None if engine is None else to_png(engine)
        self._history.append((self._session, before))
        self._session = session
        self._frames.append((latents[0], action))
        self._index += 1
        while len(self._history) > max(1, min(MAX_STEPS_BACK, HISTORY_BYTES // max(1, session.cache_bytes))):
            self._history.popleft()
        if len(self._recorded) == len(self._actions) - 1 < MAX_RECORDED_FRAMES:
            chain = hashlib.sha256(self._digest.encode() + pixels.tobytes()).hexdigest()
            self._recorded.append(RecordedFrame(action, steps, guidance, dream_png, engine_png, chain))
        self._shown.append((dream_png, engine_png))
        return self._show(decoding - started, moving - decoding, done - moving)

    def back(self) -> ShownFrame:
        """Undo the last frame; without one that can be undone nothing changes."""
        if self._history:
            self._session, before = self._history.pop()
            self._session.restore(before)
            self._frames.pop()
            self._index -= 1
            if len(self._recorded) == len(self._actions):
                self._recorded.pop()
            self._actions.pop()
            self._shown.pop()
            self._engine_is_behind = True
        return self._show()

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def recording(self) -> Recording:
        """What is needed to make the recorded frames again."""
        world, given = self._world, self._given
        return Recording.of(
            self._recorded,
            weights=world.weights,
            threads=world.threads,
            device=world.model.patch_embedding.weight.device.type,
            seed=self.seed,
            start=self._start,
            given=0 if given is None else given.latents.shape[1],
            given_sha256=given_digest(given),
        )

    def pictures(self) -> Pictures:
        """The given and the recorded frames."""
        if self._given_frames is None:
            self._given_frames = []
            if self._given is not None:
                dreams = self._world.decode(self._given.latents[0])
                engine = self._given.engine
                self._given_frames = [(d, None if engine is None else engine[i]) for i, d in enumerate(dreams)]
        recorded = [(frame.dream, frame.engine) for frame in self._recorded]
        window = self._world.model.config.window
        return Pictures(
            [*self._given_frames, *recorded], len(self._given_frames), window, self._world.size, self._world.fps
        )

    def _new_session(self, sampling: SamplingConfig) -> Session:
        """A session that goes on after the present frames."""
        world = self._world
        session = Session(world.model, sampling, world.latent_size)
        if self._frames:
            latents, classes = zip(*self._frames, strict=True)
            given_classes = None if world.condition == "none" else torch.tensor(classes)[None]
            session.start(torch.stack(latents)[None], given_classes)
        return session

    @property
    def _digest(self) -> str:
        return self._recorded[-1].chain if self._recorded else ""

    def _move_engine(self) -> Pixels | None:
        """Move the engine by the last action; None where there is no engine, or it has failed."""
        if self._engine is None:
            return None
        try:
            if not self._engine_is_behind:
                return self._engine.step(self._actions[-1])
            # The engine cannot undo: it walks all the way again, which shows the same.
            self._engine.restart()
            for action in [LEFT] * TURNS_OF_A_CIRCLE + self._actions[:-1]:
                self._engine.move(action)
            frame = self._engine.step(self._actions[-1])
            self._engine_is_behind = False
            return frame
        except Exception as error:  # vizdoom's errors have no common class; the walk goes on without it
            self.engine_problem = f"the engine ended ({type(error).__name__}); take a new maze to start it again"
            self.close()
            return None

    def _show(self, model: float = 0.0, decoder: float = 0.0, engine: float = 0.0) -> ShownFrame:
        dream, engine_png = self._shown[-1]
        return ShownFrame(
            self._index,
            dream,
            engine_png,
            1e3 * model,
            1e3 * decoder,
            1e3 * engine,
            self._session.cache_bytes,
            len(self._recorded),
            len(self._history),
        )


def given_digest(given: Given | None) -> str | None:
    """The SHA-256 of the given latents and classes."""
    if given is None:
        return None
    digest = hashlib.sha256(np.ascontiguousarray(given.latents.float().numpy()).tobytes())
    if given.classes is not None:
        digest.update(np.ascontiguousarray(given.classes.numpy()).tobytes())
    return digest.hexdigest()


def to_png(pixels: Pixels) -> bytes:
    """Pixels `[h, w, 3]` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()
