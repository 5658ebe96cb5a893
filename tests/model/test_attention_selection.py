"""Which kernel is chosen where, the log line about it, and the errors for unusable ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from far_scale.model.attention import selection
from far_scale.model.attention.selection import KERNELS, choose_kernel
from far_scale.utils.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PACKAGES = {"flash-attn-4", "flash-attn-3", "flash-attn-2", "xformers"}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(selection.KERNEL_VARIABLE, raising=False)
    selection._choose_cached.cache_clear()
    yield
    selection._choose_cached.cache_clear()


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: set[str]) -> None:
    """A machine with a GPU of this compute capability, where these libraries are installed."""

    def unusable_reason(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if name in PACKAGES - installed:
            return "not installed"
        precise = dtype == torch.float32 and name not in ("xformers", "flex", "dense")
        return "takes bfloat16 and float16, not float32" if precise else None

    monkeypatch.setattr(selection, "compute_capability", lambda device: capability)
    monkeypatch.setattr(selection, "unusable_reason", unusable_reason)


@pytest.mark.parametrize(
    ("compiled", "capability", "installed", "dtype", "name", "why"),
    [
        (True, (9, 0), PACKAGES, torch.bfloat16, "flex", "first choice on compute capability 9.0"),
        (True, (10, 0), PACKAGES, torch.bfloat16, "flash-attn-4", "first choice on compute capability 10.0"),
        (True, (10, 3), PACKAGES, torch.bfloat16, "flash-attn-4", "first choice on compute capability 10.3"),
        (True, (8, 6), PACKAGES, torch.bfloat16, "flex", "first choice on compute capability 8.6"),
        (True, (12, 0), PACKAGES, torch.bfloat16, "flex", "first choice on compute capability 12.0"),
        (
            True,
            (10, 0),
            set(),
            torch.float16,
            "flex",
            "on compute capability 10.0; flash-attn-4: not installed",
        ),
        (True, (8, 0), {"flash-attn-2"}, torch.float32, "flex", "first choice on compute capability 8.0"),
        (False, (9, 0), PACKAGES, torch.bfloat16, "flash-attn-3", "first choice on compute capability 9.0"),
        (
            False,
            (9, 0),
            set(),
            torch.bfloat16,
            "torch-varlen",
            "on compute capability 9.0; flash-attn-3, flash-attn-4, flash-attn-2: not installed",
        ),
        (
            False,
            (8, 0),
            {"flash-attn-2"},
            torch.float32,
            "dense",
            "on compute capability 8.0; flash-attn-2, torch-varlen: takes bfloat16 and float16, not float32; "
            "xformers: not installed",
        ),
    ],
)
def test_choice_on_gpus(
    compiled: bool,
    capability: tuple[int, int],
    installed: set[str],
    dtype: torch.dtype,
    name: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(monkeypatch, capability, installed)
    assert choose_kernel("auto", GPU, dtype, 64, compiled) == (name, f"attention: {name} ({why})")


def test_choice_on_a_cpu() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert choose_kernel("auto", CPU, dtype, 64) == ("cpu", "attention: cpu (first choice on a CPU)")
    assert choose_kernel("auto", torch.device("meta"), torch.float32, 64).name == "dense"


def test_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, (9, 0), PACKAGES)
    assert choose_kernel("flash-attn-2", GPU, torch.bfloat16, 64) == (
        "flash-attn-2",
        "attention: flash-attn-2 (requested)",
    )
    assert choose_kernel("dense", CPU, torch.bfloat16, 64).name == "dense"


def test_the_environment_goes_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_SCALE_ATTENTION", "dense")
    why = "attention: dense (requested by FAR_SCALE_ATTENTION)"
    assert (
        choose_kernel("auto", CPU, torch.float32, 64) == choose_kernel("cpu", CPU, torch.float32, 64) == ("dense", why)
    )
    monkeypatch.setenv("FAR_SCALE_ATTENTION", "")
    assert choose_kernel("auto", CPU, torch.float32, 64).name == "cpu"


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as error:
        choose_kernel("flash-attn", CPU, torch.float32, 64)
    known = "auto, flash-attn-4, flash-attn-3, flash-attn-2, torch-varlen, xformers, cpu, flex, dense"
    assert str(error.value) == f"attention flash-attn: no such kernel; nearest is flash-attn-4 (known: {known})"
    monkeypatch.setenv("FAR_SCALE_ATTENTION", "sdpa")
    with pytest.raises(UserError, match=r"^FAR_SCALE_ATTENTION=sdpa: no such kernel"):
        choose_kernel("auto", CPU, torch.float32, 64)


def test_asked_for_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, with the reason and the command that installs it."""
    on(monkeypatch, (9, 0), set())
    monkeypatch.setattr(selection, "installed_version", lambda package: None)
    for name in PACKAGES:
        install = selection.get_kernel(name).INSTALL
        assert install.startswith("pip install ")
        with pytest.raises(UserError) as error:
            choose_kernel(name, GPU, torch.bfloat16, 64)
        assert str(error.value) == f"attention {name}: not installed; install it with: {install}"


def test_asked_for_one_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "installed_version", lambda package: None)
    with pytest.raises(UserError) as error:
        choose_kernel("xformers", CPU, torch.float32, 64)
    expected = "attention xformers: runs only on NVIDIA GPUs, and it is not installed; install it with: "
    assert str(error.value) == expected + selection.get_kernel("xformers").INSTALL
    with pytest.raises(UserError, match=r"^attention flex: FlexAttention has no backward on a CPU$"):
        choose_kernel("flex", CPU, torch.float32, 64)
    monkeypatch.setattr(selection, "installed_version", lambda package: "2.13.0")
    with pytest.raises(UserError, match=r"^attention torch-varlen: runs only on NVIDIA GPUs$"):
        choose_kernel("torch-varlen", CPU, torch.float32, 64)


def test_every_name_has_its_kernel() -> None:
    for name in KERNELS:
        if name not in ("flex", "dense"):
            module = selection.get_kernel(name)
            assert name == module.NAME and module.PACKAGE and callable(module.forward) and callable(module.backward)
