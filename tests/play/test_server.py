"""The server of `far-scale play`, by WebSocket clients in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import socket
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import pytest
import torch

from far_scale.play import outbox, player, server
from far_scale.play.headless import replay
from far_scale.play.recording import read_recording
from far_scale.play.walk import Walk
from far_scale.play.world import Given, World
from far_scale.utils.errors import UserError
from harness.play import SETTINGS, FakeEngine, Page, Serving, serving, small_world, text_frame


@pytest.fixture(scope="module")
def world() -> World:
    return small_world()


@pytest.fixture(autouse=True)
def no_traceback(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Any:
    """Whatever clients do, the server has no exception to show."""
    yield
    output = capfd.readouterr()
    assert "Traceback" not in output.out + output.err and "Exception" not in output.err, output.err
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def expected_pictures(world: World, *inputs: tuple[int, int, float]) -> list[bytes]:
    """The model's pictures of a walk without a server."""
    walk = Walk(world, "nothing", SETTINGS.seed, None)
    return [walk.act(*values).dream or b"" for values in inputs]


def test_hello_says_what_the_page_must_know(world: World) -> None:
    async def test() -> None:
        async with serving(world) as play:
            page = Page(await play.client.ws_connect("/walk"))
            hello, state = await page.text("hello"), await page.text("state")
            assert hello["inputs"] == ["0", "1", "2", "3"] and hello["condition"] == "actions"
            assert (hello["size"], hello["engine"], hello["is_demo"]) == ([32, 32], False, False)
            assert "not part of far_scale" in hello["note"]
            assert state == {"type": "state", "seed": 3, "run": False, "steps": 1, "guidance": 1.0, "idle": 0}
            header, picture = await page.frame()
            assert header["frame"] == -1 and picture == b""  # a walk from nothing has no frame yet

    run(test())


def test_a_key_that_is_shorter_than_a_frame_counts_once(world: World) -> None:
    slow = small_world(fps=4.0)  # one frame in 250 ms

    async def test() -> None:
        async with serving(slow) as play:
            page = await play.page()
            page.tap(1)
            await page.frame()
            page.tap(2)  # down and up within the time of one frame
            page.tap(3)
            headers = [(await page.frame())[0] for _ in range(2)]
            assert [header["frame"] for header in headers] == [1, 2]
            with pytest.raises(asyncio.TimeoutError):
                await page.socket.receive(0.4)  # no key, no frame
            recording = await (
                await play.client.get(f"/recordings/{(await page.text('hello'))['session']}.json")
            ).json()
            assert recording["actions"] == [1, 2, 3]

    run(test())


def test_a_held_key_makes_frames_until_it_is_released(world: World) -> None:
    async def test() -> None:
        async with serving(world) as play:
            page = await play.page()
            await page.send(type="press", action=2)
            frames = [(await page.frame())[0]["frame"] for _ in range(5)]
            assert frames == sorted(frames) and frames[-1] >= 4
            await page.send(type="press", action=1)  # the newest key counts
            await page.frame()
            await page.send(type="release")
            await page.send(type="run", on=True)
            while not (await page.text("state"))["run"]:
                pass
            last = (await page.frame())[0]
            assert (await page.frame())[0]["frame"] > last["frame"] and last["fps"] > 1
            await page.send(type="run", on=False)
            session = (await page.text("hello"))["session"]
            await page.text("state")
            actions = (await (await play.client.get(f"/recordings/{session}.json")).json())["actions"]
            assert set(actions[:5]) == {2} and 1 in actions and actions[-1] == 0

    run(test())


def test_frames_are_those_of_the_actions_and_two_walks_do_not_mix(world: World) -> None:
    async def test() -> None:
        async with serving(world) as play:
            one, other = await play.page(), await play.page()
            await other.send(type="set", steps=2, guidance=1.5)
            walks = await asyncio.gather(one.walk(1, 2, 3, 1, 0, 2), other.walk(3, 3, 0, 1, 2, 2))
        assert walks[0] == expected_pictures(world, *((action, 1, 1.0) for action in (1, 2, 3, 1, 0, 2)))
        assert walks[1] == expected_pictures(world, *((action, 2, 1.5) for action in (3, 3, 0, 1, 2, 2)))

    run(test())


def test_back_reset_and_new(world: World) -> None:
    async def test() -> None:
        async with serving(world) as play:
            page = await play.page()
            first, second, third = await page.walk(1, 2, 3)
            await page.send(type="back")
            header, picture = await page.frame()
            assert (header["frame"], header["recorded"], picture) == (1, 2, second)
            assert await page.walk(3) == [third] and await page.walk(0) != [third]
            await page.send(type="reset")
            header, picture = await page.frame()
            assert (header["frame"], header["recorded"], header["steps_back"], picture) == (-1, 0, 0, b"")
            assert await page.walk(1, 2) == [first, second]
            await page.send(type="new")
            assert (await page.frame())[0]["seed"] == SETTINGS.seed + 1
            assert await page.walk(1) != [first]
            for _ in range(2):  # the second time nothing is left to undo
                await page.send(type="back")
                assert (await page.frame())[0]["frame"] == -1

    run(test())


def test_a_recording_is_rendered_again_bit_for_bit(world: World, tmp_path: Any) -> None:
    async def test() -> None:
        async with serving(world) as play:
            page = await play.page()
            await page.walk(1, 2)
            await page.send(type="set", guidance=2.0)
            await page.walk(3)
            await page.send(type="back")
            await page.frame()
            await page.send(type="set", steps=3, guidance=1.5)
            await page.walk(0, 3, 1)
            session = (await page.text("hello"))["session"]
            for kind in ("json", "mp4"):
                reply = await play.client.get(f"/recordings/{session}.{kind}")
                assert reply.status == 200 and f"walk.{kind}" in reply.headers["Content-Disposition"]
                (tmp_path / f"walk.{kind}").write_bytes(await reply.read())
            assert (await play.client.get("/recordings/unknown.json")).status == 404

    run(test())
    recording = read_recording(tmp_path / "walk.json")
    assert recording.actions == [1, 2, 0, 3, 1] and recording.seed == SETTINGS.seed
    assert [change.first for change in recording.settings] == [0, 2]
    again = replay(world, recording, tmp_path / "again.mp4")
    assert again == recording
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "walk.mp4").read_bytes()


def test_a_client_that_leaves_in_the_middle_frees_its_session(world: World) -> None:
    async def test() -> None:
        async with serving(world) as play:
            stays = await play.page()
            for leave in ("close", "abort"):
                page = await play.page()
                await page.send(type="press", action=1)  # held: frames are being made
                await page.frame()
                if leave == "close":
                    await page.socket.close()
                else:
                    page.transport.abort()
                await play.until_sessions(1)
            early = await play.client.ws_connect("/walk")  # gone before its walk has begun
            await early.close()
            await play.until_sessions(1)
            assert len(await stays.walk(1, 2)) == 2

    run(test())


def test_engines_end_with_their_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of clients that leave while one is started, or while a new maze is."""
    engines: list[FakeEngine] = []

    def start(world: World, seed: int, kind: str) -> FakeEngine:
        time.sleep(0.1)
        engines.append(FakeEngine())
        return engines[-1]

    monkeypatch.setattr(player, "start_engine", start)

    async def test() -> None:
        async with serving(small_world(side=8, has_engine=True)) as play:
            early = Page(await play.client.ws_connect("/walk"))
            await early.text("hello")
            early.transport.abort()
            await play.until_sessions(0)
            page = await play.page()
            await page.walk(1, 2)
            await page.send(type="new")
            assert (await page.frame())[0]["pictures"][1] > 0
            assert [engine.is_closed for engine in engines] == [True, True, False]
            for seconds in (0.0, 0.08, 0.1, 0.12):
                await page.send(type="new")
                await asyncio.sleep(seconds)
                page.transport.abort()
                await play.until_sessions(0)
                page = await play.page()
        assert all(engine.is_closed for engine in engines)  # the last one with the server

    run(test())


def test_a_walk_that_cannot_begin_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("the engine could not be started")

    monkeypatch.setattr(player, "start_engine", fail)

    async def test() -> None:
        async with serving(small_world(side=8, has_engine=True)) as play:
            page = Page(await play.client.ws_connect("/walk"))
            assert (await page.text("error"))["message"] == "the engine could not be started"
            assert await closing_code(page) == aiohttp.WSCloseCode.INTERNAL_ERROR
            await play.until_sessions(0)

    run(test())


def test_garbage_is_answered_by_one_error(world: World) -> None:
    garbage = [
        "",
        "{",
        "null",
        "[" * 900,
        '{"type": "press"}',
        '{"type": "press", "action": 99}',
        '{"type": "press", "action": -1}',
        '{"type": "press", "action": 1e3}',
        '{"type": "press", "action": 1, "more": 2}',
        '{"type": "fly"}',
        '{"type": "set", "guidance": NaN}',
        '{"type": "set", "guidance": 0.5}',
        '{"type": "set", "steps": 100000}',
    ]

    async def test() -> None:
        async with serving(world) as play:
            page = await play.page()
            for text in garbage:
                await page.socket.send_str(text)
                error = await page.text("error")
                assert error["message"] and len(error["message"]) < 300
            await page.socket.send_bytes(b"\0\1\2")
            assert "must be text" in (await page.text("error"))["message"]
            assert page.texts == [text for text in page.texts if text["type"] != "error"]
            assert len(await page.walk(1)) == 1  # the walk goes on
            await page.socket.send_str(json.dumps({"type": "x" * 5000}))
            assert await closing_code(page) == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
            flood = await play.page()
            for _ in range(200):
                await flood.socket.send_str("x")
            code = await closing_code(flood)
            assert code == aiohttp.WSCloseCode.INTERNAL_ERROR
            assert "messages a second" in [text["message"] for text in flood.texts if text["type"] == "error"][-1]
            await play.until_sessions(0)
            assert (await play.client.get("/walk")).status == 400

    run(test())


async def closing_code(page: Page) -> int | None:
    """How the server closes; what it says before is kept."""
    while True:
        message = await page.socket.receive(20)
        if message.type is aiohttp.WSMsgType.TEXT:
            page.texts.append(json.loads(message.data))
        elif message.type is not aiohttp.WSMsgType.BINARY:
            return page.socket.close_code


def test_raw_bytes_instead_of_websocket_frames(world: World) -> None:
    async def test() -> None:
        async with serving(world) as play:
            page = await play.page()
            page.write(b"\xff" * 64)
            await play.until_sessions(0)

    run(test())


def test_too_many_sessions_are_told_so(world: World) -> None:
    async def test() -> None:
        async with serving(world, max_sessions=1) as play:
            first = await play.page()
            second = Page(await play.client.ws_connect("/walk"))
            full = await second.text("full")
            assert "all 1 sessions are in use" in full["message"] and "--sessions" in full["message"]
            assert await closing_code(second) == aiohttp.WSCloseCode.TRY_AGAIN_LATER
            assert len(await first.walk(1)) == 1
            await first.socket.close()
            await play.until_sessions(0)
            await play.page()

    run(test())


def test_a_client_that_does_not_read_stops_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that it does not take are replaced by newer ones; then it is sent away, and its session is free."""
    monkeypatch.setattr(outbox, "SEND_SECONDS", 0.5)
    monkeypatch.setattr(server, "CLOSE_SECONDS", 0.2)

    async def test() -> None:
        async with serving(world) as play:
            with socket.socket() as raw:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                raw.setblocking(False)
                loop = asyncio.get_running_loop()
                url = play.client.make_url("/walk")
                await loop.sock_connect(raw, (url.host, url.port))
                request = (
                    f"GET /walk HTTP/1.1\r\nHost: {url.host}:{url.port}\r\n"
                    "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
                )
                await loop.sock_sendall(raw, request.encode())
                await play.until_sessions(1)
                await loop.sock_sendall(raw, text_frame('{"type": "run", "on": true}'))
                (slow,) = play.server._players.values()
                big = b"x" * 2**20  # fills the buffers of both sides
                for _ in range(20):
                    slow._outbox.put_frame(big)
                    await asyncio.sleep(0.02)
                page = await play.page()
                assert len(await page.walk(1, 2, 3)) == 3  # meanwhile others walk
                await play.until_sessions(1)

    run(test())


def test_of_frames_only_the_newest_waits() -> None:
    class Socket:
        closed = False
        sent: list[bytes | str]

        def __init__(self) -> None:
            self.sent = []

        async def send_str(self, text: str) -> None:
            self.sent.append(text)

        async def send_bytes(self, data: bytes) -> None:
            self.sent.append(data)
            self.closed = True

    async def test() -> None:
        box, socket = outbox.Outbox(), Socket()
        box.put_frame(b"old")
        box.put_text({"type": "state"})
        box.put_frame(b"new")
        await box.send_to(socket)  # type: ignore[arg-type]
        assert socket.sent == ['{"type": "state"}', b"new"]
        socket.closed, socket.sent = False, []
        for number in range(outbox.MAX_TEXTS + 2):
            box.put_text({"number": number})
        box.finish()
        await box.send_to(socket)  # type: ignore[arg-type]
        assert len(socket.sent) == outbox.MAX_TEXTS and socket.sent[0] == '{"number": 2}'

    run(test())


def test_walks_take_turns(world: World) -> None:
    """A walk that always wants frames does not keep another from its own: they alternate."""
    order: list[int] = []

    class Ordered(ThreadPoolExecutor):
        def submit(self, function: Any, *arguments: Any) -> Any:  # type: ignore[override]
            def noted() -> Any:
                walk = next((a for a in arguments if isinstance(a, Walk)), None)
                if walk is not None:
                    order.append(id(walk))
                time.sleep(0.01)
                return function(*arguments)

            return super().submit(noted)

    fast = small_world(fps=1000.0)

    async def test() -> None:
        async with serving(fast) as play:
            play.server._worker = Ordered(1)
            pages = [await play.page(), await play.page()]
            for page in pages:
                await page.send(type="run", on=True)
            order.clear()
            while len(set(order)) < 2:
                await asyncio.sleep(0.01)
            order.clear()
            while len(order) < 16:
                await asyncio.sleep(0.01)
            for page in pages:
                await page.send(type="run", on=False)

    run(test())
    assert all(one != other for one, other in itertools.pairwise(order[:16])), order


@pytest.mark.parametrize("values", [{"labels": 3}, {"condition_dropout": 0.0}])
def test_models_by_label_and_without_conditions(values: dict[str, Any]) -> None:
    world = small_world(**values)

    async def test() -> None:
        async with serving(world) as play:
            page = await play.page()
            hello = await page.text("hello")
            assert hello["inputs"] == (["0", "1", "2"] if "labels" in values else ["next"])
            assert hello["guidance"] == ("labels" in values)
            inputs = (2, 2, 0) if "labels" in values else (0, 0, 0)
            pictures = await page.walk(*inputs)
            assert pictures == expected_pictures(world, *((number, 1, 1.0) for number in inputs))
            if "labels" not in values:
                await page.send(type="set", guidance=2.0)
                assert "needs a model with actions or labels" in (await page.text("error"))["message"]

    run(test())


def test_labels_of_given_frames_go_on() -> None:
    world = small_world(labels=3)
    latents = torch.zeros(1, 2, 32, *world.latent_size)
    world = dataclasses.replace(world, episodes=(Given(latents, torch.tensor([[2, 2]]), None),))

    async def test() -> None:
        async with serving(world) as play:
            page = await play.page()
            assert (await page.text("state"))["idle"] == 2
            await page.send(type="run", on=True)
            await page.frame()
            session = (await page.text("hello"))["session"]
            recording = await (await play.client.get(f"/recordings/{session}.json")).json()
            assert set(recording["actions"]) == {2} and recording["given"] == 2

    run(test())


def test_pages_of_other_sites_and_without_the_token_are_refused(world: World) -> None:
    token = "0123456789abcdef"

    async def test() -> None:
        async with serving(world, token=token) as play:
            client: Serving = play
            url = client.client.make_url("/")
            own = f"http://{url.host}:{url.port}"
            for path, headers, status in (
                ("/", {}, 403),
                ("/?token=wrong", {}, 403),
                (f"/?token={token}", {}, 200),
                ("/static/play.js", {}, 200),
                ("/static/play.css", {}, 200),
                ("/static/index.html", {}, 404),
                (f"/?token={token}", {"Host": "rebound.example"}, 403),
                (f"/?token={token}", {"Host": f"localhost:{url.port}"}, 200),
                (f"/?token={token}", {"Host": "192.168.1.5:80"}, 403),
                ("/recordings/x.json", {}, 403),
            ):
                reply = await client.client.get(path, headers=headers)
                assert reply.status == status, (path, headers, await reply.text())
                assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
            for path, origin in (("/walk", own), (f"/walk?token={token}", "http://evil.example"), ("/walk", "null")):
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    await client.client.ws_connect(path, headers={"Origin": origin})
                assert caught.value.status == 403
            page = Page(await client.client.ws_connect(f"/walk?token={token}", headers={"Origin": own}))
            await page.text("hello")

    run(test())
