"""What the tests of damaged and hostile files share: damage, and a watch over what reading them opens and allocates."""

from __future__ import annotations

import codecs
import contextlib
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from far_scale.data.shards.sample import Sample
from far_scale.utils.errors import UserError

Found = TypeVar("Found")
ALLOWED_BYTES = 256 << 20  # of address space beyond what is there already; the files have 20 KB, or some MB
HUGE = [2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, 10**4000]


class Watch:
    """What the readers open and unpickle while it is on; Python's audit hooks cannot be taken away again."""

    def __init__(self) -> None:
        self.on, self.opened, self.pickles = False, set[str](), 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self.opened.add(os.path.realpath(os.fsdecode(arguments[0])))
        if self.on and event == "pickle.find_class":
            self.pickles += 1


WATCH = Watch()


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """No file outside of `folder` may be opened, nothing unpickled, and no memory taken beyond ALLOWED_BYTES.

    A read of each kind must go before, so that what is imported late is there.
    """
    codecs.lookup("unicode_escape")
    before, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    # What allocates as much as a hostile number says gets a MemoryError, which is no UserError.
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWED_BYTES, before[1]))
    WATCH.opened, WATCH.pickles, WATCH.on = set(), 0, True
    try:
        yield
    finally:
        WATCH.on = False
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert WATCH.opened and all(Path(path).is_relative_to(folder.resolve()) for path in WATCH.opened), WATCH.opened
    assert WATCH.pickles == 0


def attempt(read: Callable[[], Found], named: Path) -> Found | None:
    """What is read, or None where they were refused as they should be: in one line that says `named`."""
    try:
        return read()
    except UserError as error:
        message = str(error)
        assert str(named) in message and len(message.splitlines()) == 1 and len(message) < 1000, message
        message.encode()
        return None


def damage(data: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, duplicated, dropped, swapped, zeroed, or put in."""
    at, size = chance.randrange(len(data)), chance.choice([1, 2, 8, 100, 512, 1024])
    kind = chance.randrange(8)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at : at + size] + data[at:]
    if kind == 3:
        return data[:at] + data[at + size :]
    if kind == 4:
        return data[:at] + bytes(size) + data[at + size :]
    if kind == 5:
        return data[:at] + chance.randbytes(size) + data[at + size :]
    if kind == 6:  # whole blocks, so that tar headers stay in their places
        first, second = (chance.randrange(len(data) // 512 + 1) * 512 for _ in range(2))
        blocks = bytearray(data)
        blocks[first : first + 512], blocks[second : second + 512] = (
            data[second : second + 512],
            data[first : first + 512],
        )
        return bytes(blocks)
    return data[:at] + chance.choice([b"..", b"/", b"\xff" * 8, b"9" * 12, b"[" * 500, b"-1", b"NaN"]) + data[at:]


def right(samples: list[Sample]) -> bool:
    return all(
        sample.latents.shape[1:] == (4, 2, 2)
        and sample.latents.dtype in (torch.bfloat16, torch.float16)
        and (sample.actions is None or sample.actions.shape == sample.latents.shape[:1])
        for sample in samples
    )
