"""The guard against bad steps: a loss or gradient that is not finite, or a spike of one, must not reach the weights.

Every step is judged on the device, before Adam takes it: all ranks add up loss and gradient norm in one tiny message,
so all come to the same verdict, and Adam (torch's fused one) reads it there as `found_inf` and then changes nothing,
neither weights nor moments nor its step number. The host learns of it one step later, by which time the device has
long passed that step, so no step waits for its own verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from far_scale.config.schema import FaultsSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.ledger import phase
from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.train.deepspeed_adapter import grad_norm
from far_scale.train.engine import before_adam
from far_scale.train.spikes import RunningLevels
from far_scale.utils.event_log import EventLog

_LANES_TOLD = 4  # on the console; events.jsonl has all


@dataclass(frozen=True)
class Trouble:
    """A step that was skipped or warned of; the same on all ranks.

    Attributes:
        step: its number, from 1.
        reason: what was wrong with it.
        skipped: whether it was skipped.
        in_row: steps skipped in a row up to this one.
        total: steps skipped in the whole run.
        loss: its mean over the global batch.
        grad_norm: its global gradient norm.
    """

    step: int
    reason: str
    skipped: bool
    in_row: int
    total: int
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class _Pending:
    """A step whose verdict is on its way to the host.

    Attributes:
        step: its number.
        lanes: lane and keys of this rank's packs.
        told: `[5 + packs]` float32 in host memory: skipped, spike of the loss, of the norm, loss, norm, packs' losses.
        arrived: when `told` can be read; None where it can at once.
    """

    step: int
    lanes: list[tuple[int, tuple[str, ...]]]
    told: Tensor
    arrived: torch.cuda.Event | None


class StepGuard:
    """Judges every step of one engine.

    A step calls `watch` with the loss of each pack before `engine.step()`, and `end_step` at its end.

    Attributes:
        updates: steps that changed the weights, the step number that Adam counts.
        in_row: steps skipped in a row, up to the last that the host knows of.
        skipped: steps skipped in the whole run.
    """

    def __init__(self, engine: Any, faults: FaultsSection, processes: Processes, events: EventLog) -> None:
        self.updates, self.in_row, self.skipped = 0, 0, 0
        self._engine, self._faults, self._processes, self._events = engine, faults, processes, events
        self._levels = RunningLevels(faults.spike_deviations, processes.device)
        self._losses: list[Tensor] = []
        self._verdict: Tensor | None = None
        self._pending: _Pending | None = None
        before_adam(engine, self._judge)

    def watch(self, loss: Tensor) -> None:
        """Take note of a pack's loss, as it counts in the mean over packs and ranks."""
        self._losses.append(loss.detach())

    @property
    def update_mask(self) -> Tensor:
        """Between `engine.step()` and `end_step`: 1 if the step changed the weights, 0 if it was skipped; a scalar on
        the device."""
        assert self._verdict is not None, "no step has been taken"
        return 1 - self._verdict[0]

    def end_step(self, step: int, packs: Sequence[Pack]) -> Trouble | None:
        """The step is over; tells what was wrong with the step before it, if anything.

        Args:
            step: its number, from 1.
            packs: what it trained on, on this rank, in the order of the `watch` calls.
        """
        assert self._verdict is not None, "a step ends with engine.step()"
        told, arrived = _send_to_host(self._verdict)
        now = _Pending(step, [(pack.lane, pack.keys) for pack in packs], told, arrived)
        self._losses, self._verdict = [], None
        trouble = self.settle()
        self._pending = now
        return trouble

    def settle(self) -> Trouble | None:
        """Wait for the last step's verdict too, as a checkpoint must; tells what was wrong with it, if anything."""
        if self._pending is None:
            return None
        step, self._pending = self._pending, None
        if step.arrived is not None:
            step.arrived.synchronize()
        skipped, loss_spike, norm_spike, loss, norm, *losses = step.told.tolist()
        if skipped:
            self.in_row, self.skipped = self.in_row + 1, self.skipped + 1
        else:
            self.in_row, self.updates = 0, self.updates + 1
        reasons = {
            "the loss is not finite": not math.isfinite(loss),
            "the gradient is not finite": math.isfinite(loss) and not math.isfinite(norm),
            "the loss is a spike": loss_spike,
            "the gradient norm is a spike": norm_spike,
        }
        found = [reason for reason, holds in reasons.items() if holds]
        if not found:
            return None
        trouble = Trouble(step.step, " and ".join(found), bool(skipped), self.in_row, self.skipped, loss, norm)
        self._tell(trouble, [(lane, keys, loss) for (lane, keys), loss in zip(step.lanes, losses, strict=True)])
        return trouble

    def forget_row(self) -> None:
        """After a roll-back: count the row from 0, drop the verdict of a step that was undone, and learn the levels of
        loss and norm anew, since what stayed above the old ones for so long is no spike."""
        self.in_row, self._pending = 0, None
        self.forget_levels()

    def forget_levels(self) -> None:
        """Where the loss is about to change its level, as at a new stage: judge no spikes until enough were seen."""
        self._levels.forget()

    def state(self) -> dict[str, Any]:
        """All that later verdicts depend on, for JSON; call `settle` first."""
        assert self._pending is None, "settle() comes before state()"
        levels = self._levels.state()
        return {"updates": self.updates, "in_row": self.in_row, "skipped": self.skipped, "levels": levels}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; what is known of later steps is dropped."""
        self.updates, self.in_row, self.skipped = state["updates"], state["in_row"], state["skipped"]
        self._levels.load_state(state["levels"])
        self._pending = None

    @torch.no_grad()
    def _judge(self, adam: torch.optim.AdamW) -> None:
        if self._verdict is not None:
            return  # ZeRO-3 comes here for each group of parameters; a step has one verdict
        losses = torch.stack(self._losses).float()
        now = torch.stack([losses.mean(), grad_norm(self._engine).float()])
        # The norm is the same on all ranks already, or should be; after this it is to the last bit.
        with phase("guard"):
            dist.all_reduce(now)
        now /= self._processes.world_size
        skipped, spikes = ~now.isfinite().all(), torch.zeros_like(now, dtype=torch.bool)
        if self._faults.spikes != "off":
            spikes = self._levels.spikes(now) & ~skipped
            if self._faults.spikes == "skip":
                skipped = skipped | spikes.any()
            # A spike that was only warned of is taken in: a level that lasts must become the usual one.
            self._levels.take(now, ~skipped)
        self._verdict = torch.cat([skipped[None], spikes, now, losses])
        # Adam's fused kernels leave everything as it is where this scalar is 1, and take its step number back.
        stepped = next(tensor for group in adam.param_groups for tensor in group["params"])
        adam.found_inf = self._verdict[0].to(stepped.device)  # type: ignore[attr-defined]  # another one if offloaded

    def _tell(self, trouble: Trouble, own: list[tuple[int, tuple[str, ...], float]]) -> None:
        """Write the event, with lanes and keys: those whose loss is not finite, or else all of the batch."""
        everyone = [pack for part in all_gather_objects(own, self._processes.host_group) for pack in part]
        culprits = [pack for pack in everyone if not math.isfinite(pack[2])] or everyone
        lanes = [{"lane": lane, "keys": list(keys), "loss": _for_json(loss)} for lane, keys, loss in sorted(culprits)]
        where = "; ".join(f"lane {lane['lane']}: {', '.join(lane['keys'])}" for lane in lanes)
        if len(lanes) > _LANES_TOLD:
            where = f"{len(lanes)} lanes, named in events.jsonl"
        row = f"{trouble.in_row} in a row, {trouble.total} in all"
        what = f"skipped ({row})" if trouble.skipped else "warning"
        numbers = f"loss {trouble.loss:.4g}, gradient norm {trouble.grad_norm:.4g}"
        self._events.emit(
            "skipped" if trouble.skipped else "spike",
            trouble.step,
            f"step {trouble.step}: {what}: {trouble.reason}; {numbers}; {where}",
            reason=trouble.reason,
            loss=_for_json(trouble.loss),
            grad_norm=_for_json(trouble.grad_norm),
            in_row=trouble.in_row,
            total=trouble.total,
            lanes=lanes,
        )


def _send_to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """`values` in host memory, and the event after which they are there; nobody waits."""
    if values.device.type != "cuda":
        return values, None
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    there.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return there, arrived


def _for_json(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
