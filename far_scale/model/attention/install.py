"""Advice on which attention libraries to install on a machine, with commands that leave its torch unchanged.

Checked on 2026-11-26 by dry runs of pip with each torch from 2.9 to 2.15:

- xformers up to 0.0.34 pins one torch exactly, so a bare `pip install xformers` with torch 2.9 takes 0.0.35 and
  replaces torch by the newest one. All of its wheels are linked against CUDA 12 only.
- flash-attn-4 has only pre-releases and an empty 0.0.1: a bare `pip install flash-attn-4` finds nothing.
- flash-attn 2 is a source package. Its setup first looks among the project's own releases for
  `flash_attn-VERSION+cu12torch2.10cxx11abiTRUE-cp311-cp311-linux_x86_64.whl`, with torch's own numbers; its release
  workflow builds them up to torch 2.10. Otherwise it compiles, for about an hour.
- flash-attn-3 is compiled from its repository.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

NEWEST_TORCH = "2.15"
"""The newest version that was checked."""

# The xformers for a torch that must stay; from 2.10 on, one wheel fits all.
_XFORMERS = {"2.9.0": "0.0.33.post1", "2.9.1": "0.0.33.post2"}
_XFORMERS_LATER = "0.0.35"
_XFORMERS_CUDA = 12
_FLASH_2_WHEELS = ("2.9", "2.10")


class Machine(NamedTuple):
    """The versions and the GPU of a machine.

    Attributes:
        torch: version.
        cuda: version that torch was built for, such as 12.8; None without CUDA.
        capability: compute capability of the GPU; None without a GPU.
    """

    torch: str
    cuda: str | None
    capability: tuple[int, int] | None


def xformers_command(torch_version: str) -> str:
    """The pip command for the xformers that was built for this torch."""
    public = torch_version.partition("+")[0]
    return f'pip install "xformers=={_XFORMERS.get(public, _XFORMERS_LATER)}" "torch=={public}"'


def flash_attn_4_command(cuda: str | None) -> str:
    """The pip command for flash-attn-4 with a torch that was built for this CUDA."""
    extra = "[cu13]" if cuda is not None and _major(cuda) >= 13 else ""
    return f'pip install "flash-attn-4{extra}>=4.0.0b10"'


FLASH_ATTN_2_COMMAND = "pip install flash-attn --no-build-isolation"
FLASH_ATTN_3_COMMAND = (
    "pip install --no-build-isolation "
    '"flash-attn-3 @ git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper"'
)


LIBRARIES = ("flash-attn-4", "flash-attn-3", "flash-attn-2", "xformers")
"""The names of kernels that are not part of torch."""


def install_advice(machine: Machine, installed: Collection[str] = ()) -> list[str]:
    """Whether to install each library on this machine, why, and how: a line each.

    Args:
        installed: names of the kernels with an installed library.
    """
    if machine.capability is None or machine.cuda is None:
        return ["to install: nothing; without an NVIDIA GPU all that runs comes with torch"]
    capability = ".".join(map(str, machine.capability))
    lines = [f"to install, for compute capability {capability} and torch {machine.torch} of CUDA {machine.cuda}:"]
    for name, advise in zip(LIBRARIES, (_flash_attn_4, _flash_attn_3, _flash_attn_2, _xformers), strict=True):
        lines.append(f"  {name:13} {'installed' if name in installed else advise(machine.capability, machine)}")
    if _minor(machine.torch) > _minor(NEWEST_TORCH):
        lines.append(f"  (torch {machine.torch} is newer than what these commands were checked with, {NEWEST_TORCH})")
    return lines


def _flash_attn_4(capability: tuple[int, int], machine: Machine) -> str:
    if capability[0] not in (9, 10, 11):
        return "no: for compute capability 9 to 11"
    use = "for sampling, and packs of one long clip" if capability[0] == 9 else "first choice here"
    return f"yes, {use}: {flash_attn_4_command(machine.cuda)}"


def _flash_attn_3(capability: tuple[int, int], machine: Machine) -> str:
    if capability != (9, 0):
        return "no: only for compute capability 9.0"
    how = f"compiled with nvcc of CUDA {machine.cuda}"
    return f"for sampling, if flash-attn-4 is not enough; {how}: {FLASH_ATTN_3_COMMAND}"


def _flash_attn_2(capability: tuple[int, int], machine: Machine) -> str:
    if capability < (8, 0):
        return "no: from compute capability 8.0 on"
    assert machine.cuda is not None
    version = ".".join(machine.torch.split(".")[:2])
    how = "a wheel" if version in _FLASH_2_WHEELS and _major(machine.cuda) in (12, 13) else "compiled for about an hour"
    return f"not needed: torch-varlen is the same kernel; {how}: {FLASH_ATTN_2_COMMAND}"


def _xformers(capability: tuple[int, int], machine: Machine) -> str:
    assert machine.cuda is not None
    if capability < (7, 5):
        return "no: from compute capability 7.5 on"
    if _major(machine.cuda) != _XFORMERS_CUDA:
        return f"no: its wheels are for CUDA {_XFORMERS_CUDA}"
    if capability < (8, 0):
        return f"yes, for sampling: {xformers_command(machine.torch)}"
    if capability > (9, 0):
        return "not needed: torch-varlen is the faster kernel"
    return f"not needed, but for sampling in float32: {xformers_command(machine.torch)}"


def _major(cuda: str) -> int:
    return int(cuda.split(".")[0])


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
