"""`python -m far_scale.model.attention [--device D] [--dtype T]`: which attention kernels are usable here, their errors
against the dense reference in float64, their milliseconds, and which libraries are worth installing, and how."""

from __future__ import annotations

import argparse

import torch

from far_scale.model.attention import choose_kernel
from far_scale.model.attention.install import LIBRARIES, Machine, install_advice
from far_scale.model.attention.kernel import installed_version
from far_scale.model.attention.selection import get_kernel
from far_scale.model.attention.table import HEAD_DIM, table_rows
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m far_scale.model.attention", description=__doc__)
    parser.add_argument("--device", help="cpu, cuda or cuda:1; the first GPU unless given, a CPU where there is none")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="only this one (default: bfloat16, float32 and on GPUs float16)"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is no NVIDIA GPU here")
    on_cpu = device.type == "cpu"
    names = [arguments.dtype] if arguments.dtype else [name for name in DTYPES if not (on_cpu and name == "float16")]
    dtypes = [getattr(torch, name) for name in names]
    for line in table_rows(device, dtypes, *((1, 8, 4) if on_cpu else (4, 16, 12))):
        print(line, flush=True)
    print(choose_kernel("auto", device, dtypes[0], HEAD_DIM).why)
    capability = None if on_cpu or torch.version.hip else torch.cuda.get_device_capability(device)
    machine = Machine(torch.__version__, torch.version.cuda, capability)
    for line in install_advice(machine, [name for name in LIBRARIES if installed_version(get_kernel(name).PACKAGE)]):
        print(line)


if __name__ == "__main__":
    main()
