"""Packaging: every module and its data are installed, every imported package is required, and the wheel works."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
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


@pytest.mark.slow
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


def test_the_licence_is_the_standard_text_and_the_notice_names_third_parties() -> None:
    assert sha256(PACKAGE.parent / "LICENSE") == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    notice = (PACKAGE.parent / "NOTICE").read_text()
    for name in ("Freedoom", "ViZDoom", "official FAR", "DC-AE", "VGG16", "LPIPS"):
        assert name in notice
    assert all((PACKAGE.parent / path).is_file() for path in re.findall(r"(?:docs|far_scale)/[\w/.-]+\.\w+", notice))


def test_the_citation_has_this_version() -> None:
    citation = (PACKAGE.parent / "CITATION.cff").read_text()
    assert f"\nversion: {far_scale.__version__}\nlicense: Apache-2.0\n" in citation


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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment with far_scale's wheel, and this environment's other packages."""
    pytest.importorskip("setuptools", minversion="77")
    root, folder = PACKAGE.parent, tmp_path_factory.mktemp("wheel")
    source, wheels, environment = folder / "source", folder / "wheels", folder / "environment"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("far_scale", "recipes"):
        shutil.copytree(root / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "NOTICE"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip"]
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    built = [*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(built, check=True, capture_output=True, text=True)
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (wheel,) = wheels.iterdir()
    install = [*pip, "--python", str(python), "install", *options, str(wheel)]
    subprocess.run(install, check=True, capture_output=True, env=without_pythonpath())
    packages = {"base": str(environment), "platbase": str(environment)}
    # Of a folder that a .pth file names, Python takes the packages and not the .pth files: no editable far_scale.
    others = sysconfig.get_path("purelib")
    Path(sysconfig.get_path("purelib", vars=packages), "others.pth").write_text(f"{others}\n")
    return environment / "bin"


def without_pythonpath() -> dict[str, str]:
    """The environment, in which a checkout's far_scale does not count as installed."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run_installed(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=without_pythonpath(), capture_output=True, text=True, timeout=120)


def test_the_wheel_has_all_recipes_and_protocols(installed: Path, tmp_path: Path) -> None:
    code = "import far_scale; print(far_scale.__path__[0])"
    package = Path(run_installed(tmp_path, str(installed / "python"), "-c", code).stdout.strip())
    assert package.is_relative_to(installed.parent)
    recipes = PACKAGE.parent / "recipes"
    names = sorted(path.relative_to(recipes) for path in recipes.rglob("*.yaml"))
    assert len(names) > 40
    assert (package / "py.typed").is_file() and (package / "play" / "static" / "index.html").is_file()
    assert sorted(path.relative_to(package / "recipes") for path in package.glob("recipes/**/*.yaml")) == names


@pytest.mark.slow
def test_an_installed_wheel_gets_to_the_check_of_the_data(installed: Path, tmp_path: Path) -> None:
    done = run_installed(tmp_path, str(installed / "far-scale"), "train", "demo_cpu", "--dry-run")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: runs/quickstart/shards/train/manifest.json: ")
    code = "from far_scale.evaluation.protocol import load_protocol; print(load_protocol('vizdoom-8to8').name)"
    done = run_installed(tmp_path, str(installed / "python"), "-c", code)
    assert done.stdout == "vizdoom-8to8\n", done.stderr


def test_an_installed_wheel_refuses_to_submit_in_one_line(installed: Path, tmp_path: Path) -> None:
    done = run_installed(tmp_path, str(installed / "far-scale"), "submit", "demo_cpu", "--dry-run")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "a job needs slurm/ of a checkout" in line
    assert list(tmp_path.iterdir()) == []
