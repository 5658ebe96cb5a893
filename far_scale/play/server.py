"""The web server: one page, and a WebSocket for each walk (`far_scale.play.messages`).

    GET /?token=...                            the page
    GET /static/NAME                           its style and script
    GET /walk?token=...                        the WebSocket
    GET /recordings/SESSION.json, .mp4         the recording of a walk that is open; the session's name is in "hello"

The event loop only passes messages on. The model runs in one thread, in which each walk has at most one job, so walks
take turns; engines are started and videos are written in other threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from aiohttp import WSCloseCode, WSMsgType, web

from far_scale.play.access import Access, RateLimit
from far_scale.play.messages import MAX_MESSAGE_BYTES, BadMessage, parse_message
from far_scale.play.outbox import Outbox
from far_scale.play.player import MAX_STEPS, Player, PlaySettings
from far_scale.play.recording import write_video
from far_scale.play.walk import Walk
from far_scale.play.world import World
from far_scale.utils.errors import UserError
from far_scale.utils.io import write_json

MESSAGES_PER_SECOND = 60.0
MESSAGE_BURST = 120.0
HEARTBEAT_SECONDS = 20.0  # a client that answers no ping for half of it is gone
CLOSE_SECONDS = 2.0
STATIC_TYPES = {"play.css": "text/css", "play.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class PlayServer:
    """Serves the page and its walks."""

    def __init__(self, world: World, settings: PlaySettings, access: Access, max_sessions: int) -> None:
        """
        Args:
            settings: what each walk begins with.
            max_sessions: maximum number of simultaneous walks; further clients are refused with a message.
        """
        self._world, self._settings, self._access, self._max_sessions = world, settings, access, max_sessions
        self._worker = ThreadPoolExecutor(1, "play-model", torch.set_num_threads, (world.threads,))
        self._players: dict[str, Player] = {}
        self._sockets: set[web.WebSocketResponse] = set()
        self._video_lock = asyncio.Lock()

    def application(self) -> web.Application:
        """The application; its clean-up ends the walks."""
        application = web.Application(middlewares=[self._check_access])
        application.router.add_get("/", self._page)
        application.router.add_get("/static/{name}", self._static)
        application.router.add_get("/walk", self._walk)
        application.router.add_get("/recordings/{session:[\\w-]+}.{kind:json|mp4}", self._recording)
        application.on_shutdown.append(self._close_sockets)
        application.on_cleanup.append(self._stop_worker)
        return application

    @property
    def sessions(self) -> int:
        """Walks that are open."""
        return len(self._players)

    @web.middleware
    async def _check_access(self, request: web.Request, handler: Any) -> web.StreamResponse:
        problem = self._access.problem(request, needs_token=not request.path.startswith("/static/"))
        if problem is not None:
            return web.Response(status=403, text=f"{problem}\n", headers=HEADERS)
        response: web.StreamResponse = await handler(request)
        return response

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(text=_static_text("index.html"), content_type="text/html", headers=HEADERS)

    async def _static(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in STATIC_TYPES:
            return web.Response(status=404, text="there is no such file\n", headers=HEADERS)
        return web.Response(text=_static_text(name), content_type=STATIC_TYPES[name], headers=HEADERS)

    async def _walk(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_SECONDS, max_msg_size=MAX_MESSAGE_BYTES, compress=False, timeout=CLOSE_SECONDS
        )
        if not socket.can_prepare(request):
            return web.Response(status=400, text="this address is the page's WebSocket\n", headers=HEADERS)
        await socket.prepare(request)
        if len(self._players) >= self._max_sessions:
            message = (
                f"all {self._max_sessions} sessions are in use; close another page of this server, or start it with a "
                "larger --sessions"
            )
            with contextlib.suppress(Exception):
                await asyncio.wait_for(socket.send_json({"type": "full", "message": message}), CLOSE_SECONDS)
            await _close(socket, WSCloseCode.TRY_AGAIN_LATER, "full")
            return socket
        session, outbox = secrets.token_urlsafe(16), Outbox()
        player = self._players[session] = Player(self._world, self._settings, self._worker, outbox)
        self._sockets.add(socket)
        try:
            outbox.put_text(self._hello(session))
            await self._serve(socket, player, outbox)
        finally:
            self._sockets.discard(socket)
            if request.transport is not None:
                request.transport.abort()
            try:
                await asyncio.shield(player.close())
            finally:
                del self._players[session]
        return socket

    async def _serve(self, socket: web.WebSocketResponse, player: Player, outbox: Outbox) -> None:
        """Run a walk until its client is gone or is sent away."""
        playing = asyncio.create_task(player.play())
        sending = asyncio.create_task(outbox.send_to(socket))
        reading = asyncio.create_task(_read(socket, player, outbox))
        tasks = (playing, sending, reading)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (playing, reading):
                task.cancel()
            results = await asyncio.gather(playing, reading, return_exceptions=True)
            error = next((result for result in results if isinstance(result, UserError)), None)
            if error is not None:
                outbox.put_text({"type": "error", "message": str(error)})
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, (UserError, ConnectionError)):
                    traceback.print_exception(result)
            outbox.finish()
            await asyncio.wait([sending], timeout=CLOSE_SECONDS)  # the reason, to a client that still reads
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await _close(socket, WSCloseCode.OK if error is None else WSCloseCode.INTERNAL_ERROR, "")

    def _hello(self, session: str) -> dict[str, Any]:
        """What the page must know of the model and of what walks start from."""
        world = self._world
        config = world.model.config
        return {
            "type": "hello",
            "session": session,
            "model": world.name,
            "condition": world.condition,
            "inputs": world.inputs,
            "is_demo": world.is_demo,
            "start": world.start,
            "engine": world.start == "maze",
            "note": _engine_note(world),
            "size": list(world.size),
            "window": config.window,
            "max_steps": MAX_STEPS,
            "guidance": bool(config.actions or config.labels),
        }

    async def _recording(self, request: web.Request) -> web.StreamResponse:
        player = self._players.get(request.match_info["session"])
        if player is None:
            return web.Response(status=404, text="this walk is over\n", headers=HEADERS)
        kind = request.match_info["kind"]
        try:
            with tempfile.TemporaryDirectory(prefix="far_scale-play-") as folder:
                path = Path(folder) / f"walk.{kind}"
                if kind == "json":
                    recording = await player.with_walk(Walk.recording)
                    await asyncio.to_thread(write_json, path, recording.model_dump())
                else:
                    pictures = await player.with_walk(Walk.pictures)
                    async with self._video_lock:
                        await asyncio.to_thread(write_video, path, pictures)
                body = await asyncio.to_thread(path.read_bytes)
        except UserError as error:
            return web.Response(status=409, text=f"{error}\n", headers=HEADERS)
        headers = {**HEADERS, "Content-Disposition": f'attachment; filename="walk.{kind}"'}
        content_type = "application/json" if kind == "json" else "video/mp4"
        return web.Response(body=body, content_type=content_type, headers=headers)

    async def _close_sockets(self, _: web.Application) -> None:
        await asyncio.gather(*(_close(socket, WSCloseCode.GOING_AWAY, "the server ends") for socket in self._sockets))

    async def _stop_worker(self, _: web.Application) -> None:
        await asyncio.to_thread(self._worker.shutdown)


async def _read(socket: web.WebSocketResponse, player: Player, outbox: Outbox) -> None:
    """Pass a client's messages on until it is gone, or sends too many."""
    loop, limit = asyncio.get_running_loop(), RateLimit(MESSAGES_PER_SECOND, MESSAGE_BURST)
    async for message in socket:
        if not limit.allows(loop.time()):
            raise UserError(f"more than {MESSAGES_PER_SECOND:.0f} messages a second; load the page again")
        try:
            if message.type is not WSMsgType.TEXT:
                raise BadMessage("not a message of this protocol: it must be text")
            player.receive(parse_message(message.data))
        except BadMessage as error:
            outbox.put_text({"type": "error", "message": str(error)})


async def _close(socket: web.WebSocketResponse, code: int, message: str) -> None:
    with contextlib.suppress(Exception):
        await asyncio.wait_for(socket.close(code=code, message=message.encode()), CLOSE_SECONDS)


def _engine_note(world: World) -> str:
    if world.start == "maze":
        return ""
    if not world.is_demo:
        return "the engine of this model's world is not part of far_scale"
    if world.episodes:
        return "no engine: the walk starts from recorded frames"
    return "no engine: vizdoom is not installed (pip install 'far_scale[demo]')"


def _static_text(name: str) -> str:
    return resources.files("far_scale.play").joinpath("static", name).read_text(encoding="utf-8")


async def serve(server: PlayServer, host: str, port: int, announce: Any) -> None:
    """Serve until cancelled.

    Args:
        port: 0 for any free one.
        announce: called with the port, once the page can be opened.

    Raises:
        UserError: the address cannot be used.
    """
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=CLOSE_SECONDS)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"--host {host} --port {port}: cannot be used ({reason}); name another --port") from None
        announce(runner.addresses[0][1])
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
