"""What waits to be sent to one client: few texts, and of the frames only the newest."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from typing import Any

from aiohttp import web

MAX_TEXTS = 32  # a client for which more wait has stopped reading
SEND_SECONDS = 10.0  # for one message to a client
CHECK_SECONDS = 5.0


class SlowClient(Exception):
    """A client does not read what is sent to it."""


class Outbox:
    """Bounded: putting never waits. A frame that has not been sent is replaced by the next."""

    def __init__(self) -> None:
        self._texts: deque[str] = deque(maxlen=MAX_TEXTS)
        self._frame: bytes | None = None
        self._filled = asyncio.Event()
        self._is_last = False

    def put_text(self, message: dict[str, Any]) -> None:
        """Put a JSON message; where too many wait, the oldest is dropped."""
        self._texts.append(json.dumps(message))
        self._filled.set()

    def put_frame(self, message: bytes) -> None:
        """Put a frame, in the place of one that still waits."""
        self._frame = message
        self._filled.set()

    def finish(self) -> None:
        """Let `send_to` return once everything is sent."""
        self._is_last = True
        self._filled.set()

    async def send_to(self, socket: web.WebSocketResponse) -> None:
        """Send what is put, until `finish` or until the socket is closed.

        Raises:
            SlowClient: a message was not taken in time.
        """
        while not (socket.closed or (self._is_last and not self._texts and self._frame is None)):
            with contextlib.suppress(asyncio.TimeoutError):  # to notice a socket that has been closed
                await asyncio.wait_for(self._filled.wait(), CHECK_SECONDS)
            self._filled.clear()
            while self._texts or self._frame is not None:
                try:
                    await asyncio.wait_for(self._send_next(socket), SEND_SECONDS)
                except asyncio.TimeoutError:
                    raise SlowClient from None

    async def _send_next(self, socket: web.WebSocketResponse) -> None:
        if self._texts:
            await socket.send_str(self._texts.popleft())
        elif self._frame is not None:
            frame, self._frame = self._frame, None
            await socket.send_bytes(frame)
