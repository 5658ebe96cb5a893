"""What tools/setup_env.sh does with a .venv that is there already.

Python and pip are stand-ins that write down their calls.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.drill import wait_until
from harness.launch import ROOT
from harness.processes import program

# `python -m venv FOLDER` puts this program into the folder, once there is no file `hold`; with the file `broken`, pip
# installs nothing.
PYTHON = """
here=HERE
case "$*" in
    "-m venv"*)
        echo venv >> $here/calls
        while [ -e $here/hold ]; do sleep 0.02; done
        mkdir -p "${@: -1}/bin"
        cp $here/bin/python3 "${@: -1}/bin/python"
        ;;
    "-m pip"*) echo pip >> $here/calls; [ ! -e $here/broken ] || exit 1 ;;
    --version) echo Python 3.11.0 ;;
    *torch.cuda*) exit 1 ;;
esac
"""
VENV = ".venv was not made by tools/setup_env.sh, which would replace it; rename or remove it and start again"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script and what it reads; beside it `bin` with the stand-ins."""
    checkout = tmp_path / "checkout"
    for name in ("tools/setup_env.sh", "setup.py", "pyproject.toml", "requirements/cpu.txt"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for name in ("python3", "c++", "nvidia-smi"):
        program(tmp_path / "bin" / name, PYTHON.replace("HERE", str(tmp_path)) if name == "python3" else "exit 1")
    return checkout


def start(checkout: Path) -> subprocess.Popen[str]:
    environment = {"PATH": f"{checkout.parent}/bin:{os.environ['PATH']}"}
    command = ["bash", str(checkout / "tools" / "setup_env.sh")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def set_up(checkout: Path) -> tuple[int, str]:
    """The exit status and the last line of the errors."""
    process = start(checkout)
    _, errors = process.communicate()
    return process.returncode, (errors.splitlines() or [""])[-1]


def environments_made(checkout: Path) -> int:
    calls = checkout.parent / "calls"
    return calls.read_text().split().count("venv") if calls.exists() else 0


def test_makes_it_once(checkout: Path) -> None:
    assert set_up(checkout) == (0, "")
    assert set_up(checkout) == (0, "")
    assert environments_made(checkout) == 1
    (checkout / ".venv" / "of_old").touch()
    (checkout / "requirements" / "cpu.txt").write_text("torch==99\n")  # as an update of the checkout does
    assert set_up(checkout) == (0, "")
    assert environments_made(checkout) == 2
    assert not (checkout / ".venv" / "of_old").exists()


def test_somebody_elses_is_refused(checkout: Path) -> None:
    own = checkout / ".venv" / "lib" / "own.py"
    own.parent.mkdir(parents=True)
    own.write_text("kept")
    assert set_up(checkout) == (2, f"error: {VENV}")
    assert own.read_text() == "kept"
    assert environments_made(checkout) == 0


def test_a_link_is_refused(checkout: Path) -> None:
    """Even to an environment that the script has made, for another checkout."""
    assert set_up(checkout) == (0, "")
    other = checkout.with_name("other")
    shutil.copytree(checkout, other, ignore=shutil.ignore_patterns(".venv"))
    (other / ".venv").symlink_to(checkout / ".venv")
    refusal = f".venv is a link to {checkout}/.venv, whose files would be replaced; remove the link and start again"
    assert set_up(other) == (2, f"error: {refusal}")
    assert (checkout / ".venv" / "bin" / "python").exists()
    assert environments_made(checkout) == 1


def test_goes_on_after_a_failure(checkout: Path) -> None:
    broken = checkout.parent / "broken"
    broken.touch()
    status, error = set_up(checkout)
    assert status == 2 and error.startswith("error: pip could not install torch==")
    broken.unlink()
    assert set_up(checkout) == (0, "")
    assert environments_made(checkout) == 2


def test_two_at_once_make_one(checkout: Path) -> None:
    hold = checkout.parent / "hold"
    hold.touch()
    first = start(checkout)
    assert wait_until(lambda: environments_made(checkout) == 1)
    second = start(checkout)
    assert second.stdout is not None
    assert second.stdout.readline() == "setup: waiting until another process has set up .venv\n"
    hold.unlink()
    for process in (first, second):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert environments_made(checkout) == 1
