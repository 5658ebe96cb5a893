"""What an attention kernel is, and what it may need of a machine."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from far_scale.model.layout import Spans

NOT_INSTALLED = "not installed"


class Kernel(Protocol):
    """A module: ordinary attention with the log-sum-exp given back, and its backward from a given output and
    log-sum-exp, over token sequences that lie end to end.

    Query sequence i sees key sequence i. `causal`, only where both have the same lengths, lets query j see keys <= j.
    The scale is 1/sqrt(D). The backward takes `out` and `lse` from its caller and must not recompute them: a caller
    who merged several calls hands over the merged ones, and gets this call's share of the gradients.

    Attributes:
        NAME: what users call it.
        PACKAGE: the distribution it comes in.
        INSTALL: the command that installs it; "" where torch, which is there anyway, has it.
    """

    NAME: str
    PACKAGE: str
    INSTALL: str

    def unusable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot compute this here, in a few words; None where it can."""
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


@dataclass(frozen=True)
class GPURequirements:
    """What a kernel for NVIDIA GPUs needs.

    Attributes:
        dtypes: what it takes.
        lowest, highest: compute capabilities it runs on; highest None: no limit.
        largest_head: head size; all of them must be multiples of 8.
    """

    dtypes: tuple[torch.dtype, ...]
    lowest: tuple[int, int]
    highest: tuple[int, int] | None = None
    largest_head: int = 256

    def unusable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """See `Kernel.unusable_reason`."""
        if device.type != "cuda" or torch.version.hip:
            return "runs on NVIDIA GPUs alone"
        has = compute_capability(device)
        if has < self.lowest or (self.highest is not None and has > self.highest):
            return f"needs a GPU of compute capability {self._capabilities()}, this one has {format_capability(has)}"
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


def unsupported_dtype(dtype: torch.dtype, taken: tuple[torch.dtype, ...]) -> str:
    *names, last, refused = (str(x).removeprefix("torch.") for x in (*taken, dtype))
    return f"takes {', '.join(names)} and {last}, not {refused}" if names else f"takes {last}, not {refused}"


def format_capability(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def installed_version(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def import_failure(package: str, oldest: str, module: str) -> str | None:
    """Why a library cannot be used, in a few words; None where it can.

    Asked by distribution, not by module: flash-attn 2 and 4 share one namespace, and wheels of 2 hold an early 4.
    """
    version = installed_version(package)
    if version is None:
        return NOT_INSTALLED
    if TorchVersion(version) < oldest:  # it compares as pip does, betas too
        return f"needs {package} {oldest} or later, {version} is installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # built for another torch, no driver, a dependency too old: whatever it may be
        return f"{package} {version} cannot be imported: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.lru_cache(maxsize=64)  # a layer asks for the same as the layer before
def _padded_rows(spans: Spans, width: int, device: torch.device) -> Tensor:
    """`[T]` int64: where each token stands among `sequences * width` padded ones."""
    lengths = torch.tensor(spans.lengths)
    padding_before = torch.arange(len(lengths)) * width - torch.tensor(spans.starts[:-1])
    return (torch.arange(spans.starts[-1]) + padding_before.repeat_interleave(lengths)).to(device)


def unpad_lse(lse: Tensor, spans: Spans) -> Tensor:
    """`[sequences, N, width]`, width at least the longest sequence -> `[T, N]`."""
    return lse.transpose(1, 2).flatten(0, 1).index_select(0, _padded_rows(spans, lse.shape[2], lse.device))


def pad_lse(lse: Tensor, spans: Spans, width: int) -> Tensor:
    """`[T, N]` -> `[sequences, N, width]`, filled up with infinity, which gives weights of exp(s - inf) = 0."""
    padded = lse.new_full((len(spans.lengths) * width, lse.shape[1]), torch.inf)
    padded.index_copy_(0, _padded_rows(spans, width, lse.device), lse)
    return padded.unflatten(0, (-1, width)).transpose(1, 2).contiguous()
