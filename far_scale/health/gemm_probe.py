"""A matrix product with exact result, to find devices that compute wrong results or are slow."""

from __future__ import annotations

import itertools
import time

import torch


class GemmProbe:
    """The product of two matrices of +1 and -1 on a device.

    Its entries and their partial sums over even numbers of terms are even and, at these sizes, below 512. So they are
    exact in bfloat16 and float32 in any order of summation, and any difference is an error of the device.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        # About a millisecond per batch on a GPU, queued to hide the kernel launches; a tenth of that on a CPU.
        self._size, self._batch_size = (2048, 32) if device.type == "cuda" else (128, 2)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (2, self._size, self._size), generator=generator, dtype=torch.int8) * 2 - 1
        self._left, self._right = signs.to(device, dtype)
        self._out = torch.empty_like(self._left)
        self._device = device

    def is_right(self) -> bool:
        """Multiply, and check the result on the CPU.

        Freivalds' algorithm needs no second product: (A B) r = A (B r) for a random vector r. A wrong A B passes with a
        probability of 2^-20. All numbers are below 2^53, so exact in float64.
        """
        self._multiply()
        vector = torch.randint(0, 2**20, (self._size,), generator=torch.Generator().manual_seed(1)).double()
        left, right, out = (matrix.cpu().double() for matrix in (self._left, self._right, self._out))
        return torch.equal(out @ vector, left @ (right @ vector))

    def seconds(self, batches: int) -> float:
        """Seconds of one product: the fastest of this many batches, which excludes disturbances."""
        if self._device.type == "cuda":
            return min(self._cuda_batches(batches)) / self._batch_size
        return min(self._cpu_batches(batches)) / self._batch_size

    @property
    def flops(self) -> int:
        """Floating-point operations of one product."""
        return 2 * self._size**3

    def _multiply(self) -> None:
        torch.mm(self._left, self._right, out=self._out)

    def _cuda_batches(self, batches: int) -> list[float]:
        times = [torch.cuda.Event(enable_timing=True) for _ in range(batches + 1)]
        with torch.cuda.device(self._device):
            times[0].record()
            for end in times[1:]:
                for _ in range(self._batch_size):
                    self._multiply()
                end.record()
            times[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(times)]

    def _cpu_batches(self, batches: int) -> list[float]:
        seconds = []
        for _ in range(batches):
            start = time.perf_counter()
            for _ in range(self._batch_size):
                self._multiply()
            seconds.append(time.perf_counter() - start)
        return seconds
