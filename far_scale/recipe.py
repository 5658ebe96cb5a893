"""`python -m far_scale.recipe` prints the keys of a recipe with their types, limits, defaults and meanings."""

from __future__ import annotations

from far_scale.config.recipe import Recipe
from far_scale.config.reference import reference
from far_scale.utils.command_line import command_line


@command_line
def main() -> None:
    print(f"The keys of a recipe:\n{reference(Recipe)}")


if __name__ == "__main__":
    main()
