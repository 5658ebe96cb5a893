"""Imports go one way through the folders, in the order of docs/architecture.md, and no files import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter

from harness.launch import ROOT

PACKAGE = ROOT / "far_scale"
ORDER = [
    "cli",
    "play",
    "slurm",
    "evaluation",
    "sampling",
    "train",
    "autoencoder.training",
    "convert",
    "health",
    "distributed",
    "config",
    "data",
    "autoencoder",
    "model",
    "utils",
]
COMMANDS = {"recipe"}  # modules at the package's root that are run, and that nothing imports
UPWARD = {("train.__main__", "evaluation.validation_videos")}  # training is given what samples its videos


@cache
def modules() -> dict[str, ast.Module]:
    """The modules by their name without `far_scale.`; a package's is its __init__.py's."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        if name:
            names[name] = ast.parse(path.read_text())
    return names


def imports(node: ast.AST, deferred: bool) -> Iterator[str]:
    """The modules that one imports; with `deferred` also within functions; never those for type checking alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not deferred:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module is not None:
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield whole if whole.removeprefix("far_scale.") in modules() else child.module
        else:
            yield from imports(child, deferred)


def own_imports(name: str, deferred: bool) -> set[str]:
    found = {target.removeprefix("far_scale.") for target in imports(modules()[name], deferred)}
    return found & modules().keys()


def rank(name: str) -> int:
    folders = [folder for folder in ORDER if name == folder or name.startswith(f"{folder}.")]
    assert folders, f"far_scale.{name}: its folder is not in the order of docs/architecture.md"
    return ORDER.index(max(folders, key=len))


def test_imports_go_down() -> None:
    edges = {(name, target) for name in modules() if name not in COMMANDS for target in own_imports(name, True)}
    assert len(edges) > 300
    assert {edge for edge in edges if rank(edge[0]) > rank(edge[1])} == UPWARD


def test_no_files_import_each_other() -> None:
    graph = {name: own_imports(name, False) - {name} for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"these import each other: {' <- '.join(error.args[1])}") from None


def test_the_page_has_the_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    positions = [text.find(f"| `far_scale/{folder.replace('.', '/')}/` |") for folder in ORDER]
    present = [position for folder, position in zip(ORDER, positions, strict=True) if (PACKAGE / folder).is_dir()]
    assert -1 not in present and present == sorted(present)
