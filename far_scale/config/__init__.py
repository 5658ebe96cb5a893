"""The typed recipe: its sections, their checks, the YAML loader and the reference of all keys."""
