"""What setup.py promises: it installs every module, and requires every other package that far_scale imports."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import far_scale

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


def test_shipped_weights_are_installed() -> None:
    weights = PACKAGE / "autoencoder" / "weights"
    assert '"far_scale.autoencoder": ["weights/*"]' in SETUP
    assert list(weights.glob("*.safetensors"))
    assert all(path.is_file() for path in weights.iterdir())  # the pattern takes files, no folders
