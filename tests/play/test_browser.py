"""The page of `far-scale play` in headless Chromium."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from harness.chromium import Tab, browser_tab, find_chromium
from harness.play import serving, small_world

PICTURE = "document.querySelector('#dream').toDataURL()"
FRAME = "Number(document.querySelector('#frame').textContent)"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium (Debian's package chromium)")
def test_keys_and_touches_move_the_picture(tmp_path: Path) -> None:
    async def moves(tab: Tab, frame: int) -> str:
        """Wait for this frame; returns its picture."""
        await tab.until(f"{FRAME} === {frame}")
        picture: str = await tab.value(PICTURE)
        return picture

    async def test() -> None:
        # The demo's keys without its engine; a few frames a second, so that a short press makes one frame.
        async with serving(small_world(side=8, fps=10.0)) as play, browser_tab(tmp_path / "profile") as tab:
            await tab.open(str(play.client.make_url("/")))
            await tab.until("document.querySelector('#model').textContent.startsWith('small')")
            pictures = [await tab.value(PICTURE)]
            for frame, code in enumerate(("ArrowUp", "ArrowLeft", "KeyD", "Space")):
                await tab.press(code)
                pictures.append(await moves(tab, frame))
            assert len(set(pictures)) == 5
            await tab.press("KeyZ")
            assert await moves(tab, 2) == pictures[-2]
            await tab.key("ArrowUp", down=True)
            await tab.until(f"{FRAME} >= 6")  # held
            await tab.key("ArrowUp", down=False)
            await tab.screenshot(tmp_path / "desktop.png")

            await tab.size(390, 844, is_phone=True)
            assert await tab.value("document.documentElement.scrollWidth <= innerWidth")
            await tab.tap("#reset")
            await tab.until("document.querySelector('#recorded').textContent === '0 frames recorded'")
            await tab.tap("#inputs .forward")
            assert await moves(tab, 0) == pictures[1]
            await tab.tap("#inputs .left")
            assert await moves(tab, 1) == pictures[2]
            await tab.screenshot(tmp_path / "phone.png")

            await tab.value("document.querySelector('#steps').value = 3; "
                            "document.querySelector('#steps').dispatchEvent(new Event('input'))")  # fmt: skip
            await tab.until("document.querySelector('#steps-value').textContent === '3'")
            href = await tab.value("document.querySelector('#save-json').href")
            recording = await (await play.client.get(href.partition(str(play.client.make_url("/")))[2])).json()
            assert recording["actions"] == [3, 1]
            assert await tab.value("document.querySelector('#message').hidden")
            assert tab.problems == []
            await tab.call("Page.navigate", url="about:blank")
            await play.until_sessions(0)  # leaving the page frees its session

    asyncio.run(asyncio.wait_for(test(), 150))
