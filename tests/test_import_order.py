"""The layout of the package: imports run one way, without cycles, and few files take the whole recipe."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import far_scale

PACKAGE = Path(far_scale.__file__).parent

LAYERS = (
    "far_scale.cli",
    "far_scale.play",
    "far_scale.slurm",
    "far_scale.evaluation",
    "far_scale.sampling",
    "far_scale.train",
    "far_scale.autoencoder.training",
    "far_scale.convert",
    "far_scale.health",
    "far_scale.distributed",
    "far_scale.config",
    "far_scale.data",
    "far_scale.autoencoder",
    "far_scale.model",
    "far_scale.utils",
)
"""From top to bottom: a module imports from its own layer and from those below. Command lines import from all."""

MAX_RECIPE_FILES = 15


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its full name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees


@cache
def imports() -> dict[str, set[str]]:
    """The modules of far_scale that each module imports, also within functions and for type checkers only."""
    found: dict[str, set[str]] = {}
    for module, tree in modules().items():
        targets = (_existing(name) for name in _imported_names(tree))
        found[module] = {target for target in targets if target not in (None, "far_scale", module)}
    return found


def _imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _existing(name: str) -> str | None:
    """The module that `name` is or comes from; None for other packages."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def layer(module: str) -> int:
    """The position of a module in LAYERS."""
    containing = [name for name in LAYERS if f"{module}.".startswith(f"{name}.")]
    assert containing, f"{module} is in no layer"
    return LAYERS.index(max(containing, key=len))


def is_command_line(module: str) -> bool:
    return module in ("far_scale.launch", "far_scale.recipe") or module.endswith(".__main__")


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in order:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], order[target])
        if lowest[node] == order[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(component)

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


@pytest.mark.slow
def test_imports_run_one_way() -> None:
    upward = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in sorted(targets)
        if module != "far_scale" and not is_command_line(module) and layer(target) < layer(module)
    ]
    assert upward == []


def test_no_import_cycle_between_files() -> None:
    assert cycles(imports()) == []


def test_no_import_cycle_between_the_parts_of_data() -> None:
    def part(module: str) -> str:
        return ".".join(module.split(".")[:3])

    graph: dict[str, set[str]] = {}
    for module, targets in imports().items():
        if module.startswith("far_scale.data."):
            inside = {part(target) for target in targets if target.startswith("far_scale.data.")}
            graph.setdefault(part(module), set()).update(inside - {part(module)})
    assert cycles(graph) == []


def test_few_files_take_the_whole_recipe() -> None:
    """A component takes its section of the recipe."""

    def takes_recipe(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        annotations = [ast.unparse(argument.annotation) for argument in arguments if argument.annotation]
        return any("Recipe" in text.strip("'\"").replace("|", " ").split() for text in annotations)

    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    files = [
        module
        for module, tree in modules().items()
        if any(isinstance(node, functions) and takes_recipe(node) for node in ast.walk(tree))
    ]
    assert len(files) <= MAX_RECIPE_FILES, files


def test_cycles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_architecture_page_lists_the_same_order() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    folders = [layer.replace(".", "/") for layer in LAYERS]
    positions = [text.find(f"| `{folder}/` |") for folder in folders if (PACKAGE.parent / folder).is_dir()]
    assert -1 not in positions and positions == sorted(positions)
