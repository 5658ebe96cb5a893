"""The documentation: links and anchors resolve, and files, modules, flags and recipes in its commands exist."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from far_scale.autoencoder.training.recipe import AutoencoderRecipe, DCAEModel, VideoData
from far_scale.cli.main import COMMANDS
from far_scale.config.recipe import Recipe
from far_scale.config.reference import reference
from harness.launch import ROOT

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "tests/README.md")),
        *(ROOT / "docs").glob("*.md"),
    ]
)
# Programs that are not ours, whose options are not looked at.
OTHERS = {
    "cp",
    "git",
    "pip",
    "pre-commit",
    "pytest",
    "rm",
    "scancel",
    "source",
    "squeue",
    "tail",
    "tensorboard",
    "wandb",
}
LAUNCHERS = {"bash", "deepspeed", "python", "sbatch", "srun", "torchrun"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_0-9]*(\.\w+)?|<.*|\.\.\.")
RECIPE_COMMANDS = {"train", "submit", "train-autoencoder"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each_page
def test_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "benchmarks|docs|far_scale|recipes|requirements|slurm|tests|tools"
    names = set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w@./-]*\w)(?![\w*<{{])", page.read_text()))
    may_be_absent = {"slurm/site.sh", "recipes/deeper.yaml"}  # which the reader writes
    gone = sorted(name for name in names - may_be_absent if not (ROOT / name).exists() and not placeholder(name))
    assert gone == []


def placeholder(name: str) -> bool:
    return any(PLACEHOLDER.fullmatch(part) for part in name.split("/"))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the page's bash blocks, and of those that are indented."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^    (?:bash|git|pip|python|torchrun|sbatch) .*\n(?:    .*\n)*", prose(page), re.MULTILINE)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
            lexer.whitespace_split = True
            words = list(lexer)
            while words:
                end = next((n for n, word in enumerate(words) if set(word) <= set(";|&")), len(words))
                command, words = words[:end], words[end + 1 :]
                while command and re.match(r"[A-Za-z_]+=", command[0]):
                    command = command[1:]
                if command:
                    yield command


def source(command: list[str]) -> tuple[Path, list[str]] | None:
    """The file that a command runs and its arguments; None where that is none of ours."""
    if command[0] in OTHERS:
        return None
    if command[0] == "far-scale":
        entry = COMMANDS[command[1]]
        return module_file(entry.module), command[2:]
    for number, word in enumerate(command):
        if word == "-m" and command[number + 1].startswith("far_scale"):
            return module_file(command[number + 1]), command[number + 2 :]
        if re.fullmatch(r"(tools|benchmarks|slurm)/\w+\.(py|sh)", word):
            return ROOT / word, command[number + 1 :]
        if word == "far-scale":
            return source(command[number:])
    return None


def module_file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    candidates = [path / "__main__.py", path.with_suffix(".py"), ROOT / "tools" / f"{path.name}.py"]
    found = [candidate for candidate in candidates if candidate.is_file()]
    assert found, f"{module}: no such module"
    return found[0]


@cache
def flags(path: Path) -> re.Pattern[str]:
    """The flags of a command line, read from its calls of add_argument, also where their names are put together."""
    names = ["-h", "--help"]
    if path.suffix == ".sh":
        names += re.findall(r"--[a-z][\w-]*", path.read_text())
    # A wrapper's parser is in the package, what benchmarks share in options.py; a job passes on what its tool takes.
    files = [path, *(ROOT / folder / f"{path.stem}.py" for folder in ("tools", "far_scale/cli"))]
    if path.parent.name == "benchmarks":
        files += [path.with_name("options.py")]
    for file in files:
        is_python = file.suffix == ".py" and file.is_file()
        for node in ast.walk(ast.parse(file.read_text())) if is_python else ():
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                for argument in node.args:
                    if isinstance(argument, ast.Constant):
                        names.append(re.escape(argument.value))
                    elif isinstance(argument, ast.JoinedStr):
                        parts = [re.escape(p.value) if isinstance(p, ast.Constant) else r"\w+" for p in argument.values]
                        names.append("".join(parts))
    return re.compile("|".join(names))


@cache
def recipe_keys(is_autoencoder: bool) -> set[str]:
    model = AutoencoderRecipe[DCAEModel, VideoData] if is_autoencoder else Recipe
    return set(re.findall(r"^ +([a-z][\w.]*)  \(", reference(model), re.MULTILINE))


@each_page
def test_commands_name_what_exists(page: Path) -> None:
    problems = []
    for command in commands(page):
        found = source(command)
        if found is None:
            if command[0] not in OTHERS | LAUNCHERS:
                problems.append(f"{command[0]}: unknown command")
            continue
        path, arguments = found
        if not path.is_file():
            problems.append(f"{path}: no such file")
            continue
        if "--" in arguments:
            arguments = arguments[: arguments.index("--")]  # what follows goes to sbatch
        for word in arguments:
            name = word.partition("=")[0]
            if name.startswith("--") and not flags(path).fullmatch(name):
                problems.append(f"{path.name}: no flag {name}")
        problems += recipe_problems(path, arguments)
    assert problems == []


def test_commands_are_found() -> None:
    """The checks of commands have something to check."""
    count = {
        str(page.relative_to(ROOT)): sum(source(command) is not None for command in commands(page)) for page in PAGES
    }
    assert sum(count.values()) > 50 and min(count["README.md"], count["docs/slurm.md"], count["docs/data.md"]) > 2, (
        count
    )


def recipe_problems(path: Path, arguments: list[str]) -> list[str]:
    """The recipes that are not there, and overrides of keys that no recipe has, of a command that takes them."""
    name = path.parent.name if path.name == "__main__.py" else path.stem
    if path.parent.name == "slurm" or name.replace("_", "-") not in RECIPE_COMMANDS:
        return []
    problems = []
    recipe = arguments[0] if arguments and not arguments[0].startswith("-") else "RECIPE"
    known = [ROOT / recipe, ROOT / "recipes" / f"{recipe}.yaml"]
    if not PLACEHOLDER.fullmatch(recipe) and not any(file.is_file() for file in known):
        problems.append(f"{recipe}: no such recipe")
    for word in arguments[1:]:
        key = re.match(r"([a-z_]+(?:\.[a-z_]+)*)=", word)
        if key and key[1] not in recipe_keys(name == "train_autoencoder"):
            problems.append(f"{key[1]}: no such key")
    return problems


@each_page
def test_python_names_exist(page: Path) -> None:
    """Those in modules of the package, as in `from far_scale.evaluation.weights import load_i3d`."""
    text = page.read_text()
    names = set(re.findall(r"\bfar_scale(?:\.\w+)+", text))
    for module, imported in re.findall(r"^from (far_scale\S*) import ([\w, ]+)$", text, re.MULTILINE):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    names = {name for name in names if importlib.util.find_spec(".".join(name.split(".")[:2])) is not None}
    missing = []
    for name in sorted(names):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert missing == []


def test_the_readme_is_short_and_starts_with_what_it_does() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    picture, two_commands = lines.index(next(line for line in lines if line.startswith("!["))), "## Two commands"
    assert lines[2].startswith("far_scale trains") and picture < lines.index(two_commands)
