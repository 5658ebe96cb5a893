"""Headless Chromium by its DevTools protocol, over aiohttp's WebSocket client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

WAIT = 60.0  # seconds; the first start of a browser on a busy machine is slow


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """A page of the browser. `problems` has the errors of its console and its exceptions."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        reply = await asyncio.wait_for(answer, WAIT)
        assert "error" not in reply, (method, reply)
        result: dict[str, Any] = reply["result"]
        return result

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression is true; returns its value."""
        for _ in range(int(WAIT / 0.05)):
            if value := await self.value(expression):
                return value
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true: {expression}; {self.problems}")

    async def key(self, code: str, down: bool, key: str | None = None) -> None:
        await self.call("Input.dispatchKeyEvent", type="keyDown" if down else "keyUp", code=code, key=key or code)

    async def press(self, code: str) -> None:
        """A key down and up, without waiting between the two."""
        await asyncio.gather(self.key(code, down=True), self.key(code, down=False))

    async def tap(self, selector: str) -> None:
        """Touch the middle of an element."""
        box = await self.value(f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect(); "
                               "return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
        points = [{"x": box[0], "y": box[1]}]
        await asyncio.gather(
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points),
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[]),
        )

    async def size(self, width: int, height: int, is_phone: bool) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        await self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)

    async def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))

    async def _read(self) -> None:
        async for message in self._socket:
            reply = message.json()
            if "id" in reply:
                self._answers.pop(reply["id"]).set_result(reply)
            elif reply["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(reply["params"]["exceptionDetails"]))
            elif reply["method"] == "Runtime.consoleAPICalled" and reply["params"]["type"] in ("error", "warning"):
                self.problems.append(str(reply["params"]["args"]))
            elif reply["method"] == "Log.entryAdded" and reply["params"]["entry"]["level"] in ("error", "warning"):
                self.problems.append(str(reply["params"]["entry"]))


@asynccontextmanager
async def browser_tab(profile: Path) -> AsyncIterator[Tab]:
    """An empty page of a new browser, whose files are in the new folder `profile`."""
    program = find_chromium()
    assert program is not None
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    nothing = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=nothing, stderr=nothing)
    try:
        port_file = profile / "DevToolsActivePort"
        for _ in range(int(WAIT / 0.05)):
            if port_file.is_file() and "\n" in port_file.read_text():
                break
            assert process.returncode is None, "the browser ended"
            await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as client:
            async with client.get(f"http://127.0.0.1:{port}/json/list") as reply:
                page = next(target for target in await reply.json() if target["type"] == "page")
            async with client.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Tab(socket)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
