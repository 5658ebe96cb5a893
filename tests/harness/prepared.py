"""A check that layouts were prepared: nothing is made for a device any more, nor copied there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from far_scale.model.layout import DeviceCache, _layouts


def forget_layouts() -> None:
    """The next `FrameLayout.of` of this thread returns a layout that nothing was made for."""
    _layouts.of.cache_clear()


@contextlib.contextmanager
def nothing_is_made(copies: bool = True) -> Iterator[None]:
    """An error where this thread makes anything of a layout for a device.

    Args:
        copies: allow tensors to be made of Python numbers, as code for the CPU only does.
    """
    own, get = threading.get_ident(), DeviceCache.get

    def find(cache: DeviceCache, name: Any, device: torch.device, make: Callable[[], Any]) -> Any:
        if threading.get_ident() != own:
            return get(cache, name, device, make)
        assert (name, device) in cache._made, f"{name} is made only now"
        return cache._made[name, device]

    with mock.patch.object(DeviceCache, "get", find), contextlib.nullcontext() if copies else NoTensorsOfNumbers():
        yield


class NoTensorsOfNumbers(TorchDispatchMode):
    """An error where `torch.tensor` makes a tensor of Python numbers: on a GPU its copy would make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made of Python numbers"
        return func(*args, **(kwargs or {}))
