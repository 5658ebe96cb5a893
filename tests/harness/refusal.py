"""What a user sees of a refusal: one line with the file, the key and the fix."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from far_scale.utils.errors import UserError


def refused(call: Callable[[], object], *words: str) -> None:
    """`call` raises a UserError of one line, which has all of these words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message, message
