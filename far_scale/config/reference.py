"""What recipes tell their users: errors as one line with file, line, key and mend, and the reference of all keys."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from far_scale.config.yaml_loader import Document, KeyPath
from far_scale.utils.errors import UserError


def explain(error: ValidationError, document: Document, recipe: type[BaseModel]) -> UserError:
    """One line for all that is wrong with `document`: unknown keys first, then wrong values, then missing keys."""
    order = {"extra_forbidden": 0, "missing": 2}
    details = sorted(error.errors(include_url=False), key=lambda detail: order.get(detail["type"], 1))
    return UserError("; ".join(_line(detail, document, recipe) for detail in details))


def _line(detail: ErrorDetails, document: Document, recipe: type[BaseModel]) -> str:
    # A check over several keys (recipe_checks.py) names its key itself.
    named = detail.get("ctx", {}).get("key")
    key: KeyPath = tuple(named.split(".")) if named else _written_key(detail["loc"])
    place = document.place(key)
    if detail["type"] == "missing" and key not in document.places and _typed(key) == key:
        # A key that is nowhere is missing in the file the user named, not in one it extends; in a list's section there.
        place = place if place.startswith(document.file) else document.file
    where = f"{place}: {'.'.join(key)}"
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_nearest(key, recipe, document.kind.name)}"
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], int):
        return f"{where}: its list is too short; see `python -m far_scale.recipe`"
    if detail["type"] == "missing":
        field = dict(fields(recipe))[_typed(key)]
        return f"{where}: this required key is missing; set it ({_description(field)})"
    if named:
        return f"{where}: {detail['msg']}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: must be a section of `key: value` lines, got {_short(detail['input'])}"
    return f"{where}: {detail['msg'].replace('Input should', 'must', 1)}, got {_short(detail['input'])}"


def _written_key(location: tuple[int | str, ...]) -> KeyPath:
    """A location as its key: the number of a section in a list counts from 1, that of a plain value is left out."""
    parts = zip(location, (*location[1:], None), strict=True)
    return tuple(str(p + 1) if isinstance(p, int) else p for p, after in parts if isinstance(p, str) or after)


def _typed(key: KeyPath) -> KeyPath:
    """The key as `fields` has it: without the numbers of a list's sections."""
    return tuple(name for name in key if not name.isdecimal())


def _nearest(key: KeyPath, recipe: type[BaseModel], kind: str) -> str:
    """The valid key that an unknown one probably means: a near name in its section, or such a name in another one."""
    every = [path for path, _ in fields(recipe)]
    beside = [path for path in every if path[:-1] == _typed(key[:-1])]
    leaves = {path[-1]: path for path in reversed(every)}
    names = {path[-1]: path for path in beside}
    if key[-1] in leaves:
        found = leaves[key[-1]]
    elif near := difflib.get_close_matches(key[-1], names, n=1):
        found = names[near[0]]
    elif near := difflib.get_close_matches(key[-1], leaves, n=1):
        found = leaves[near[0]]
    else:
        found = names[difflib.get_close_matches(key[-1], names, n=1, cutoff=0.0)[0]]
    section = ".".join(key[:-1]) or f"a {kind}"
    return f"nearest valid key is {'.'.join(found)} (valid keys of {section}: {', '.join(names)})"


def fields(model: type[BaseModel], above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every key of a recipe, sections before their keys."""
    for name, field in model.model_fields.items():
        yield (*above, name), field
        if (section := _section(field)) is not None:
            yield from fields(section, (*above, name))


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, may be or is a list of; None for a plain value."""
    annotation = field.annotation
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    elif get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def reference(recipe: type[BaseModel]) -> str:
    """All keys of a recipe with type, default and meaning, as text for people."""
    lines = []
    for key, field in fields(recipe):
        name = ".".join(key)
        if _section(field) is not None:
            lines += ["", f"{name}: {_description(field)}"]
            continue
        default = (
            "required" if field.is_required() else f"default {_written(field.get_default(call_default_factory=True))}"
        )
        lines += [f"  {name}  ({_type(field)}; {default})", f"      {_description(field)}"]
    return "\n".join(lines)


def _description(field: FieldInfo) -> str:
    section = _section(field)
    return " ".join((field.description or (section or field.annotation).__doc__ or "").split())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _written(value: Any) -> str:
    """A default as one would write it in YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(_written(item) for item in value)}]"
    return "null" if value is None else str(value)


def _type(field: FieldInfo) -> str:
    limits = [("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")]
    bounds = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in limits if hasattr(m, name)]
    return " ".join([_type_name(field.annotation), " and ".join(bounds)]).strip()


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
        keys = (f"{name}: {_type(field)}" for name, field in annotation.model_fields.items())
        return "{" + ", ".join(keys) + "}"
    if get_args(annotation):  # Annotated[type, limits]
        return _type_name(get_args(annotation)[0])
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
