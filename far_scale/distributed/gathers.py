"""Which weights ZeRO-3 gathers in a step, when and among whom: a replay of DeepSpeed's own bookkeeping.

DeepSpeed does not simply gather each module's weights before its forward and again before its backward. It knows the
order of the modules from the first steps, and by it
- gathers ahead: with each module, weights of the next ones, up to `prefetch_bucket` numbers at a time;
- keeps after forward what is used again within `reuse_distance` numbers, which is everything in models of up to 1e9
  parameters at its default: then backward gathers nothing.
With hpZ a rank also keeps, when it first drops a weight in a step, a part of it for the ranks of its hpZ group, which
from then on gather it among themselves alone.

Source: deepspeed/runtime/zero/partitioned_param_coordinator.py (0.19.8), `fetch_sub_module` and `__params_to_release`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Part:
    """A module as ZeRO-3 sees it.

    Attributes:
        own: the parameters, by number, that must be there while it runs: its own, those of its parts that it reads
            itself, and all of a module that is gathered in one go.
        parts: the modules that it calls, in that order; none of a module that is gathered in one go.
        whole: whether it is gathered in one go (DeepSpeed's "leaf module").
    """

    own: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    whole: bool = False

    @property
    def below(self) -> tuple[int, ...]:
        """Its parameters and its parts', as DeepSpeed walks them: one that the module reads of a part comes twice."""
        return self.own + tuple(number for part in self.parts for number in part.below)


class Gather(NamedTuple):
    """One all-gather of weights.

    Attributes:
        phase: "forward" or "backward", in which it is started.
        parameters: what it gathers.
        secondary: among the ranks of an hpZ group, rather than among all.
    """

    phase: str
    parameters: tuple[int, ...]
    secondary: bool


@dataclass(frozen=True)
class GatherRules:
    """Keys of DeepSpeed's that decide, all in numbers.

    Attributes:
        prefetch_bucket: stage3_prefetch_bucket_size.
        reuse_distance: stage3_max_reuse_distance.
        live: stage3_max_live_parameters, which limits what is gathered ahead.
    """

    prefetch_bucket: int
    reuse_distance: int
    live: int


def pack_gathers(
    root: Part, sizes: Sequence[int], kept: frozenset[int], rules: GatherRules, hpz: bool, first: bool
) -> list[Gather]:
    """The gathers of one pack's forward and backward pass, once DeepSpeed knows the order of the modules.

    Args:
        root: the model.
        sizes: numbers in each parameter.
        kept: the parameters that are whole on every rank.
        hpz: whether there are hpZ groups.
        first: whether it is the step's first pack, before which hpZ groups hold nothing.
    """
    replay = _Replay(root, sizes, kept, rules, hpz, first)
    replay.forward(root)
    replay.backward(root)
    return replay.gathers


class _Replay:
    def __init__(
        self, root: Part, sizes: Sequence[int], kept: frozenset[int], rules: GatherRules, hpz: bool, first: bool
    ) -> None:
        self._sizes, self._kept, self._rules, self._hpz = sizes, kept, rules, hpz
        self._order = [*_entered(root, False), *_entered(root, True)]
        self._queue = deque((number, step) for step, part in enumerate(self._order) for number in sorted(part.own))
        self._secondary = set() if first or not hpz else set(range(len(sizes))) - kept
        self._available = set(kept)
        self._gathered = 0  # numbers that are available and not kept
        self._in_use: dict[int, int] = {}
        self._fetched_for: dict[int, int] = {}
        self._step, self._phase = 0, "forward"
        self.gathers: list[Gather] = []

    def forward(self, part: Part) -> None:
        self._enter(part)
        for each in part.parts:
            self.forward(each)
        self._leave(part)

    def backward(self, part: Part) -> None:
        self._phase = "backward"
        self._enter(part)
        for each in reversed(part.parts):
            self.backward(each)
        self._leave(part)

    def _enter(self, part: Part) -> None:
        self._gather({number for number in part.own if number not in self._available})
        for number in part.own:
            self._in_use[number] = self._in_use.get(number, 0) + 1
        due = sum(self._fetched_for.get(number, -1) < self._step for number in set(part.own))
        taken: set[int] = set()
        while self._queue and len(taken) < due:
            number, step = self._queue.popleft()
            self._fetched_for[number] = step
            taken.add(number)
        self._prefetch()
        self._step += 1

    def _prefetch(self) -> None:
        if not self._rules.prefetch_bucket:
            return
        limit = min(self._rules.live - self._gathered, self._rules.prefetch_bucket)
        ahead: set[int] = set()
        while self._queue and sum(self._sizes[number] for number in ahead) < limit:
            number, step = self._queue.popleft()
            self._fetched_for[number] = max(self._fetched_for.get(number, -1), step)
            if number not in self._available:
                ahead.add(number)
        self._gather(ahead)

    def _gather(self, numbers: set[int]) -> None:
        for secondary in (True, False):
            together = tuple(sorted(number for number in numbers if (number in self._secondary) == secondary))
            if together:
                self.gathers.append(Gather(self._phase, together, secondary))
        self._available |= numbers
        self._gathered += sum(self._sizes[number] for number in numbers)

    def _leave(self, part: Part) -> None:
        dropped = {number for number in part.own if self._fetched_for.get(number, -1) <= self._step} - self._kept
        distance = 0
        for later in self._order[self._step :]:
            if distance >= self._rules.reuse_distance:
                break
            # As DeepSpeed walks them: seen from any other module, one that is gathered in one go holds no parameters.
            walked = later.below if part.whole else () if later.whole else later.own
            dropped -= set(walked)
            distance += sum(self._sizes[number] for number in walked)
        for number in part.own:
            self._in_use[number] -= 1
            if number in dropped and number in self._available and not self._in_use[number]:
                self._available.remove(number)
                self._gathered -= self._sizes[number]
                if self._hpz:
                    self._secondary.add(number)


def _entered(part: Part, backward: bool) -> Iterator[Part]:
    """The part and all below it in the order in which a pass comes to them."""
    yield part
    for each in reversed(part.parts) if backward else part.parts:
        yield from _entered(each, backward)
