"""Where all ranks wait for each other, and find out who does not come."""

from __future__ import annotations

import datetime
import re

import torch.distributed as dist

from far_scale.distributed.process_group import Processes

STUCK_SECONDS = 120.0
"""After which what has not come never will; NCCL's first contact on thousands of ranks takes a minute."""


class StuckError(Exception):
    """Some ranks hang.

    Attributes:
        ranks: which.
        what: that they do, a clause after their names.
    """

    def __init__(self, ranks: list[int], what: str) -> None:
        super().__init__(ranks, what)
        self.ranks, self.what = ranks, what


def meet(processes: Processes, at: str, seconds: float) -> None:
    """Wait until every rank is here.

    Args:
        processes: who meets; over their host group, so no device is needed.
        at: what they have done by then, a noun.
        seconds: how long rank 0 waits.

    Raises:
        StuckError: some did not come. Only rank 0 learns who, so the others wait longer, for it to say so.
    """
    if processes.count == 1:
        return
    limit = datetime.timedelta(seconds=seconds if processes.main else 2 * seconds)
    try:
        dist.monitored_barrier(processes.host_group, limit, wait_all_ranks=True)
    except RuntimeError as error:
        late = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error)) if processes.main else None
        if late is None:
            raise StuckError([0], f"did not meet the others after {at}; it says why, or is what hangs") from error
        ranks = sorted(int(rank) for rank in late.group(1).split(","))
        raise StuckError(ranks, f"did not come through {at} in {seconds:g} s") from error
