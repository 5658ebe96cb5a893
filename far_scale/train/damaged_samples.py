"""Damaged samples that were left out of the packs: each is told, and all ranks count them against one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from far_scale.data.loader.pack_loader import Pack
from far_scale.data.shards.errors import SkippedClip, over_budget
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.utils.event_log import EventLog


class DamagedSamples:
    """Counts over all ranks and lanes of a stage.

    Args:
        budget: clips that may be left out.
        lanes: the lanes' states where the stage goes on from a checkpoint, or None.
        processes: who counts.
        events: where each clip is told.

    Attributes:
        count: clips left out so far.
    """

    def __init__(
        self, budget: int, lanes: Mapping[int, Mapping[str, Any]] | None, processes: Processes, events: EventLog
    ) -> None:
        self._budget, self._processes, self._events = budget, processes, events
        self.count = sum(state.get("damaged", 0) for state in (lanes or {}).values())

    def report(self, step: int, packs: Sequence[Pack]) -> None:
        """After a step in which some rank left clips out; all ranks call it.

        Args:
            step: its number, from 1.
            packs: that this rank trained on in it.

        Raises:
            UserError: on all ranks alike: there are more than the budget allows.
        """
        own = [each for pack in packs for each in pack.skipped]
        everyone: list[SkippedClip] = [
            each for part in all_gather_objects(own, self._processes.host_group) for each in part
        ]
        for each in sorted(everyone, key=lambda skipped: skipped.lane):
            self.count += 1
            facts = {"lane": each.lane, "key": each.key, "file": each.file, "reason": each.reason}
            text = f"step {step}: {each} ({self.count} in all, data.max_damaged_samples is {self._budget})"
            self._events.emit("damaged-sample", step, text, count=self.count, **facts)
        if self.count > self._budget:
            raise over_budget(self.count, self._budget, everyone)
