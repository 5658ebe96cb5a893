"""What a start of a training takes, predicted from its first steps' packs, beside what was measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from far_scale.config.schema import TrainSection
from far_scale.distributed.ledger import Entry
from far_scale.distributed.process_group import Processes
from far_scale.model import FARConfig
from far_scale.model.layout import FrameLayout
from far_scale.train.metrics import peak_memory
from far_scale.train.planner.memory import Counts, RankMemory, activation_bytes
from far_scale.train.planner.profile import Profile
from far_scale.train.planner.time_model import pack_work, predict_seconds, sum_work, update_work
from far_scale.train.sharding import Sharding, state_bytes
from far_scale.utils.event_log import EventLog

_STEPS = 20
"""After so many steps of a start it is compared."""
_WARMUP = 10


class Forecast:
    """Emits the event `forecast` once a start, on the main process.

    Args:
        config: the model's shape.
        train: the recipe's section.
        sharding: of the run.
        sizes: elements of each of the model's parameters.
        flex: whether attention is FlexAttention.
        traffic: the collectives of a step, of a rank.
        profile: of such hardware, or None: then no time is predicted.
        processes: the run's.
        events: of this process.
    """

    def __init__(
        self,
        config: FARConfig,
        train: TrainSection,
        sharding: Sharding,
        sizes: Sequence[int],
        flex: bool,
        traffic: Sequence[Entry],
        profile: Profile | None,
        processes: Processes,
        events: EventLog,
    ) -> None:
        self._config, self._train, self._sharding, self._sizes = config, train, sharding, sizes
        self._flex, self._traffic, self._profile = flex, traffic, profile
        self._processes, self._events = processes, events
        self._steps: list[list[FrameLayout]] = []
        self._seconds: list[float] = []
        self._last = time.perf_counter()
        self._done = not processes.is_main_process

    def end_step(self, step: int, layouts: Sequence[FrameLayout]) -> None:
        """Count step number `step` (from 1) with the layouts of this rank's packs; compare when there are enough."""
        if self._done:
            return
        now = time.perf_counter()
        self._steps.append(list(layouts))
        self._seconds.append(now - self._last)
        self._last = now
        if len(self._steps) == _STEPS:
            self._done = True
            self._emit(step)
            self._steps = []  # their layouts hold tensors on the device

    def _emit(self, step: int) -> None:
        train, sharding, ranks = self._train, self._sharding, self._processes.world_size
        packs = len(self._steps[0])
        largest = max((layout for layouts in self._steps for layout in layouts), key=lambda layout: layout.tokens)
        state = state_bytes(train.precision, sharding, self._sizes, ranks, train.whole_below, packs)
        activations = activation_bytes(
            self._config, train, Counts.of(largest, train.sequence_parallel), self._flex, packs
        )
        memory = RankMemory(state, activations)
        measured = peak_memory(self._processes.device)
        on_gpu = self._processes.device.type == "cuda"
        text = (
            f"step {step}: {memory.peak / 1e9:.2f} GB a rank predicted, {measured / 1e9:.2f} GB measured"
            f"{'' if on_gpu else ' (of the whole process)'}"
        )
        seconds = statistics.median(self._seconds[_WARMUP:])
        predicted = None
        if self._profile is not None:
            update = update_work(self._sizes, sharding.stage, self._traffic, ranks)
            mode = train.activation_checkpointing
            steps = self._steps[_WARMUP:]
            works = [
                sum_work(
                    [
                        update,
                        *(
                            pack_work(self._config, layout, mode, self._flex, train.sequence_parallel)
                            for layout in layouts
                        ),
                    ]
                )
                for layouts in steps
            ]
            coefficients = self._profile.coefficients
            predicted = statistics.median(predict_seconds(coefficients, work) for work in works)
            text += f"; {predicted:.3g} s a step predicted, {seconds:.3g} s measured"
        self._events.emit(
            "forecast",
            step,
            text,
            memory={**memory.parts(), "peak": memory.peak, "measured": measured},
            seconds={"predicted": predicted, "measured": seconds},
        )
