"""What can be wrong with shards. Damaged shards are skipped up to a budget; wrong sets never are."""

from __future__ import annotations

from dataclasses import dataclass

from far_scale.utils.errors import UserError


class BadShardError(Exception):
    """The bytes are not a complete file of the format."""

    format = "a shard"


class UnexpectedMemberError(Exception):
    """A shard has a member that does not belong in it."""


class Mismatch(Exception):
    """The bytes of a sample are not what they should be; the caller adds the file and raises a UserError."""


class DamagedError(UserError):
    """A sample, a shard or its index is missing, cut off or altered; the rest of the set may be intact.

    Attributes:
        file: path or URL of the damaged file.
        problem: what is wrong, and the fix.
        key: of the sample; None where its index could not be read.
    """

    def __init__(self, file: str, problem: str, key: str | None = None) -> None:
        super().__init__(file, problem, key)
        self.file, self.problem, self.key = file, problem, key

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


class NotReadableError(UserError):
    """Shards that cannot be read with these options, damaged or not: a cache or a permission is missing."""


class OverBudgetError(UserError):
    """More damaged samples came up than the recipe allows."""


@dataclass(frozen=True)
class SkippedClip:
    """A clip that was left out of its pack because it could not be read.

    Attributes:
        lane: number of the lane that drew it.
        key: of its sample, or the sample's number in the shard if the index could not be read.
        file: the damaged shard or index.
        reason: what is wrong with it.
    """

    lane: int
    key: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"lane {self.lane}: sample {self.key} is skipped: {self.file}: {self.reason}"


def over_budget(count: int, budget: int, skipped: list[SkippedClip]) -> OverBudgetError:
    """The error of a run that skipped more clips than its budget.

    Args:
        count: clips skipped so far, over all ranks.
        budget: `data.max_damaged_samples` of the recipe.
        skipped: the most recent ones.
    """
    last = f"; the last: {skipped[-1]}" if skipped else ""
    return OverBudgetError(
        f"data.max_damaged_samples={budget}: {count} clips of damaged samples came up{last}; fix the shard set "
        "(`tools/inspect_shards.py SET --fix` drops what is damaged), or allow more"
    )
