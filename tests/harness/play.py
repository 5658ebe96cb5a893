"""A small world of random weights, its server, and a client of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import torch
from aiohttp.test_utils import TestClient, TestServer

import far_scale.autoencoder
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata
from far_scale.data.demo.explorer import FORWARD, LEFT, RIGHT
from far_scale.data.demo.world import TURNS_OF_A_CIRCLE
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.model import FAR, FARConfig
from far_scale.play.access import Access
from far_scale.play.player import PlaySettings
from far_scale.play.server import PlayServer
from far_scale.play.world import World

SETTINGS = PlaySettings(seed=3, steps=1, guidance=1.0)
WAIT = 20.0  # seconds, for what should come at once


def random_state(config: FARConfig) -> dict[str, torch.Tensor]:
    """Random weights; a fresh model's velocity would be zero."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(x.shape, generator=draw) * 0.1 for name, x in FAR(config).state_dict().items()}


def small_config(**values: Any) -> FARConfig:
    return FARConfig(layers=1, heads=1, patch=2, window=4, **values)


def metadata_of(side: int, fps: float = 50.0) -> ModelMetadata:
    """Of a model on latents of side x side; other sides than 8 are not the demo's."""
    autoencoder = far_scale.autoencoder.load("compact-vizdoom-f8c32")
    return ModelMetadata(
        autoencoder=AutoencoderInfo(
            name=autoencoder.name, weight_hash=autoencoder.weight_hash, scaling_factor=autoencoder.scaling_factor
        ),
        scaling=LatentScaling((0.0,) * 32, (1.0,) * 32),
        latent_shape=(32, side, side),
        fps=fps,
        training=TrainingMetadata(step=1, recipe_hash="r", weights="ema", far_scale="0"),
    )


def small_world(side: int = 4, has_engine: bool = False, fps: float = 50.0, **values: Any) -> World:
    """A world of frames of 8 x side pixels; `values` are of the model, by action unless they say otherwise."""
    config = small_config(**(values or {"actions": 4}))
    model = FAR(config)
    model.load_state_dict(random_state(config))
    autoencoder = far_scale.autoencoder.load("compact-vizdoom-f8c32")
    return World("small", model.eval(), metadata_of(side, fps), autoencoder, "0" * 64, (), has_engine, threads=1)


class FakeEngine:
    """In the place of the game: a frame shows how far the player has come, and what he has turned."""

    def __init__(self) -> None:
        self.fails = self.is_closed = False
        self.restart()

    def restart(self) -> None:
        self.steps, self.angle = 0, 0

    def move(self, action: int) -> None:
        if self.fails:
            raise RuntimeError("the game has ended")
        self.steps += action == FORWARD
        self.angle = (self.angle + {LEFT: 1, RIGHT: -1}.get(action, 0)) % TURNS_OF_A_CIRCLE

    def frame(self) -> np.ndarray:
        return np.full((64, 64, 3), (self.steps, self.angle, 0), np.uint8)

    def step(self, action: int) -> np.ndarray:
        self.move(action)
        return self.frame()

    def close(self) -> None:
        self.is_closed = True


def text_frame(text: str) -> bytes:
    """A short text as a client's WebSocket frame, with a mask of zeros."""
    assert len(text) < 126
    return bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text.encode()


class Page:
    """A client as the page is one; frames and texts are kept in the order in which they come."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.texts: list[dict[str, Any]] = []

    async def send(self, **message: Any) -> None:
        await self.socket.send_json(message)

    def tap(self, action: int) -> None:
        """A key that is up again at once: both messages come in one piece, so no frame begins between them."""
        self.write(*(text_frame(json.dumps({"type": kind, "action": action})) for kind in ("press", "release")))

    def write(self, *data: bytes) -> None:
        """Bytes on the connection, as they are."""
        self.transport.write(b"".join(data))

    @property
    def transport(self) -> asyncio.Transport:
        connection = self.socket._response.connection
        assert connection is not None and isinstance(connection.transport, asyncio.Transport)
        return connection.transport

    async def frame(self) -> tuple[dict[str, Any], bytes]:
        """The next frame: header, and the model's picture."""
        while True:
            message = await self.socket.receive(WAIT)
            if message.type is aiohttp.WSMsgType.BINARY:
                length = int.from_bytes(message.data[:4], "little")
                header = json.loads(message.data[4 : 4 + length])
                return header, message.data[4 + length :][: header["pictures"][0]]
            assert message.type is aiohttp.WSMsgType.TEXT, message
            self.texts.append(json.loads(message.data))

    async def text(self, kind: str) -> dict[str, Any]:
        """The next text of this type."""
        while True:
            for number, text in enumerate(self.texts):
                if text["type"] == kind:
                    return self.texts.pop(number)
            message = await self.socket.receive(WAIT)
            assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), (message, self.texts)
            if message.type is aiohttp.WSMsgType.TEXT:
                self.texts.append(json.loads(message.data))

    async def walk(self, *actions: int) -> list[bytes]:
        """Tap one action after the other; returns the model's pictures."""
        pictures = []
        for action in actions:
            self.tap(action)
            pictures.append((await self.frame())[1])
        return pictures


class Serving:
    """A running server; `page` opens a walk."""

    def __init__(self, server: PlayServer, client: TestClient[Any, Any]) -> None:
        self.server, self.client = server, client

    async def page(self, **keywords: Any) -> Page:
        """A client that has got its first frame."""
        page = Page(await self.client.ws_connect("/walk", **keywords))
        await page.frame()
        return page

    async def until_sessions(self, count: int) -> None:
        """Wait until so many walks are open."""
        for _ in range(int(WAIT / 0.02)):
            if self.server.sessions == count:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{self.server.sessions} sessions are open, not {count}")


@asynccontextmanager
async def serving(world: World, max_sessions: int = 2, token: str | None = None) -> AsyncIterator[Serving]:
    server = PlayServer(world, SETTINGS, Access("127.0.0.1", token), max_sessions)
    async with TestClient(TestServer(server.application())) as client:
        yield Serving(server, client)
