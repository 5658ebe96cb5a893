"""The all-gathers of weights in a ZeRO-3 step: a simulation of DeepSpeed's bookkeeping.

DeepSpeed does not simply gather each module's weights before its forward and again before its backward. It records the
order of the modules in the first steps, and then
- prefetches: with each module it gathers weights of the next ones, up to `prefetch_bucket` elements at a time;
- keeps weights after forward that are used again within `reuse_distance` elements. At the default these are all weights
  of models of up to 1e9 parameters, and backward gathers nothing.
With hpZ, when a rank first drops a weight in a step, it keeps a shard of it for its hpZ group. Later gathers of that
weight stay within the group.

Source: deepspeed/runtime/zero/partitioned_param_coordinator.py (0.19.8), `fetch_sub_module` and `__params_to_release`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ModuleNode:
    """A module as ZeRO-3 sees it.

    Attributes:
        parameters: indices of the parameters that must be gathered while it runs: its own, those of its children that
            it reads itself, and all of a leaf.
        children: the modules that it calls, in that order; empty for a leaf.
        is_leaf: whether it is gathered as a whole (DeepSpeed's "leaf module").
    """

    parameters: tuple[int, ...]
    children: tuple[ModuleNode, ...] = ()
    is_leaf: bool = False

    @property
    def subtree(self) -> tuple[int, ...]:
        """The parameters of the module and its subtree; one that the module reads of a child comes twice."""
        return self.parameters + tuple(index for child in self.children for index in child.subtree)


class Gather(NamedTuple):
    """One all-gather of weights.

    Attributes:
        phase: "forward" or "backward".
        parameters: indices of the gathered parameters.
        secondary: whether it is within an hpZ group, not over all ranks.
    """

    phase: str
    parameters: tuple[int, ...]
    secondary: bool


@dataclass(frozen=True)
class GatherRules:
    """DeepSpeed's settings for gathers, in elements.

    Attributes:
        prefetch_bucket: stage3_prefetch_bucket_size.
        reuse_distance: stage3_max_reuse_distance.
        live: stage3_max_live_parameters, which limits prefetching.
    """

    prefetch_bucket: int
    reuse_distance: int
    live: int


def pack_gathers(
    root: ModuleNode, sizes: Sequence[int], persistent: frozenset[int], rules: GatherRules, hpz: bool, first: bool
) -> list[Gather]:
    """The gathers of one pack's forward and backward pass, once DeepSpeed has recorded the order of the modules.

    Args:
        root: the model.
        sizes: elements of each parameter.
        persistent: indices of the parameters that are unsharded on every rank.
        hpz: whether there are hpZ groups.
        first: whether it is the first pack of the step, when hpZ groups hold no shards yet.
    """
    simulation = _Simulation(root, sizes, persistent, rules, hpz, first)
    simulation.forward(root)
    simulation.backward(root)
    return simulation.gathers


class _Simulation:
    def __init__(
        self,
        root: ModuleNode,
        sizes: Sequence[int],
        persistent: frozenset[int],
        rules: GatherRules,
        hpz: bool,
        first: bool,
    ) -> None:
        self._sizes, self._persistent, self._rules, self._hpz = sizes, persistent, rules, hpz
        self._order = [*_visited(root, False), *_visited(root, True)]
        self._queue = deque(
            (number, step) for step, module in enumerate(self._order) for number in sorted(module.parameters)
        )
        self._secondary = set() if first or not hpz else set(range(len(sizes))) - persistent
        self._available = set(persistent)
        self._gathered = 0  # elements that are available and not persistent
        self._in_use: dict[int, int] = {}
        self._fetched_for: dict[int, int] = {}
        self._step, self._phase = 0, "forward"
        self.gathers: list[Gather] = []

    def forward(self, module: ModuleNode) -> None:
        self._enter(module)
        for child in module.children:
            self.forward(child)
        self._leave(module)

    def backward(self, module: ModuleNode) -> None:
        self._phase = "backward"
        self._enter(module)
        for child in reversed(module.children):
            self.backward(child)
        self._leave(module)

    def _enter(self, module: ModuleNode) -> None:
        self._gather({number for number in module.parameters if number not in self._available})
        for number in module.parameters:
            self._in_use[number] = self._in_use.get(number, 0) + 1
        due = sum(self._fetched_for.get(number, -1) < self._step for number in set(module.parameters))
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
            gathered = tuple(sorted(number for number in numbers if (number in self._secondary) == secondary))
            if gathered:
                self.gathers.append(Gather(self._phase, gathered, secondary))
        self._available |= numbers
        self._gathered += sum(self._sizes[number] for number in numbers)

    def _leave(self, module: ModuleNode) -> None:
        dropped = {
            number for number in module.parameters if self._fetched_for.get(number, -1) <= self._step
        } - self._persistent
        distance = 0
        for later in self._order[self._step :]:
            if distance >= self._rules.reuse_distance:
                break
            # As DeepSpeed counts them: for other modules a leaf has no parameters of its own.
            walked = later.subtree if module.is_leaf else () if later.is_leaf else later.parameters
            dropped -= set(walked)
            distance += sum(self._sizes[number] for number in walked)
        for number in module.parameters:
            self._in_use[number] -= 1
            if number in dropped and number in self._available and not self._in_use[number]:
                self._available.remove(number)
                self._gathered -= self._sizes[number]
                if self._hpz:
                    self._secondary.add(number)


def _visited(module: ModuleNode, backward: bool) -> Iterator[ModuleNode]:
    """The module and its subtree in the order of a pass."""
    yield module
    for child in reversed(module.children) if backward else module.children:
        yield from _visited(child, backward)
