"""Pickles of others, read without running them.

A pickle may name any function to be called. Here its classes are never looked up: each name becomes an empty class of
its own, a `Record`, and a name that has no place in such a file is refused. The reader then checks the numbers and
texts that it needs and copies them into new objects.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from typing import IO, Any


class Record:
    """Stands for an object of a class that the pickle names; what it was made from and its attributes are kept."""

    name = ""
    module = ""
    values: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class RecordUnpickler(pickle.Unpickler):
    """Builds lists, dicts, numbers, texts and `Record`s, and nothing else."""

    def __init__(self, file: IO[bytes], names: re.Pattern[str], known: Mapping[str, Any] | None = None) -> None:
        """Read from `file`.

        Args:
            names: the full names of classes and functions that become records; others are refused.
            known: objects by full name that stand for themselves, such as dtypes.
        """
        super().__init__(file)
        self._names, self._known = names, known or {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if self._names.fullmatch(full) is None:
            raise pickle.UnpicklingError(f"it names {full[:80]!r}, which has no place in such a file")
        return type("Record", (Record,), {"name": name, "module": module})
