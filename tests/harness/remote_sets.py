"""A shard set behind a web server with programmed failures, and a process that reads one through a cache."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards.shard_set import ShardSet


class WebServer:
    """Serves a folder's files over HTTP.

    Attributes:
        url: of the folder.
        asked: number of requests for each file.
        fails: by file, how many requests still fail, and how: "status" (503), "cut" (half of the body), "flip" (one
            changed byte), "hang" (half of the body, then nothing).
        watch: called with the file's name at each request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, Counter[str]()
        self.fails: dict[str, tuple[int, str]] = {}
        self.watch: Callable[[str], object] = lambda name: None
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/some/set"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].removeprefix("/some/set/")
        self.asked[name] += 1
        self.watch(name)
        times, how = self.fails.get(name, (0, ""))
        self.fails[name] = (times - 1, how)
        path = self.folder / name
        if not path.is_file() or (times > 0 and how == "status"):
            request.send_error(503 if path.is_file() else 404)
            return
        body = path.read_bytes()
        if times > 0 and how == "flip":
            body = body[:700] + bytes([body[700] ^ 1]) + body[701:]
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        with contextlib.suppress(ConnectionError):
            request.wfile.write(body[: len(body) // 2] if times > 0 and how in ("cut", "hang") else body)
            if times > 0 and how == "hang":
                self.closing.wait(30)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[WebServer]:
    """A web server for the folder."""
    server = WebServer(folder)
    try:
        yield server
    finally:
        server.close()


def sizes_seen(folder: Path, stop: Callable[[], bool]) -> list[int]:
    """Size of a cache folder in bytes, sampled until `stop`."""
    seen = []
    while not stop():
        total = 0
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size
        seen.append(total)
        time.sleep(0.002)
    return seen


def main(url: str, cache: str, max_bytes: str, order: str) -> None:
    """Read samples "SHARD.SAMPLE ..." in this order; print each as JSON."""
    shard_set = ShardSet.open(url, NodeCache(cache, int(max_bytes)))
    read = partial(map, int)
    for place in order.split():
        shard, sample = read(place.split("."))
        latents = shard_set.read(shard, sample).latents
        print(json.dumps([shard, sample, latents.float().sum().item(), int(latents[0, 0, 0, 0])]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
