"""CUDA graphs for the passes of a frame.

A frame of one clip is so little work that the GPU waits for the host, which launches some 40 kernels per layer. All
denoising steps launch the same kernels on the same shapes, so they are captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CUDAGraphRunner:
    """Computes a function of tensors by replaying a CUDA graph of its kernels.

    The first call runs it without a graph, so that libraries have allocated their workspaces when the second call
    captures it. Other tensors that the function reads must keep their addresses, and it must not
    synchronize with the host.
    """

    def __init__(self, function: Callable[..., Tensor], pool: GraphPool) -> None:
        self._function, self._pool = function, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._called = False

    def __call__(self, *args: Tensor) -> Tensor:
        """The function's result as a new tensor. Shapes and dtypes must be those of the first call."""
        if not self._called:
            self._called = True
            return self._function(*args)
        if self._graph is None:
            self._args = [x.clone() for x in args]
            self._graph, self._result = self._pool.capture(self._function, self._args)
        else:
            for buffer, x in zip(self._args, args, strict=True):
                buffer.copy_(x)
        self._graph.replay()
        return self._result.clone()


class GraphPool:
    """Memory that graphs share. They must be replayed one at a time, and their results be copied before the next."""

    def __init__(self) -> None:
        self._last: torch.cuda.CUDAGraph | None = None  # while one graph lives, so does the memory
        self._stream = torch.cuda.Stream()

    def capture(self, function: Callable[..., Tensor], args: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture without torch.cuda.graph, which collects garbage and empties the allocator's cache each time."""
        graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            pool = None if self._last is None else self._last.pool()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = function(*args)
            finally:
                graph.capture_end()
        outer.wait_stream(self._stream)
        self._last = graph
        return graph, result
