"""Base and helpers of the typed records that are read from files."""

from __future__ import annotations

from typing import Annotated

import pydantic

Digest = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class StrictModel(pydantic.BaseModel):
    """A frozen record that refuses unknown keys, implicit conversions, infinities and NaN."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def first_problem(error: pydantic.ValidationError) -> str:
    """The first error of pydantic as one phrase: the key and what is wrong with it."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # The location may contain a key of the file: of any length, with line breaks.
    key = ".".join(str(part) for part in problem["loc"])[:80].encode("unicode_escape").decode()
    return f"{key}: {problem['msg']}" if key else str(problem["msg"])
