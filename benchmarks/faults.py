"""Random faults: when they strike a training, what they do, and what each costs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ranks import FailedError, Ranks, Training, tail

from far_scale.config.recipe import Recipe
from far_scale.distributed.exit_codes import DONE, REFUSED, REQUEUE
from far_scale.train import checkpoint


class Kind(Enum):
    """The kind of a fault, by its name in tables."""

    KILL_AT_START = "kill -9 of a rank in start-up"
    KILL_IN_STEP = "kill -9 of a rank in a step"
    KILL_IN_SAVE = "kill -9 of a rank in the middle of a save"
    STOP = "SIGTERM or SIGUSR1 to one rank"
    FREEZE = "SIGSTOP of one rank"
    FLIP = "kill -9, then a flipped bit in the newest checkpoint"
    CUT = "kill -9, then a file of it cut short"
    FULL = "disk full until a save has failed"


@dataclass
class Fault:
    """One that struck.

    Attributes:
        number: from 1.
        kind: what it was.
        rank: whom it struck.
        start: the start of the training that it struck.
        step: the last step that any start had reached by then.
        detail: what else there is to say.
        moment: when it struck, in seconds of a clock.
        hit_again: another fault struck before the next new step.
        statuses: exit statuses of the ranks; empty where the training went on.
        reached: the last step of the start that it struck.
        damaged_step: the step of the checkpoint that was damaged.
        lost: steps that were trained again because of it.
        seconds: until the next new step; None where another fault came first.
        problem: what was not as it should be.
        recovered: the training went on, and nothing was wrong with how.
    """

    number: int
    kind: Kind
    rank: int
    start: int
    step: int
    detail: str
    moment: float = field(default_factory=time.monotonic)
    reached: int | None = None
    damaged_step: int | None = None
    statuses: list[int] = field(default_factory=list)
    lost: int | None = None
    seconds: float | None = None
    hit_again: bool = False
    problem: str = ""
    recovered: bool = False

    def facts(self) -> dict[str, Any]:
        """For the JSON."""
        return {**asdict(self), "kind": self.kind.value}


@dataclass(frozen=True)
class Pace:
    """How long things take in the undisturbed run, in seconds: from the launch to the first step, a step, a save."""

    start: float
    step: float
    save: float


@dataclass(frozen=True)
class SmallDisk:
    """The disk that the run directory lies on, to be filled; `checkpoint` is a checkpoint's size in bytes."""

    folder: Path
    checkpoint: int


class Drill:
    """A training under random faults.

    Attributes:
        faults: those that struck so far.
        unplanned: ends of starts that none of them was to blame for.

    Args:
        training: the training.
        ranks: how many.
        recipe: the training's.
        pace: of the undisturbed run.
        chance: what everything random is drawn from.
        disk: a small disk; None for no full disk.
    """

    def __init__(
        self,
        training: Training,
        ranks: int,
        recipe: Recipe,
        pace: Pace,
        chance: random.Random,
        disk: SmallDisk | None,
    ) -> None:
        self._training, self._ranks, self._pace, self._chance, self._disk = training, ranks, pace, chance, disk
        self._steps, self._every = recipe.train.steps, recipe.checkpoint.every
        # A rank that is stopped is ended by the others.
        impossible = {Kind.FREEZE} if ranks == 1 else set()
        self._kinds = [kind for kind in Kind if kind not in impossible and (kind is not Kind.FULL or disk is not None)]
        self.faults: list[Fault] = []
        self.unplanned: list[str] = []
        self._began = time.monotonic()
        self._bag: list[Kind] = []
        self._pending: list[Fault] = []

    def run(self, seconds: float) -> None:
        """Train to the end; no fault strikes after `seconds`.

        Raises:
            FailedError: it does not get there.
        """
        self._began, in_a_row = time.monotonic(), 0
        while True:
            with self._training.start(self._ranks) as ranks:
                fault = self._disturb(ranks, self._began + seconds)
                statuses = self._end(ranks)
            if fault is not None:
                self._after(fault, statuses)
                in_a_row = 0
            if set(statuses) == {DONE}:
                break
            if fault is None:
                in_a_row += 1
                self.unplanned.append(f"start {self._training.starts}: {statuses} after step {self._training.high}")
                self._say(f"an end that was not planned: {self.unplanned[-1]}")
                if REFUSED in statuses or in_a_row == 3:
                    raise FailedError(f"{self.unplanned[-1]}{tail(ranks.output)}")
        for fault in self._pending:  # there was no new step to come
            fault.recovered, fault.lost = not fault.problem, fault.lost or 0

    def _disturb(self, ranks: Ranks, deadline: float) -> Fault | None:
        """Strike; returns the fault that ends this start, or None where it ends by itself."""
        while time.monotonic() < deadline:
            kind = self._draw()
            if not self._moment(kind, ranks):
                return None
            fault = self._strike(kind, ranks)
            if kind is not Kind.FULL:
                return fault
        return None

    def _draw(self) -> Kind:
        """Each kind once, in random order, then anew: so that a short drill has them all."""
        begun = self._training.done > 0
        while True:
            fitting = [kind for kind in self._bag if not (begun and kind is Kind.KILL_AT_START)]
            if fitting:
                self._bag.remove(fitting[-1])
                return fitting[-1]
            more = list(self._kinds)
            self._chance.shuffle(more)
            self._bag = [*more, *self._bag]

    def _moment(self, kind: Kind, ranks: Ranks) -> bool:
        """Wait for a random moment that fits; returns whether it came before the start ended."""
        training = self._training
        if kind is Kind.KILL_AT_START:
            end = time.monotonic() + self._chance.uniform(0, self._pace.start)
            return self._until(ranks, lambda: time.monotonic() >= end or training.done > 0)  # by its first step
        new, wanted = self._chance.randint(1, 2 * self._every) + training.done, self._checkpoints_needed(kind)
        alone = self._chance.random() < 0.5  # else it may also strike before the training has got over the last one

        def come() -> bool:
            return training.done >= new and self._checkpoints() >= wanted and not (alone and self._pending)

        if not self._until(ranks, come):
            return False
        if kind is Kind.FULL:
            # The last save must not fail: nobody would be left to free the disk for it.
            return training.high + 2 * self._every < self._steps
        if kind is not Kind.KILL_IN_SAVE:
            self._wait(ranks, self._chance.uniform(0, self._pace.step))
            return ranks.ended() is None
        while self._until(ranks, lambda: training.saving):
            self._wait(ranks, self._chance.uniform(0, 0.9 * self._pace.save))
            if training.saving:
                return ranks.ended() is None
        return False

    @staticmethod
    def _checkpoints_needed(kind: Kind) -> int:
        return {Kind.FLIP: 2, Kind.CUT: 2, Kind.FULL: 1}.get(kind, 0)

    def _checkpoints(self) -> int:
        return len(checkpoint.steps_to_try(self._training.run))

    def _strike(self, kind: Kind, ranks: Ranks) -> Fault:
        for earlier in self._pending:
            earlier.hit_again = earlier.hit_again or kind is not Kind.FULL  # which does not keep it from going on
        rank, training = self._chance.randrange(self._ranks), self._training
        stop = self._chance.choice((signal.SIGTERM, signal.SIGUSR1))
        number = {Kind.STOP: stop, Kind.FREEZE: signal.SIGSTOP}.get(kind, signal.SIGKILL)
        detail = "half of a checkpoint still fits" if kind is Kind.FULL else f"{number.name} to rank {rank}"
        fault = Fault(len(self.faults) + 1, kind, rank, training.starts, training.high, detail)
        self.faults.append(fault)
        self._say(f"fault {fault.number}: {kind.value} ({detail}) at step {training.high}/{self._steps}")
        if kind is Kind.FULL:
            self._fill_disk(fault, ranks)
        else:
            ranks.send(rank, number)
        self._pending.append(fault)
        return fault

    def _fill_disk(self, fault: Fault, ranks: Ranks) -> None:
        """Leave room for half of a checkpoint, until a save has failed."""
        assert self._disk is not None
        disk = self._disk.folder
        filler, failed_before = disk / "filler", len(self._training.events("save-failed"))
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - self._disk.checkpoint // 2)
        try:
            if not self._until(ranks, lambda: len(self._training.events("save-failed")) > failed_before):
                fault.problem = f"ended with {ranks.ended()} when the disk was full{tail(ranks.output)}"
        finally:
            filler.unlink()
        fault.step = self._training.high

    def _after(self, fault: Fault, statuses: list[int]) -> None:
        """Check how the start that the fault struck has ended."""
        training = self._training
        fault.step, fault.reached, fault.statuses = training.high, training.reached, statuses
        others = [status for rank, status in enumerate(statuses) if rank != fault.rank]
        if REFUSED in statuses:
            fault.problem = f"ended with {statuses}, which a launcher does not start again"
        elif fault.kind is Kind.STOP and not set(statuses) <= {REQUEUE, DONE}:
            fault.problem = f"ended with {statuses}"
        elif fault.kind is Kind.FREEZE:
            reports = training.events("watchdog")[-1:]
            if not set(others) <= {REQUEUE} or (others and (not reports or fault.rank not in reports[0]["missing"])):
                fault.problem = f"ended with {statuses}, reported by the watchdog: {reports}"
        if fault.kind in (Kind.FLIP, Kind.CUT) and set(statuses) != {DONE}:
            fault.detail += f"; {self._damage_checkpoint(fault)}"

    def _damage_checkpoint(self, fault: Fault) -> str:
        """Damage one file of the newest checkpoint; returns a description."""
        step = checkpoint.steps_to_try(self._training.run)[0]
        file = self._chance.choice(sorted(checkpoint.step_folder(self._training.run, step).iterdir()))
        size = file.stat().st_size
        place = self._chance.randrange(size)
        if fault.kind is Kind.CUT:
            os.truncate(file, place)
            done = f"{file.name} of step {step} cut from {size} to {place} bytes"
        else:
            content = bytearray(file.read_bytes())
            bit = self._chance.randrange(8)
            content[place] ^= 1 << bit
            file.write_bytes(content)
            done = f"bit {bit} of byte {place} of {file.name} of step {step} flipped"
        fault.damaged_step = step
        self._say(f"  {done}")
        return done

    def _until(self, ranks: Ranks, happened: Callable[[], bool]) -> bool:
        def check() -> bool:
            self._update_recovered()
            return happened()

        return self._training.until(ranks, check)

    def _wait(self, ranks: Ranks, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._until(ranks, lambda: time.monotonic() >= end)

    def _end(self, ranks: Ranks) -> list[int]:
        self._until(ranks, lambda: False)
        return self._training.end(ranks)

    def _update_recovered(self) -> None:
        """Update the faults that the training has recovered from."""
        training = self._training
        for fault in list(self._pending):
            again = training.starts > fault.start
            if fault.lost is None and again and training.origin is not None:
                self._resumed(fault, training.origin)
            over = training.reached is not None and training.reached > fault.step
            if over and (again or fault.kind is Kind.FULL):
                self._pending.remove(fault)
                fault.lost = fault.lost or 0
                fault.recovered = not fault.problem
                taken = time.monotonic() - fault.moment
                fault.seconds = None if fault.hit_again else taken
                problem = f"; WRONG: {fault.problem}" if fault.problem else ""
                self._say(
                    f"  fault {fault.number}: {fault.lost} steps again, next new step after {taken:.1f} s{problem}"
                )

    def _resumed(self, fault: Fault, origin: int) -> None:
        # A start that is killed before its first step loses none: the previous start's were lost already.
        fault.lost = 0 if fault.reached is None else fault.reached - origin
        if fault.kind is Kind.STOP and fault.lost:
            fault.problem = fault.problem or f"{fault.lost} steps were lost: it did not save when asked to stop"
        if fault.damaged_step is not None:
            reported = [event["step"] for event in self._training.events("damaged")][-1:]
            if reported != [fault.damaged_step] and not fault.hit_again:  # a killed start may have found it unreported
                fault.problem = f"the damage of step {fault.damaged_step} was not reported"
            # As an operator would, after a look at it: it takes space.
            for folder in (self._training.run / "checkpoints").glob("*.damaged"):
                shutil.rmtree(folder)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.0f} s  {text}", flush=True)
