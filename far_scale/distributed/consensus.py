"""Flags that all ranks agree on at the end of a step, so that they go on alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from far_scale.distributed.ledger import phase
from far_scale.distributed.process_group import Processes
from far_scale.distributed.signals import StopSignals


class StepFlags(NamedTuple):
    """What the ranks agreed on; the same on every rank.

    Attributes:
        stop: some rank was asked to stop.
        saving: some rank is still writing a checkpoint.
        damaged: some rank's packs are without clips that were damaged.
        save_due: by some rank's clock it is time for a checkpoint.
    """

    stop: bool
    saving: bool
    damaged: bool
    save_due: bool


class Consensus:
    """An all-reduce of `StepFlags` over the CPU group, which overlaps with the step on the device.

    Args:
        signals: what may ask this process to stop, or None.
        processes: the ranks that agree.
    """

    def __init__(self, signals: StopSignals | None, processes: Processes) -> None:
        self._signals, self._group = signals, processes.host_group
        self._running: tuple[torch.Tensor, dist.Work] | None = None

    def start(self, saving: bool, damaged: bool, save_due: bool = False) -> None:
        """Start the all-reduce.

        Args:
            saving: whether this rank still writes a checkpoint.
            damaged: whether this rank's packs of the step are without clips that were damaged.
            save_due: whether it is time for a checkpoint, by this rank's clock.
        """
        stop = self._signals is not None and self._signals.wanted is not None
        flags = torch.tensor([int(stop), int(saving), int(damaged), int(save_due)])
        with phase("vote"):
            self._running = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def flags(self) -> StepFlags:
        """Wait for the all-reduce that was started last."""
        assert self._running is not None, "call start first"
        flags, work = self._running
        work.wait()
        return StepFlags(*map(bool, flags.tolist()))
