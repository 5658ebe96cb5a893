"""HTML from Python, in which all text is escaped."""

from __future__ import annotations

import html
import re

_VOID = ("img", "meta")  # elements without an end tag
# Characters that HTML forbids, surrogates, which UTF-8 cannot represent, and those that reorder the text around them.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


class Markup(str):
    """Text that is HTML already. Only this module, and constants of the page, make it."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Text as HTML that shows it, in elements and in quoted attributes."""
    return text if isinstance(text, Markup) else Markup(html.escape(_UNSAFE.sub("\ufffd", text)))


def join(*parts: str) -> Markup:
    """Parts in a row; those that are no `Markup` are escaped."""
    return Markup("".join(map(escape, parts)))


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element.

    Args:
        name: of the element, such as `p`.
        children: what is inside; text that is no `Markup` is escaped.
        attributes: their values are escaped; those that are None are left out. `_` in a name stands for `-`, and one at
            its end is dropped.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{join(*children)}</{name}>")


def table(head: list[str], rows: list[list[str]], class_: str | None = None) -> Markup:
    """A table that scrolls sideways where the screen is narrower."""
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    first = [tag("thead", tag("tr", *(tag("th", cell) for cell in head)))] if any(head) else []
    return tag("div", tag("table", *first, tag("tbody", *lines), class_=class_), class_="scroll")
