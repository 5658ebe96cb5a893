"""Reads recipe files: YAML with `extends:` and overrides, deep-merged; records where each key was written."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from far_scale.utils.errors import UserError

KeyPath = tuple[str, ...]

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that contains the package: a checkout (an editable install points there), or site-packages."""
PACKAGE = Path(__file__).resolve().parents[1]
"""The package; a wheel has a copy of recipes/ in it, see setup.py."""


@dataclass(frozen=True)
class Kind:
    """A kind of recipe file, and the folder where bare names are looked up."""

    name: str
    folder: Path


RECIPE = Kind("recipe", Path("recipes"))
PROTOCOL = Kind("protocol", Path("recipes", "protocols"))


@dataclass
class Document:
    """A recipe's keys, merged over its `extends:` chain and overrides, not yet checked."""

    file: str
    """The file that the user named, as errors show it."""
    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, str] = field(default_factory=dict)
    """Where each key was last written: `file:line` or `command line`. List items are counted from 1."""
    kind: Kind = RECIPE

    def location(self, key: KeyPath) -> str:
        """Where `key` was written, or else its nearest parent section, or else the file."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.locations:
                return self.locations[key[:length]]
        return self.file

    def override(self, values: Mapping[str, Any], locations: Mapping[KeyPath, str]) -> None:
        """Merge `values` into this document: sections key by key; any other value replaces the earlier one."""
        _merge(self.values, values)
        # Lists and mappings of numbers are replaced as a whole, so the locations of the earlier items go.
        replaced = {key[:end] for key in locations for end, name in enumerate(key) if name.isdecimal()}
        self.locations = {
            key: location
            for key, location in self.locations.items()
            if not any(key[: len(parent)] == parent for parent in replaced)
        }
        self.locations.update(locations)


def read_document(path_or_name: str | Path, overrides: Sequence[str] = (), kind: Kind = RECIPE) -> Document:
    """Read a recipe file and those it extends, then apply the overrides `key.sub=value`.

    `name` is not inherited but defaults to the name of the file, so that two recipes never share a run directory.

    Raises:
        UserError: a file is missing or not YAML, a key is written twice, `extends:` is circular, or an override is not
            `key=value`.
    """
    path = find_recipe(str(path_or_name), kind=kind)
    document = _read_chain(path, [], kind)
    for override in overrides:
        key, value, written = _parse_override(override)
        # Sections around the key that are in the file keep their locations.
        new_parents = [key[:length] for length in range(1, len(key)) if key[:length] not in document.locations]
        document.override(_nested(key, value), dict.fromkeys([*new_parents, *written], "command line"))
    return document


def extends_chain(path_or_name: str | Path, kind: Kind = RECIPE) -> list[Path]:
    """A recipe file and those it extends, the oldest parent last.

    Raises:
        UserError: as `read_document`.
    """
    files: list[Path] = []
    parent: Any = str(path_or_name)
    while isinstance(parent, str):
        files.append(find_recipe(parent, files[-1].parent if files else None, kind))
        if files[-1].resolve() in [file.resolve() for file in files[:-1]]:
            raise UserError(f"{_display_path(files[0])}: extends: is circular; remove one extends:")
        parent = _read_file(files[-1], _display_path(files[-1]))[0].get("extends")
    return files


def find_recipe(path_or_name: str, folder: Path | None = None, kind: Kind = RECIPE) -> Path:
    """The file of a recipe: a path, or a name in `folder`, ./recipes, the checkout's recipes/ or the package's.

    Args:
        folder: of the file that extends this one, from which relative paths start; the working folder where None.
        kind: other kinds are looked up in their own folders, such as recipes/protocols.

    Raises:
        UserError: there is no such file; names the most similar one.
    """
    direct = (folder or Path()) / path_or_name
    if direct.is_file():
        return direct
    folders = [kind.folder, CHECKOUT / kind.folder, PACKAGE / kind.folder]
    if folder is not None:
        folders.insert(0, folder)
    if os.sep not in path_or_name:
        for candidate in folders:
            for name in (path_or_name, f"{path_or_name}.yaml"):
                if (candidate / name).is_file():
                    return candidate / name
    known = sorted({file.stem for candidate in folders for file in candidate.glob("*.yaml")})
    near = difflib.get_close_matches(Path(path_or_name).stem, known, n=1, cutoff=0.0)
    hint = f"; nearest is {near[0]} (there are: {', '.join(known)})" if near else ""
    shipped = next((candidate for candidate in folders[-2:] if candidate.is_dir()), folders[-2])
    raise UserError(f"{path_or_name}: there is no such {kind.name}, neither a file nor a name in {shipped}{hint}")


def _read_chain(path: Path, children: list[Path], kind: Kind) -> Document:
    """Read `path` over the file that it extends; `children` are the files that extend it."""
    source = _display_path(path)
    if path.resolve() in children:
        circle = " -> ".join(_display_path(file) for file in [*children, path.resolve()])
        raise UserError(f"{source}: extends: is circular ({circle}); remove one extends:")
    values, locations = _read_file(path, source)
    parent = values.pop("extends", None)
    document = Document(source, kind=kind)
    if parent is not None:
        location = locations[("extends",)]
        if not isinstance(parent, str):
            raise UserError(f"{location}: extends: must be one {kind.name}'s path or name, got {parent!r}")
        try:
            parent_path = find_recipe(parent, path.parent, kind)
        except UserError as error:
            raise UserError(f"{location}: extends: {error}") from None
        document = _read_chain(parent_path, [*children, path.resolve()], kind)
        document.file = source
    document.values["name"] = path.stem
    document.override(values, locations)
    return document


def _read_file(path: Path, source: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: this recipe cannot be read ({error})") from None
    values, locations = _parse(text, source)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is sections of `key: value` lines; this file holds {str(values)[:40]!r}")
    return values, locations


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but 1e-4 is a number (YAML 1.1, and so PyYAML, requires 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, source: str) -> tuple[Any, dict[KeyPath, str]]:
    """The values of a YAML text, and the location of every key."""
    locations: dict[KeyPath, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _construct(loader, node, (), locations, source)), locations
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: this is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an alias may hold itself
        raise UserError(f"{source}: this is not YAML: {' '.join(str(error).split())}") from None


def _construct(loader: _Loader, node: yaml.Node, key: KeyPath, locations: dict[KeyPath, str], source: str) -> Any:
    """The value of a node; keys stay strings (YAML would read `on:` as true)."""
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value, start=1):
            item_key = (*key, str(number))
            if isinstance(item, yaml.MappingNode):
                locations[item_key] = f"{source}:{item.start_mark.line + 1}"
            items.append(_construct(loader, item, item_key, locations, source))
        return items
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping: dict[str, Any] = {}
    for name_node, value_node in node.value:
        sub = (*key, str(name_node.value))
        location = f"{source}:{name_node.start_mark.line + 1}"
        if sub[-1] in mapping:
            raise UserError(f"{location}: {'.'.join(sub)}: written twice (first at {locations[sub]}); keep one")
        locations[sub] = location
        mapping[sub[-1]] = _construct(loader, value_node, sub, locations, source)
    return mapping


def _parse_override(override: str) -> tuple[KeyPath, Any, list[KeyPath]]:
    """The key, its value, and all keys that the override writes: several if the value is a section."""
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if "\ufffd" in override.encode(errors="surrogateescape").decode(errors="replace"):
        raise UserError(f"command line: {override!r:.200} is not UTF-8; write it in UTF-8")
    if not equals or not all(key):
        raise UserError(f"command line: {override!r:.200} is no override; write key=value, such as train.steps=100")
    if key == ("extends",):
        raise UserError("command line: extends cannot be overridden; name the other recipe instead")
    value, locations = _parse(text, f"command line: {name}")
    return key, value, [key, *((*key, *sub) for sub in locations)]


def _nested(key: KeyPath, value: Any) -> dict[str, Any]:
    name, *rest = key
    return {name: _nested(tuple(rest), value) if rest else value}


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        # A mapping whose keys are numbers is a value (a distribution over lengths), not a section.
        if isinstance(value, Mapping) and isinstance(base.get(name), dict) and not any(map(str.isdecimal, value)):
            _merge(base[name], value)
        else:
            base[name] = value


def _display_path(path: Path) -> str:
    """A path as errors show it: relative if it is inside the working folder."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
