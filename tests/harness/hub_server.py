"""A server of this process that answers as the Hugging Face hub does when files of a repository are downloaded."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import _http

TOKEN = "hf_token_of_the_tests"


def commit_of(number: int) -> str:
    return f"{number:040x}"


@dataclass
class Repository:
    """Its commits are the files by name; `main` is the last one."""

    commits: list[dict[str, bytes]]
    tags: dict[str, int] = field(default_factory=dict)
    needs: str = ""
    """"token" for a private one, "access" for a gated one."""

    def find(self, revision: str) -> int | None:
        names = {"main": len(self.commits) - 1, **self.tags}
        names |= {commit_of(number): number for number in range(len(self.commits))}
        return names.get(revision)


class Hub:
    """The repositories by name, and what was asked for.

    Attributes:
        downloads: the names of the files whose content was sent, in order.
        ranges: the headers Range of these requests, where they had one.
        cuts: by file, how many of its downloads break off in the middle.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[str] = []
        self.ranges: list[str] = []
        self.cuts: dict[str, int] = {}
        self.requests = 0

    def upload(self, name: str, *folders: Path, **facts: object) -> Repository:
        """A repository with a commit for each folder."""
        commits = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
        self.repositories[name] = repository = Repository(commits, **facts)  # type: ignore[arg-type]
        return repository


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def do_GET(self) -> None:
            self._answer(with_content=True)

        def _answer(self, with_content: bool) -> None:
            hub.requests += 1
            if blob := re.fullmatch(r"/cdn/(\d+)/([^/]+/[^/]+)/(.+)", self.path):
                assert self.headers["Authorization"] is None
                self._send(hub.repositories[blob[2]].commits[int(blob[1])][blob[3]], blob[3], {}, with_content)
                return
            asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            repository = hub.repositories.get(asked[1]) if asked else None
            if asked is None or repository is None:
                return self._refuse(401, "RepoNotFound")
            if repository.needs and self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self._refuse(401, "RepoNotFound" if repository.needs == "token" else "GatedRepo")
            number = repository.find(asked[2])
            if number is None:
                return self._refuse(404, "RevisionNotFound")
            headers = {"X-Repo-Commit": commit_of(number)}
            content = repository.commits[number].get(asked[3])
            if content is None:
                return self._refuse(404, "EntryNotFound", headers)
            digest = hashlib.sha256(content).hexdigest()
            if not asked[3].endswith(".safetensors"):
                return self._send(content, asked[3], {**headers, "ETag": f'"{digest[:40]}"'}, with_content)
            # Large files are on another host, to which the hub's client sends no token.
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content)), "Content-Length": "0"}
            elsewhere = hub.url.replace("127.0.0.1", "localhost")
            self.send_response(302)
            for key, value in {**headers, "Location": f"{elsewhere}/cdn/{number}/{asked[1]}/{asked[3]}"}.items():
                self.send_header(key, value)
            self.end_headers()

        def _send(self, content: bytes, name: str, headers: dict[str, str], with_content: bool) -> None:
            start = 0
            if asked := self.headers["Range"]:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_response(206 if asked else 200)
            for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            if not with_content:
                return
            hub.downloads.append(name)
            hub.ranges += [asked] if asked else []
            content = content[start:]
            if hub.cuts.get(name, 0):
                hub.cuts[name] -= 1
                content, self.close_connection = content[: len(content) // 2], True
            self.wfile.write(content)

        def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "X-Error-Code": code, "Content-Length": "0"}.items():
                self.send_header(key, value)
            self.end_headers()

    return Handler


@contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub of this process talks to, with its cache in `cache`, and without waiting to retry."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = _handler(hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(variable, raising=False)
    hurried = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (file_download, _http):
        patch.setattr(module, "time", hurried)
    close_session()  # an earlier one may have begun with other proxies
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
