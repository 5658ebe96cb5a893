"""What a run that compiles its layers must have, and what it counts."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from far_scale.utils.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile could make no code for `device`: better now than in the first step."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("train.compile: triton is not installed; pip install triton, or train.compile=false")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("train.compile: there is no C++ compiler; install g++ (or set CXX), or train.compile=false")


def compiled_graphs() -> int:
    """Graphs compiled in this process so far. It must stop growing after the first packs."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
