"""One client's walk on the event loop: keys in, frames out, one job at a time in the model's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from far_scale.play.headless import start_engine
from far_scale.play.messages import BadMessage, Command, Message, Press, Release, Run, frame_message
from far_scale.play.outbox import Outbox
from far_scale.play.walk import ShownFrame, Walk
from far_scale.play.world import World
from far_scale.utils.errors import UserError
from far_scale.utils.rng import MAX_SEED

MAX_WAITING = 4  # presses and commands that wait for their turn; more are dropped
MAX_STEPS = 100  # Euler steps that a client may ask for, so that others are not kept waiting
FPS_FRAMES = 16  # over which frames a second are averaged

Result = TypeVar("Result")


@dataclass(frozen=True)
class PlaySettings:
    """What a walk begins with."""

    seed: int
    steps: int
    guidance: float


class Player:
    """Plays one walk.

    Frames are made while a key is held or waits, or while the walk runs, at most `World.fps` a second. A press counts
    once even if the key is up again before its frame begins.
    """

    def __init__(self, world: World, settings: PlaySettings, worker: ThreadPoolExecutor, outbox: Outbox) -> None:
        """
        Args:
            worker: the model's thread. A player waits there with one job at most, so that walks take turns.
            outbox: where frames and messages go.
        """
        self._world, self._worker, self._outbox = world, worker, outbox
        self._seed, self._steps, self._guidance = settings.seed, settings.steps, settings.guidance
        self._walk: Walk | None = None
        self._opening: asyncio.Task[Walk] | None = None
        self._running = False
        self._held: list[int] = []  # the newest last
        self._pressed: deque[int] = deque()
        self._commands: deque[str] = deque()
        self._idle_input = 0
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()  # of the walk: frames, and pictures for a video
        self._times: deque[float] = deque(maxlen=FPS_FRAMES)
        self._reported: str | None = None

    def receive(self, message: Message) -> None:
        """Take a message of the client.

        Raises:
            BadMessage: its values do not fit the model.
        """
        if isinstance(message, Press):
            self._check_input(message.action)
            if message.action not in self._held:
                self._held.append(message.action)
                if len(self._pressed) < MAX_WAITING:
                    self._pressed.append(message.action)
        elif isinstance(message, Release):
            kept = [] if message.action is None else [held for held in self._held if held != message.action]
            self._held = kept
        elif isinstance(message, Command):
            if len(self._commands) < MAX_WAITING:
                self._commands.append(message.type)
        elif isinstance(message, Run):
            self._running = message.on
            self.send_state()
        else:
            self._set(message.steps, message.guidance)
        self._wake.set()

    def send_state(self) -> None:
        """Tell the client the seed and the settings."""
        self._outbox.put_text(
            {
                "type": "state",
                "seed": self._seed,
                "run": self._running,
                "steps": self._steps,
                "guidance": self._guidance,
                "idle": self._idle_input,
            }
        )

    async def play(self) -> None:
        """Play until cancelled.

        Raises:
            UserError: the walk cannot be begun.
        """
        loop, next_frame = asyncio.get_running_loop(), 0.0
        await self._open(self._seed)
        while True:
            if self._commands:
                await self._command(self._commands.popleft())
                self._times.clear()
                continue
            if not (self._pressed or self._held or self._running):
                self._times.clear()
                self._wake.clear()
                await self._wake.wait()
                continue
            if (early := next_frame - loop.time()) > 0:
                # A key that is released meanwhile still counts: its press waits.
                await asyncio.sleep(early)
                if self._commands:
                    continue
            action = self._next_input()
            if action is None:
                continue
            next_frame = max(loop.time(), next_frame) + 1 / self._world.fps
            await self._act(action)

    async def close(self) -> None:
        """Free the walk, after its job has ended."""
        if (opening := self._opening) is not None:  # cancelled while it began a walk
            self._opening = None
            with contextlib.suppress(Exception):
                await self._in_worker((await opening).close)
        await self._close_walk()

    async def with_walk(self, function: Callable[[Walk], Result]) -> Result:
        """Call `function` with the walk, in the model's thread, between frames.

        Raises:
            UserError: the walk is not open.
        """
        async with self._lock:
            if (walk := self._walk) is None:
                raise UserError("the walk has not begun or is over; load the page again")
            result: Result = await self._in_worker(function, walk)
            return result

    def _check_input(self, action: int) -> None:
        if action >= len(self._world.inputs):
            raise BadMessage(f"action {action}: this model has 0 to {len(self._world.inputs) - 1}")

    def _set(self, steps: int | None, guidance: float | None) -> None:
        steps = self._steps if steps is None else steps
        guidance = self._guidance if guidance is None else guidance
        if steps > MAX_STEPS:
            raise BadMessage(f"steps {steps}: at most {MAX_STEPS} are possible here")
        try:
            self._world.sampling(self._seed, steps, guidance)
        except UserError as error:
            raise BadMessage(str(error)) from None
        self._steps, self._guidance = steps, guidance
        self.send_state()

    def _next_input(self) -> int | None:
        """The oldest waiting press, else the newest key that is held, else the idle input of a walk that runs."""
        if self._pressed:
            action = self._pressed.popleft()
        elif self._held:
            action = self._held[-1]
        elif self._running:
            action = self._idle_input
        else:
            return None
        if self._world.condition == "labels":
            self._idle_input = action
        return action

    async def _open(self, seed: int) -> None:
        """Begin the walk of `seed`, in the place of the present one.

        Raises:
            UserError: it cannot be begun; the present one goes on.
        """
        self._opening = asyncio.create_task(self._make_walk(seed))
        try:
            walk = await asyncio.shield(self._opening)  # cancelled, it is left to `close`
        except UserError:
            self._opening = None
            raise
        await self._close_walk()
        self._walk, self._seed, self._opening = walk, seed, None
        if self._world.condition == "labels":
            self._idle_input = walk.last_class  # of the given frames
        self.send_state()
        await self._run_walk(Walk.now)

    async def _make_walk(self, seed: int) -> Walk:
        # An engine takes a second to start, and so not in the model's thread.
        world, start = self._world, self._world.start
        engine = await asyncio.to_thread(start_engine, world, seed, start)
        try:
            walk: Walk = await self._in_worker(Walk, world, start, seed, engine)
        except BaseException:
            if engine is not None:
                engine.close()
            raise
        return walk

    async def _close_walk(self) -> None:
        if (walk := self._walk) is not None:
            self._walk = None
            await asyncio.shield(self._in_worker(walk.close))  # cancelled before its turn, it would not be closed

    async def _command(self, name: str) -> None:
        self._pressed.clear()
        if name == "new":
            try:
                await self._open((self._seed + 1) % (MAX_SEED + 1))
            except UserError as error:
                self._outbox.put_text({"type": "error", "message": str(error)})
        elif name == "back":
            self._running = False
            self.send_state()
            await self._run_walk(Walk.back)
        else:
            await self._run_walk(Walk.reset)

    async def _act(self, action: int) -> None:
        steps, guidance = self._steps, self._guidance
        await self._run_walk(lambda walk: walk.act(action, steps, guidance), counts=True)

    async def _run_walk(self, job: Callable[[Walk], ShownFrame], counts: bool = False) -> None:
        """Do a job of the walk and send the frame that it returns."""
        try:
            frame = await self.with_walk(job)
        except UserError as error:
            self._running, self._held = False, []
            self._pressed.clear()
            self._outbox.put_text({"type": "error", "message": str(error)})
            self.send_state()
            return
        if counts:
            self._times.append(asyncio.get_running_loop().time())
        seconds = self._times[-1] - self._times[0] if self._times else 0.0
        fps = (len(self._times) - 1) / seconds if seconds > 0 else 0.0
        self._outbox.put_frame(frame_message(frame, fps, self._seed))
        problem = None if self._walk is None else self._walk.engine_problem
        if problem is not None and problem != self._reported:
            self._outbox.put_text({"type": "error", "message": problem})
        self._reported = problem

    def _in_worker(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)
