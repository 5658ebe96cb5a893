"""What setup.py promises: it installs every module, and requires every other package that far_scale imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest

import far_scale
from far_scale.utils.io import sha256

PACKAGE = Path(far_scale.__file__).parent
SETUP = (PACKAGE.parent / "setup.py").read_text()
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "flash_attn": "flash-attn", "streaming": "mosaicml-streaming"}
BROUGHT_ALONG = {"annotated_types", "pydantic_core"}  # by pydantic, in versions of its choice


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert len(folders) > 5
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_import_is_a_declared_requirement() -> None:
    declared = {name.lower() for name in re.findall(r'"([A-Za-z][\w.-]*?)(?:[<>=].*?)?"', SETUP)}
    imported: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0]: path.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported[node.module.split(".")[0]] = path.name
    foreign = {name: file for name, file in imported.items() if name not in {"far_scale", *sys.stdlib_module_names}}
    assert {"torch", "numpy", "yaml"} <= set(foreign)
    missing = {n: f for n, f in foreign.items() if DISTRIBUTIONS.get(n, n).lower() not in declared | BROUGHT_ALONG}
    assert missing == {}


def test_the_metadata_names_the_licence(tmp_path: Path) -> None:
    """What a wheel and an sdist say of themselves, and the two files that go into them."""
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks for; installed packages may be older
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", str(tmp_path)]
    subprocess.run(command, cwd=PACKAGE.parent, check=True, capture_output=True, text=True)
    (info,) = tmp_path.iterdir()
    metadata = message_from_string((info / "METADATA").read_text())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    for name in ("LICENSE", "NOTICE"):
        assert (info / "licenses" / name).read_bytes() == (PACKAGE.parent / name).read_bytes()


def test_the_licence_is_the_standard_text_and_the_notice_names_what_is_of_others() -> None:
    assert sha256(PACKAGE.parent / "LICENSE") == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    notice = (PACKAGE.parent / "NOTICE").read_text()
    for name in ("Freedoom", "ViZDoom", "official FAR", "DC-AE", "VGG16", "LPIPS"):
        assert name in notice
    assert all((PACKAGE.parent / path).is_file() for path in re.findall(r"(?:docs|far_scale)/[\w/.-]+\.\w+", notice))


def test_shipped_weights_are_installed() -> None:
    weights = PACKAGE / "autoencoder" / "weights"
    assert '"far_scale.autoencoder": ["weights/*"]' in SETUP
    assert list(weights.glob("*.safetensors"))
    assert all(path.is_file() for path in weights.iterdir())  # the pattern takes files, no folders


def test_the_range_of_deepspeed_is_that_of_its_adapter_and_the_lock_is_in_it() -> None:
    from far_scale.train.deepspeed_adapter import FIRST_TESTED, LAST_TESTED

    major, minor, _ = LAST_TESTED
    assert (major, minor, 0) == FIRST_TESTED
    assert f'"deepspeed>={major}.{minor},<{major}.{minor + 1}"' in SETUP
    for name in ("cpu", "cuda"):
        lock = (PACKAGE.parent / "requirements" / f"{name}.txt").read_text()
        assert f"\ndeepspeed=={'.'.join(map(str, LAST_TESTED))}\n" in lock
        assert ("nvidia-nccl" in lock) == (name == "cuda")
        assert (
            f'"{re.search(r"^torch==.*$", lock, re.MULTILINE)[0]}"'
            in (PACKAGE.parent / "tools/setup_env.sh").read_text()
        )
