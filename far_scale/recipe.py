"""`python -m far_scale.recipe` prints all keys of a recipe with their types, limits, defaults and meanings.

With --markdown it prints docs/config.md.
"""

from __future__ import annotations

import argparse

from far_scale.config.recipe import Recipe
from far_scale.config.reference import markdown_reference, reference
from far_scale.utils.command_line import command_line

_INTRODUCTION = """\
# Configuration

All keys of a recipe. This page is generated: edit the docstrings in `far_scale/config/`, then run
`python -m far_scale.recipe --markdown > docs/config.md`.

A recipe is a YAML file, such as those in `recipes/`. `extends: NAME` merges it over another recipe. On the command line
`key.sub=value` overrides a key, the value written as in YAML. Unknown keys and wrong values are refused before any
work, with file, line and fix.
"""


def config_page() -> str:
    """The text of docs/config.md."""
    return f"{_INTRODUCTION}\n{markdown_reference(Recipe)}\n"


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description="Print all keys of a recipe.")
    parser.add_argument("--markdown", action="store_true", help="as docs/config.md")
    if parser.parse_args().markdown:
        print(config_page(), end="")
    else:
        print(f"The keys of a recipe:\n{reference(Recipe)}")


if __name__ == "__main__":
    main()
