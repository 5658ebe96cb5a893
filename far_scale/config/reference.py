"""Texts for users: error messages of one line with file, line, key and fix, and the reference of all keys."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from far_scale.config.yaml_loader import Document, KeyPath
from far_scale.utils.errors import UserError


def explain(error: ValidationError, document: Document, recipe: type[BaseModel]) -> UserError:
    """One line with all errors of `document`: unknown keys first, then wrong values, then missing keys."""
    order = {"extra_forbidden": 0, "missing": 2}
    details = sorted(error.errors(include_url=False), key=lambda detail: order.get(detail["type"], 1))
    return UserError("; ".join(_error_text(detail, document, recipe) for detail in details))


def _error_text(detail: ErrorDetails, document: Document, recipe: type[BaseModel]) -> str:
    named = detail.get("ctx", {}).get("key")  # checks over several keys (checks.py) name the key to fix
    key: KeyPath = tuple(named.split(".")) if named else _written_key(detail["loc"])
    location = document.location(key)
    if detail["type"] == "missing" and key not in document.locations and _without_numbers(key) == key:
        # A key that is nowhere is missing in the file that the user named, not in one that it extends.
        location = location if location.startswith(document.file) else document.file
    where = f"{location}: {'.'.join(key)}"
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_suggestion(key, recipe, document.kind.name)}"
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], int):
        return f"{where}: its list is too short; see `python -m far_scale.recipe`"
    if detail["type"] == "missing":
        field = dict(fields(recipe))[_without_numbers(key)]
        return f"{where}: this required key is missing; set it ({_description(field)})"
    if named:
        return f"{where}: {detail['msg']}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: must be a section of `key: value` lines, got {_short_repr(detail['input'])}"
    return f"{where}: {detail['msg'].replace('Input should', 'must', 1)}, got {_short_repr(detail['input'])}"


def _written_key(location: tuple[int | str, ...]) -> KeyPath:
    """A location of pydantic as a key: sections of a list are counted from 1, the index of a plain value is dropped."""
    parts = zip(location, (*location[1:], None), strict=True)
    return tuple(str(p + 1) if isinstance(p, int) else p for p, after in parts if isinstance(p, str) or after)


def _without_numbers(key: KeyPath) -> KeyPath:
    """The key as `fields` yields it: without the numbers of a list's sections."""
    return tuple(name for name in key if not name.isdecimal())


def _suggestion(key: KeyPath, recipe: type[BaseModel], kind: str) -> str:
    """The valid key that an unknown one probably means: a similar name in its section, or else in another one."""
    paths = [path for path, _ in fields(recipe)]
    siblings = {path[-1]: path for path in paths if path[:-1] == _without_numbers(key[:-1])}
    by_name = {path[-1]: path for path in reversed(paths)}
    if key[-1] in by_name:
        nearest = by_name[key[-1]]
    elif matches := difflib.get_close_matches(key[-1], siblings, n=1):
        nearest = siblings[matches[0]]
    elif matches := difflib.get_close_matches(key[-1], by_name, n=1):
        nearest = by_name[matches[0]]
    else:
        nearest = siblings[difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.0)[0]]
    section = ".".join(key[:-1]) or f"a {kind}"
    return f"nearest valid key is {'.'.join(nearest)} (valid keys of {section}: {', '.join(siblings)})"


def fields(model: type[BaseModel], parent: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every key of a recipe, sections before their keys."""
    for name, field in model.model_fields.items():
        yield (*parent, name), field
        if (section := _section(field)) is not None:
            yield from fields(section, (*parent, name))


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, by itself, optionally or in a list; None for a plain value."""
    annotation = field.annotation
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    elif get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def reference(recipe: type[BaseModel]) -> str:
    """All keys of a recipe with type, limits, default and meaning, as plain text."""
    lines = []
    for key, field in fields(recipe):
        name = ".".join(key)
        if _section(field) is not None:
            lines += ["", f"{name}: {_description(field)}"]
            continue
        default = "required" if field.is_required() else f"default {_default(field)}"
        value_type = f"{_type_name(field.annotation)} {_limits(field.metadata)}".strip()
        lines += [f"  {name}  ({value_type}; {default})", f"      {_description(field)}"]
    return "\n".join(lines)


def markdown_reference(recipe: type[BaseModel]) -> str:
    """All keys of a recipe in Markdown, a table for each section."""
    tables: dict[KeyPath, list[str]] = {}
    headings: dict[KeyPath, str] = {(): "## Top level"}
    for key, field in fields(recipe):
        if _section(field) is not None:
            optional = "" if field.is_required() or field.get_default(call_default_factory=True) else " Optional."
            headings[key] = f"## {'.'.join(key)}\n\n{_description(field)}{optional}"
            continue
        default = "required" if field.is_required() else f"`{_default(field)}`"
        name, value_type = f"`{'.'.join(key)}`", f"`{_type_name(field.annotation)}`"
        cells = (name, value_type, _limits(field.metadata), default, _description(field))
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        tables.setdefault(key[:-1], []).append(f"| {row} |")
    header = "| key | type | limits | default | meaning |\n|---|---|---|---|---|"
    return "\n\n".join("\n".join([f"{headings[key]}\n", header, *rows]) for key, rows in tables.items())


def _description(field: FieldInfo) -> str:
    section = _section(field)
    return " ".join((field.description or (section or field.annotation).__doc__ or "").split())


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _default(field: FieldInfo) -> str:
    return _yaml_text(field.get_default(call_default_factory=True))


def _yaml_text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml_text(item) for item in value)}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _limits(metadata: Iterable[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}
    bounds = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in signs.items() if hasattr(m, name)]
    return " and ".join(bounds)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"[{', '.join(_type_name(part) for part in get_args(annotation))}]"
    if get_origin(annotation) is dict:
        return "{" + ": ".join(_type_name(part) for part in get_args(annotation)) + "}"
    if annotation is Ellipsis:
        return "..."
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        keys = (
            f"{name}: {_type_name(field.annotation)} {_limits(field.metadata)}".strip()
            for name, field in annotation.model_fields.items()
        )
        return "{" + ", ".join(keys) + "}"
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        limits = _limits(limit for m in metadata for limit in (m.metadata if isinstance(m, FieldInfo) else [m]))
        return f"{_type_name(inner)} {limits}".strip()
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
