"""Command-line arguments that benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import torch

from far_scale.utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def count(text: str) -> int:
    """An argument that must be 1 or more."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_measuring(
    parser: argparse.ArgumentParser, repeats: int, minutes: float, device: Literal["cpu"] | None = None
) -> None:
    """How often and on what: `--repeats`, `--minutes`, `--threads`, `--device`, `--out`, with these defaults."""
    parser.add_argument("--repeats", type=count, default=repeats, help="timings of each side (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=minutes,
        help="per case: begin no further repeat after these (default: %(default)s)",
    )
    parser.add_argument("--threads", type=count, help="torch threads (default: torch's choice)")
    default = device or "cuda where there is a GPU, else cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default: {default}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")


def start(args: argparse.Namespace) -> torch.device:
    """Set the threads; returns the device.

    Raises:
        UserError: there is no such device.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    return device
