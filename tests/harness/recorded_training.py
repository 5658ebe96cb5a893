"""A rank of `far_scale.train` that records what it trains on, run by `processes.start_training`.

usage: recorded_training.py LOG NAN_IN ARGUMENTS...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from far_scale.distributed.exit_codes import exit_process
from far_scale.train.__main__ import run


def record(log: str, nan_in: Sequence[Sequence[int]]) -> None:
    """Replace the step of the training loop by one that writes LOG.keys, and the loss of the packs `nan_in` by NaN."""
    from far_scale.train import loop

    train_step, pack_loss = loop.train_step, loop.pack_loss
    bad: list[bool] = []  # of the packs whose loss comes next

    def recorded_step(engine, batch, *others):
        with open(f"{log}.keys", "a") as keys:
            keys.writelines(json.dumps([pack.step, pack.lane, pack.keys]) + "\n" for pack in batch.packs)
        bad.extend([pack.step + 1, pack.lane] in nan_in for pack in batch.packs)
        return train_step(engine, batch, *others)

    def harmed_loss(velocity, noisy):
        loss = pack_loss(velocity, noisy)
        return loss * float("nan") if bad.pop(0) else loss

    loop.train_step, loop.pack_loss = recorded_step, harmed_loss


if __name__ == "__main__":
    record(sys.argv[1], json.loads(sys.argv[2]))
    exit_process(run(sys.argv[3:]))
