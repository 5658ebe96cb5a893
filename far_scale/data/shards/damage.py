"""What is damaged in a shard set: told apart from a set of the wrong kind, skipped up to a budget, never silently."""

from __future__ import annotations

from dataclasses import dataclass

from far_scale.utils.errors import UserError


class DamagedError(UserError):
    """A sample, a shard or its index that is missing, cut off or altered; the rest of the set may well be sound.

    Attributes:
        file: where it lies.
        problem: what is wrong, and the mend.
        key: of the sample, where its index could be read.
    """

    def __init__(self, file: str, problem: str, key: str | None = None) -> None:
        super().__init__(file, problem, key)
        self.file, self.problem, self.key = file, problem, key

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


class OverBudgetError(UserError):
    """More was damaged than the recipe lets a run skip."""


@dataclass(frozen=True)
class Skipped:
    """A clip that was left out of its pack since it could not be read.

    Attributes:
        lane: which drew it.
        key: of its sample, or the sample's number in the shard where there is no key to be had.
        file: the shard or index that is damaged.
        reason: what is wrong with it.
    """

    lane: int
    key: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"lane {self.lane}: sample {self.key} is skipped: {self.file}: {self.reason}"


def over_budget(count: int, budget: int, skipped: list[Skipped]) -> OverBudgetError:
    """The error of a run that has skipped more than it may.

    Args:
        count: clips skipped so far, by all who were asked.
        budget: of the recipe.
        skipped: the last of them.
    """
    last = f"; the last: {skipped[-1]}" if skipped else ""
    return OverBudgetError(
        f"data.max_damaged_samples={budget}: {count} clips of damaged samples came up{last}; mend the shard set "
        "(`tools/inspect_shards.py SET --fix` drops what is damaged), or allow more"
    )
