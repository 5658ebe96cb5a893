"""Which attention library to install where, and that the commands hold the torch that is there."""

from __future__ import annotations

import re
import sys

import pytest

from far_scale.model.attention import __main__, install, selection
from far_scale.model.attention.install import LIBRARIES, Machine, flash_attn_4_command, install_advice, xformers_command
from harness.launch import ROOT


def verdicts(torch: str, cuda: str, capability: tuple[int, int]) -> dict[str, str]:
    _, *lines = install_advice(Machine(torch, cuda, capability))
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def test_the_table_of_xformers() -> None:
    """What pip took in dry runs of 2026-11-26 beside each of these, held as they are."""
    taken = {"2.9.0": "0.0.33.post1", "2.9.1": "0.0.33.post2"}
    taken |= dict.fromkeys(("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.0", "2.14.1", "2.15.0"), "0.0.35")
    for torch, xformers in taken.items():
        for installed in (torch, f"{torch}+cu128"):
            assert xformers_command(installed) == f'pip install "xformers=={xformers}" "torch=={torch}"'
    assert install._minor(install.NEWEST_TORCH) == (2, 15) and all(torch in taken for torch in install._XFORMERS)


def test_flash_attn_4_is_named_with_a_pre_release() -> None:
    """It has no release: without one pip finds nothing."""
    assert flash_attn_4_command("12.8") == 'pip install "flash-attn-4>=4.0.0b10"'
    assert flash_attn_4_command("13.0") == 'pip install "flash-attn-4[cu13]>=4.0.0b10"'
    assert re.search(r'"flash4": \["flash-attn-4>=4\.0\.0b10"\]', (ROOT / "setup.py").read_text())


def test_libraries_are_those_that_do_not_come_with_torch() -> None:
    others = [
        name for name in selection.KERNELS if name not in ("flex", "dense") and selection.get_kernel(name).INSTALL
    ]
    assert list(LIBRARIES) == others
    for name in LIBRARIES:
        assert selection.get_kernel(name).INSTALL.startswith("pip install ")


def test_the_advice_for_each_machine() -> None:
    assert install_advice(Machine("2.13.0+cpu", None, None)) == [
        "to install: nothing; without an NVIDIA GPU all that runs comes with torch"
    ]
    turing = verdicts("2.9.1", "12.8", (7, 5))
    assert turing["xformers"] == 'yes, for sampling: pip install "xformers==0.0.33.post2" "torch==2.9.1"'
    assert all(turing[name].startswith("no: ") for name in LIBRARIES if name != "xformers")
    ampere = verdicts("2.10.0", "12.8", (8, 0))
    assert ampere["flash-attn-2"].startswith("not needed: torch-varlen is the same kernel; a wheel: pip install")
    assert ampere["xformers"].startswith("not needed, but for sampling in float32: pip install")
    assert ampere["flash-attn-4"].startswith("no: ") and ampere["flash-attn-3"].startswith("no: ")
    hopper = verdicts("2.13.0", "13.0", (9, 0))
    assert hopper["flash-attn-4"].startswith("yes, for sampling") and "[cu13]" in hopper["flash-attn-4"]
    assert "nvcc of CUDA 13.0" in hopper["flash-attn-3"] and "compiled for about an hour" in hopper["flash-attn-2"]
    assert hopper["xformers"] == "no: its wheels are for CUDA 12"
    for blackwell in ((10, 0), (10, 3), (11, 0)):
        assert verdicts("2.13.0", "12.9", blackwell)["flash-attn-4"].startswith("yes, first choice here: pip install")
    assert verdicts("2.13.0", "12.9", (12, 0))["flash-attn-4"].startswith("no: ")
    assert len(install_advice(Machine("2.16.0", "13.2", (9, 0)))) == 6, "and a line that this torch was not checked"
    assert "  xformers      installed" in install_advice(Machine("2.13.0", "12.8", (9, 0)), ["xformers"])


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "flash-attn-4"), ((10, 0), "flash-attn-4")])
def test_what_is_worth_it_goes_before_what_torch_has(capability: tuple[int, int], name: str) -> None:
    """The advice and the order of the kernels agree."""
    order = selection._GPU_ORDER_BY_CAPABILITY[capability[0]]
    assert order.index(name) < order.index("torch-varlen")
    assert verdicts("2.13.0", "12.8", capability)[name].startswith("yes")


def test_the_command_ends_with_the_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(__main__, "table_rows", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["attention", "--device", "cpu", "--dtype", "float32"])
    __main__.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("to install: nothing")
