"""How the recipe of a run differs from the recipe that it was started from, and that one from its parents."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.config.reference import fields
from far_scale.config.yaml_loader import extends_chain, read_document
from far_scale.utils.errors import UserError
from far_scale.utils.io import flatten

_MAX_LENGTH = 300  # of a value's text


class Change(NamedTuple):
    """A key with its text in the parent, or empty if it is not there, and its text now, or empty if it is gone."""

    key: str
    before: str
    now: str


class Level(NamedTuple):
    """A recipe and how it differs from what it is based on."""

    title: str
    changes: list[Change]


def recipe_levels(recipe: Recipe) -> list[Level]:
    """The differences of a run's resolved recipe from the recipe file of its name, of that file from the one that it
    extends, and so on to the defaults. Without such a file: the differences of the run's recipe from the defaults.

    The files are read as they are now, which need not be as they were at the start of the run.
    """
    values = recipe.model_dump(mode="json")
    try:
        if os.sep in recipe.name:
            raise UserError(f"{recipe.name}: no name of a recipe")
        files = extends_chain(recipe.name)
        started_from = load_recipe(files[0]).model_dump(mode="json")
        documents = [flatten(read_document(file).values) for file in files]
    except UserError:
        return [_from_defaults("This run", flatten(values))]
    for document in documents:
        document.pop("name", None)  # that of the file
    titles = [file.name for file in files]
    levels = [Level(f"This run, from {titles[0]}", compare(flatten(started_from), flatten(values)))]
    for index, document in enumerate(documents[:-1]):
        levels.append(Level(f"{titles[index]}, from {titles[index + 1]}", compare(documents[index + 1], document)))
    return [*levels, _from_defaults(titles[-1], documents[-1])]


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The keys with different values, in the order of `now`, and then those that are only in `before`."""
    missing = object()
    return [
        Change(key, _text(before[key]) if key in before else "", _text(now[key]) if key in now else "")
        for key in dict.fromkeys([*now, *before])
        if before.get(key, missing) != now.get(key, missing)
    ]


def _from_defaults(name: str, values: Mapping[str, Any]) -> Level:
    defaults = _defaults()
    return Level(f"{name}, from the defaults", compare({k: defaults[k] for k in values if k in defaults}, values))


def _defaults() -> dict[str, Any]:
    """The default of every key that has one."""
    plain: dict[str, Any] = {}
    for key, field in fields(Recipe):
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if not field.is_required() and not hasattr(default, "model_dump"):
            plain[".".join(key)] = list(default) if isinstance(default, tuple) else default
    return plain


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
