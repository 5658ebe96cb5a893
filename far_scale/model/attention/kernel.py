"""The interface of attention kernels, checks of their requirements, and padded layouts of the log-sum-exp."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from far_scale.model.layout import Spans, to_device

NOT_INSTALLED = "not installed"


class Kernel(Protocol):
    """A module with ordinary attention over concatenated token sequences: a forward that also returns the
    log-sum-exp, and a backward that takes output and log-sum-exp as arguments.

    Query sequence i sees key sequence i. `causal`, only where both have the same lengths, lets query j see keys <= j.
    The scale is 1/sqrt(D). The backward takes `out` and `lse` from its caller and must not recompute them: a caller
    that merged several calls passes the merged ones, and gets this call's part of the gradients.

    A kernel that keeps tensors on the device for given sequences also has `prepare` (see `PreparedKernel`).

    Attributes:
        NAME: of the kernel in recipes and messages.
        PACKAGE: its distribution.
        INSTALL: the command that installs it; "" if it is part of torch.
    """

    NAME: str
    PACKAGE: str
    INSTALL: str

    def unusable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot compute on such tensors, in a few words; None if it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q `[T, N, D]`, k, v `[S, N, D]` -> out `[T, N, D]`, lse `[T, N]` float (natural logarithm), both new."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: Spans,
        keys: Spans,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients dq `[T, N, D]`, dk, dv `[S, N, D]`, all new."""
        ...


@runtime_checkable
class PreparedKernel(Protocol):
    """A kernel that keeps tensors on the device for given sequences, in the cache of a `Spans`.

    Without `prepare`, the first call with new sequences would copy them there, and make the host wait.
    """

    def prepare(self, queries: Spans, keys: Spans, causal: bool, device: torch.device) -> list[Tensor]:
        """Make all that `forward` and `backward` read of it; returns the tensors."""
        ...


@dataclass(frozen=True)
class GPURequirements:
    """The requirements of a kernel for NVIDIA GPUs.

    Attributes:
        dtypes: that it supports.
        lowest, highest: compute capabilities that it runs on; None for no upper limit.
        largest_head: largest head dimension; all must be multiples of 8.
    """

    dtypes: tuple[torch.dtype, ...]
    lowest: tuple[int, int]
    highest: tuple[int, int] | None = None
    largest_head: int = 256

    def unusable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """See `Kernel.unusable_reason`."""
        if device.type != "cuda" or torch.version.hip:
            return "runs only on NVIDIA GPUs"
        capability = compute_capability(device)
        if capability < self.lowest or (self.highest is not None and capability > self.highest):
            has = format_capability(capability)
            return f"needs a GPU of compute capability {self._capabilities()}, this one has {has}"
        if dtype not in self.dtypes:
            return unsupported_dtype(dtype, self.dtypes)
        if head_dim > self.largest_head or head_dim % 8:
            return f"takes heads of a multiple of 8 up to {self.largest_head}, not of {head_dim}"
        return None

    def _capabilities(self) -> str:
        if self.highest is None:
            return f"{format_capability(self.lowest)} or higher"
        return format_capability(self.lowest) + (
            f" to {format_capability(self.highest)}" if self.highest != self.lowest else ""
        )


def unsupported_dtype(dtype: torch.dtype, supported: tuple[torch.dtype, ...]) -> str:
    """The reason for refusing a dtype."""
    *names, last, refused = (str(x).removeprefix("torch.") for x in (*supported, dtype))
    return f"takes {', '.join(names)} and {last}, not {refused}" if names else f"takes {last}, not {refused}"


def format_capability(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def compute_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def import_failure(package: str, oldest: str, module: str) -> str | None:
    """Why a library cannot be imported, in a few words; None if it can.

    The version is that of the distribution: flash-attn 2 and 4 share a namespace, and wheels of 2 contain an early 4.
    """
    version = installed_version(package)
    if version is None:
        return NOT_INSTALLED
    if TorchVersion(version) < oldest:  # compares as pip does, including betas
        return f"needs {package} {oldest} or later, {version} is installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # any error: built for another torch, no driver, an old dependency
        return f"{package} {version} cannot be imported: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def padded_rows(spans: Spans, width: int, device: torch.device) -> Tensor:
    """`[T]` int64: the row of each token among `sequences * width` padded ones, cached."""

    def make() -> Tensor:
        lengths = torch.tensor(spans.lengths)
        padding_before = torch.arange(len(lengths)) * width - torch.tensor(spans.starts[:-1])
        return to_device(torch.arange(spans.starts[-1]) + padding_before.repeat_interleave(lengths), device)

    return spans.cache.get(("padded_rows", width), device, make)


def unpad_lse(lse: Tensor, spans: Spans) -> Tensor:
    """Log-sum-exps `[sequences, N, width]`, width at least the longest sequence -> `[T, N]`."""
    return lse.transpose(1, 2).flatten(0, 1).index_select(0, padded_rows(spans, lse.shape[2], lse.device))


def pad_lse(lse: Tensor, spans: Spans, width: int) -> Tensor:
    """Log-sum-exps `[T, N]` -> `[sequences, N, width]`, padded with infinity, which gives weights exp(s - inf) = 0."""
    padded = lse.new_full((len(spans.lengths) * width, lse.shape[1]), torch.inf)
    padded.index_copy_(0, padded_rows(spans, width, lse.device), lse)
    by_sequence: Tensor = padded.unflatten(0, (-1, width))
    return by_sequence.transpose(1, 2).contiguous()
