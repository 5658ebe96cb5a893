"""The guard against bad steps: a loss or gradient that is not finite, or a spike of one, must not reach the weights.

Every step is checked on the device before Adam's update. One small all-reduce of loss and gradient norm gives all ranks
the same verdict. Adam (torch's fused one) reads it on the device as `found_inf` and then changes nothing: neither
weights nor moments nor its step number. The host reads the verdict one step later, so that no step waits for it.
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
from far_scale.train.engine import call_before_adam
from far_scale.utils.event_log import EventLog

SPIKE_WINDOW = 128
"""Number of previous steps that a step is compared with."""

MIN_STEPS = 16
"""Minimum number of previous steps for spike detection: the std of fewer numbers is unreliable."""

_MAD_TO_STD = 1.4826
"""The standard deviation of normal numbers, in median absolute deviations."""

_MIN_STD = 0.01
"""Lower limit of the std, as a fraction of the median: of nearly constant numbers it is near 0, and any change would
be a spike."""

_MAX_LANES_PRINTED = 4  # events.jsonl has all


@dataclass(frozen=True)
class BadStep:
    """A step that was skipped or got a warning; the same on all ranks.

    Attributes:
        step: its number, from 1.
        reason: what is wrong with it.
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
class _PendingVerdict:
    """A verdict that is being copied to the host.

    Attributes:
        step: the step's number.
        lanes: lane and keys of this rank's packs.
        values: `[5 + packs]` float32 on the host: skipped, spike of the loss, of the norm, loss, norm, packs' losses.
        copied: event after which `values` can be read; None where they can be read at once.
    """

    step: int
    lanes: list[tuple[int, tuple[str, ...]]]
    values: Tensor
    copied: torch.cuda.Event | None


class StepGuard:
    """Checks every step of an engine.

    A step calls `add_loss` with the loss of each pack before `engine.step()`, and `end_step` at its end.

    Attributes:
        updates: steps that changed the weights, the step number that Adam counts.
        in_row: steps skipped in a row, up to the last verdict that the host has.
        skipped: steps skipped in the whole run.
    """

    def __init__(self, engine: Any, faults: FaultsSection, processes: Processes, events: EventLog) -> None:
        self.updates, self.in_row, self.skipped = 0, 0, 0
        self._engine, self._faults, self._processes, self._events = engine, faults, processes, events
        self._levels = RunningLevels(faults.spike_deviations, processes.device)
        self._losses: list[Tensor] = []
        self._verdict: Tensor | None = None
        self._pending: _PendingVerdict | None = None
        call_before_adam(engine, self._check)

    def add_loss(self, loss: Tensor) -> None:
        """Add a pack's loss, weighted as in the mean over packs and ranks."""
        self._losses.append(loss.detach())

    @property
    def update_mask(self) -> Tensor:
        """Scalar on the device: 1 if the step changed the weights, 0 if it was skipped.

        Valid between `engine.step()` and `end_step`.
        """
        assert self._verdict is not None, "no step has been taken"
        return 1 - self._verdict[0]

    def end_step(self, step: int, packs: Sequence[Pack]) -> BadStep | None:
        """End a step; returns the step before it if that was bad.

        Args:
            step: its number, from 1.
            packs: this rank's, in the order of the `add_loss` calls.
        """
        assert self._verdict is not None, "a step ends with engine.step()"
        values, copied = _copy_to_host(self._verdict)
        pending = _PendingVerdict(step, [(pack.lane, pack.keys) for pack in packs], values, copied)
        self._losses, self._verdict = [], None
        bad_step = self.settle()
        self._pending = pending
        return bad_step

    def settle(self) -> BadStep | None:
        """Wait for the last step's verdict, as a checkpoint must; returns the step if it was bad."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        if pending.copied is not None:
            pending.copied.synchronize()
        skipped, loss_spike, norm_spike, loss, norm, *losses = pending.values.tolist()
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
        true_reasons = [reason for reason, is_true in reasons.items() if is_true]
        if not true_reasons:
            return None
        bad_step = BadStep(
            pending.step, " and ".join(true_reasons), bool(skipped), self.in_row, self.skipped, loss, norm
        )
        self._emit(bad_step, [(lane, keys, loss) for (lane, keys), loss in zip(pending.lanes, losses, strict=True)])
        return bad_step

    def reset_after_rollback(self) -> None:
        """Set `in_row` to 0, drop the verdict of the step that was undone, and clear the levels of loss and norm, since
        values that stay above the old levels are not spikes."""
        self.in_row, self._pending = 0, None
        self.clear_levels()

    def clear_levels(self) -> None:
        """Detect no spikes until there are enough new steps; for a loss with a new level, such as at a new stage."""
        self._levels.clear()

    def state(self) -> dict[str, Any]:
        """The state that later verdicts depend on, for JSON; call `settle` first."""
        assert self._pending is None, "settle() comes before state()"
        levels = self._levels.state()
        return {"updates": self.updates, "in_row": self.in_row, "skipped": self.skipped, "levels": levels}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`; verdicts of later steps are dropped."""
        self.updates, self.in_row, self.skipped = state["updates"], state["in_row"], state["skipped"]
        self._levels.load_state(state["levels"])
        self._pending = None

    @torch.no_grad()
    def _check(self, adam: torch.optim.AdamW) -> None:
        if self._verdict is not None:
            return  # ZeRO-3 calls this for each group of parameters; a step has one verdict
        losses = torch.stack(self._losses).float()
        now = torch.stack([losses.mean(), grad_norm(self._engine).float()])
        # The norm should already be the same on all ranks; this makes it bitwise equal.
        with phase("guard"):
            dist.all_reduce(now)
        now /= self._processes.world_size
        skipped, spikes = ~now.isfinite().all(), torch.zeros_like(now, dtype=torch.bool)
        if self._faults.spikes != "off":
            spikes = self._levels.spikes(now) & ~skipped
            if self._faults.spikes == "skip":
                skipped = skipped | spikes.any()
            # A spike with only a warning is added: a lasting new level must become the usual one.
            self._levels.add(now, ~skipped)
        self._verdict = torch.cat([skipped[None], spikes, now, losses])
        # Adam's fused kernels change nothing where this scalar is 1, and undo the increment of its step number.
        stepped = next(tensor for group in adam.param_groups for tensor in group["params"])
        adam.found_inf = self._verdict[0].to(stepped.device)  # type: ignore[attr-defined]  # another device if offloaded

    def _emit(self, bad_step: BadStep, packs: list[tuple[int, tuple[str, ...], float]]) -> None:
        """Emit the event, with lanes and keys of the packs with non-finite loss; if none, of the whole batch."""
        all_packs = [pack for part in all_gather_objects(packs, self._processes.host_group) for pack in part]
        all_packs = _merge_shared(all_packs)
        culprits = [pack for pack in all_packs if not math.isfinite(pack[2])] or all_packs
        lanes = [{"lane": lane, "keys": list(keys), "loss": _for_json(loss)} for lane, keys, loss in sorted(culprits)]
        where = "; ".join(f"lane {lane}: {', '.join(keys)}" for lane, keys, _ in sorted(culprits))
        if len(lanes) > _MAX_LANES_PRINTED:
            where = f"{len(lanes)} lanes, named in events.jsonl"
        row = f"{bad_step.in_row} in a row, {bad_step.total} in all"
        what = f"skipped ({row})" if bad_step.skipped else "warning"
        numbers = f"loss {bad_step.loss:.4g}, gradient norm {bad_step.grad_norm:.4g}"
        self._events.emit(
            "skipped" if bad_step.skipped else "spike",
            bad_step.step,
            f"step {bad_step.step}: {what}: {bad_step.reason}; {numbers}; {where}",
            reason=bad_step.reason,
            loss=_for_json(bad_step.loss),
            grad_norm=_for_json(bad_step.grad_norm),
            in_row=bad_step.in_row,
            total=bad_step.total,
            lanes=lanes,
        )


def _merge_shared(packs: list[tuple[int, tuple[str, ...], float]]) -> list[tuple[int, tuple[str, ...], float]]:
    """Each pack once: the loss of one that several ranks share is the mean over them (see `pack_loss`)."""
    losses: dict[tuple[int, tuple[str, ...]], list[float]] = {}
    for lane, keys, loss in packs:
        losses.setdefault((lane, keys), []).append(loss)
    return [(lane, keys, sum(values) / len(values)) for (lane, keys), values in losses.items()]


class RunningLevels:
    """Loss and gradient norm of the last steps; finds spikes far above them on the device, without a host sync.

    Uses median and median absolute deviation, not mean and std: a few outliers hardly move them. Skipped steps must
    not be added.

    Args:
        spike_stds: robust stds above the median from which a value is a spike.
        device: of the numbers.
    """

    def __init__(self, spike_stds: float, device: torch.device) -> None:
        self._spike_stds = spike_stds
        self._slots = torch.arange(SPIKE_WINDOW, device=device)
        # Ring buffers, filled from slot 0 on; empty slots hold infinity, so that they sort last.
        self._rings = torch.full((2, SPIKE_WINDOW), float("inf"), device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)

    def spikes(self, now: Tensor) -> Tensor:
        """`[2]` bool: whether loss and gradient norm in `now` (`[2]` float32) are spikes."""
        middle = (self._seen.clamp(1, SPIKE_WINDOW) - 1).div(2, rounding_mode="floor").expand(2, 1)
        median = self._rings.sort(1).values.gather(1, middle)
        std = _MAD_TO_STD * (self._rings - median).abs().sort(1).values.gather(1, middle)
        limit = median + self._spike_stds * torch.maximum(std, _MIN_STD * median.abs())
        return (now > limit[:, 0]) & (self._seen >= MIN_STEPS)

    def add(self, now: Tensor, good: Tensor) -> None:
        """Add `now` (`[2]` float32) if the scalar bool tensor `good` is true."""
        is_next = (self._slots == self._seen % SPIKE_WINDOW) & good
        self._rings = torch.where(is_next, now[:, None], self._rings)
        self._seen = self._seen + good

    def clear(self) -> None:
        """Forget all steps: those to come have another level."""
        self._rings.fill_(float("inf"))
        self._seen.zero_()

    def state(self) -> dict[str, Any]:
        """For JSON. A float32 as a Python float is exact, so that a resumed run decides as one that never stopped."""
        seen = int(self._seen)
        loss, norm = self._rings[:, :seen].tolist()
        return {"seen": seen, "loss": loss, "grad_norm": norm}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.clear()
        self._seen.fill_(state["seen"])
        for ring, key in zip(self._rings, ("loss", "grad_norm"), strict=True):
            ring[: len(state[key])] = torch.tensor(state[key])


def _copy_to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """`values` on the host, and the event after which they can be read; does not wait."""
    if values.device.type != "cuda":
        return values, None
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return on_host, copied


def _for_json(value: float) -> float | str:
    """JSON cannot hold a number that is not finite."""
    return value if math.isfinite(value) else str(value)
