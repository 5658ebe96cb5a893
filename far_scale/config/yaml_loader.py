"""Reads recipe files: YAML with `extends:`, deep-merged, with overrides, keeping where every key was written."""

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
"""The folder that the package lies in: a checkout (an editable install points there), or site-packages."""
PACKAGE = Path(__file__).resolve().parents[1]
"""The package; a wheel has a copy of recipes/ in it, see setup.py."""
SHIPPED_RECIPES = CHECKOUT / "recipes"


@dataclass(frozen=True)
class Kind:
    """What a file describes, and the folder in which bare names are looked up."""

    name: str
    folder: Path


RECIPE = Kind("recipe", Path("recipes"))
PROTOCOL = Kind("protocol", Path("recipes", "protocols"))


@dataclass
class Document:
    """A recipe's keys, merged over its `extends:` chain and overrides, not yet checked."""

    file: str
    """The file the user named, as it is shown in errors."""
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    """Where each key was last written: `file:line` or `command line`; the n-th item of a list is `n`, from 1."""
    kind: Kind = RECIPE

    def place(self, key: KeyPath) -> str:
        """Where `key` was written, or else the nearest section around it, or else the file."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.file

    def lay(self, values: Mapping[str, Any], places: Mapping[KeyPath, str]) -> None:
        """Lay `values` over this document: sections merge key by key, anything else replaces what was there."""
        _merge(self.values, values)
        # Of a list, or a mapping of numbers, that is replaced as a whole no earlier place may stay.
        replaced = {key[:end] for key in places for end, name in enumerate(key) if name.isdecimal()}
        if replaced:
            kept = [key for key in self.places if not any(key[: len(whole)] == whole for whole in replaced)]
            self.places = {key: self.places[key] for key in kept}
        self.places.update(places)


def read_document(path_or_name: str | Path, overrides: Sequence[str] = (), kind: Kind = RECIPE) -> Document:
    """Read a recipe file with all it extends, then lay the overrides `key.sub=value` over it.

    `name` is not inherited: a file without one is named after the file, so that two recipes never share a run folder.

    Raises:
        UserError: a file is not there or is no YAML, a key is written twice, the chain of `extends:` is a circle, or
            an override is not `key=value`.
    """
    path = find_recipe(str(path_or_name), kind=kind)
    document = _read_chain(path, [], kind)
    for override in overrides:
        key, value, written = _parse_override(override)
        # A section around an overridden key keeps the place where it was written.
        around = [key[:length] for length in range(1, len(key)) if key[:length] not in document.places]
        document.lay(_nested(key, value), dict.fromkeys([*around, *written], "command line"))
    return document


def find_recipe(path_or_name: str, folder: Path | None = None, kind: Kind = RECIPE) -> Path:
    """The file of a recipe: a path, or a name in `folder`, ./recipes, the checkout's recipes/ or the package's.

    Files of another kind are looked up in their own folder, such as recipes/protocols.

    A path is relative to `folder`, which is the folder of the file that says `extends:` (default: the working folder).

    Raises:
        UserError: there is none; names the nearest one there is.
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


def _read_chain(path: Path, above: list[Path], kind: Kind) -> Document:
    """`path` laid over what it extends; `above` are the files that led here."""
    shown = _shown(path)
    if path.resolve() in above:
        circle = " -> ".join(_shown(file) for file in [*above, path.resolve()])
        raise UserError(f"{shown}: extends: goes round in a circle ({circle}); take one extends: out")
    values, places = _read_file(path, shown)
    parent = values.pop("extends", None)
    document = Document(shown, kind=kind)
    if parent is not None:
        place = places[("extends",)]
        if not isinstance(parent, str):
            raise UserError(f"{place}: extends: must be one {kind.name}'s path or name, got {parent!r}")
        try:
            parent_path = find_recipe(parent, path.parent, kind)
        except UserError as error:
            raise UserError(f"{place}: extends: {error}") from None
        document = _read_chain(parent_path, [*above, path.resolve()], kind)
        document.file = shown
    document.values["name"] = path.stem
    document.lay(values, places)
    return document


def _read_file(path: Path, shown: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: this recipe cannot be read ({error})") from None
    values, places = _parse(text, shown)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{shown}: a recipe is sections of `key: value` lines; this file holds {str(values)[:40]!r}")
    return values, places


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads 1e-4 as a number (YAML 1.1, and so PyYAML, wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, shown: str) -> tuple[Any, dict[KeyPath, str]]:
    """The values of a YAML text and the place of every key in it."""
    places: dict[KeyPath, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _value(loader, node, (), places, shown)), places
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{shown}{line}: this is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an alias may hold itself
        raise UserError(f"{shown}: this is not YAML: {' '.join(str(error).split())}") from None


def _value(loader: _Loader, node: yaml.Node, key: KeyPath, places: dict[KeyPath, str], shown: str) -> Any:
    """A node's value; keys stay the text that was written (YAML would make `on:` a truth value)."""
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value, start=1):
            item_key = (*key, str(number))
            if isinstance(item, yaml.MappingNode):
                places[item_key] = f"{shown}:{item.start_mark.line + 1}"
            items.append(_value(loader, item, item_key, places, shown))
        return items
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping: dict[str, Any] = {}
    for name_node, value_node in node.value:
        sub = (*key, str(name_node.value))
        place = f"{shown}:{name_node.start_mark.line + 1}"
        if sub[-1] in mapping:
            raise UserError(f"{place}: {'.'.join(sub)}: written twice (first at {places[sub]}); keep one")
        places[sub] = place
        mapping[sub[-1]] = _value(loader, value_node, sub, places, shown)
    return mapping


def _parse_override(override: str) -> tuple[KeyPath, Any, list[KeyPath]]:
    """The key, its value, and every key that the override writes (several where the value is a section)."""
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if "\ufffd" in override.encode(errors="surrogateescape").decode(errors="replace"):
        raise UserError(f"command line: {override!r:.200} is no text in UTF-8; write it in UTF-8")
    if not equals or not all(key):
        raise UserError(f"command line: {override!r:.200} is no override; write key=value, such as train.steps=100")
    if key == ("extends",):
        raise UserError("command line: extends cannot be overridden; name the other recipe instead")
    value, places = _parse(text, f"command line: {name}")
    return key, value, [key, *((*key, *sub) for sub in places)]


def _nested(key: KeyPath, value: Any) -> dict[str, Any]:
    for name in reversed(key):
        value = {name: value}
    return value


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        # A mapping whose keys are numbers is a value (a distribution over lengths), not a section.
        if isinstance(value, Mapping) and isinstance(below.get(name), dict) and not any(map(str.isdecimal, value)):
            _merge(below[name], value)
        else:
            below[name] = value


def _shown(path: Path) -> str:
    """A path as errors show it: from the working folder where it lies inside that."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
